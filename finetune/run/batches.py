"""Which images a step sees, as a function of the step alone."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


def batch_indices(count: int, batch_size: int, step: int, seed: int) -> NDArray[np.int64]:
    """Return the indices of step ``step``'s batch out of ``count`` images.

    Each epoch is a new permutation, its last incomplete batch left out. Being a function of seed and step, it
    needs no saved position to resume. A batch is at most the whole data.
    """
    batch_size = min(batch_size, count)
    epoch, position = divmod(step, count // batch_size)
    return _order(count, epoch, seed)[position * batch_size : (position + 1) * batch_size]


@lru_cache(maxsize=2)  # a permutation of a million takes as long as a step
def _order(count: int, epoch: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(count)
