"""Inputs of a model that are not images: a batch of arrays by name, as the data of an ``.npz``."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from ..frameworks.example import Inputs

Indices = Sequence[int] | NDArray[np.int64]


class NamedInputs:
    """Samples of a model's inputs, read batch by batch as `Data` is, without labels.

    Arrays that are not of equally many samples, as those of a graph, are one sample: they are not taken apart.
    """

    what = "inputs"

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs

    def __len__(self) -> int:
        return 1 if self._inputs.samples is None else self._inputs.samples

    def sample(self, count: int, seed: int = 0) -> NDArray[np.int64]:
        """Return the indices of ``count`` samples drawn without replacement."""
        return np.random.default_rng(seed).permutation(len(self))[:count]

    def batch(self, indices: Indices) -> tuple[Inputs, NDArray[np.int64]]:
        """Return the arguments of the samples at ``indices``, and 0 for each label."""
        rows = np.asarray(indices, np.int64)
        inputs = self._inputs if self._inputs.samples is None else self._inputs.taken(rows)
        return inputs, np.zeros(len(rows), np.int64)

    def batches(self, size: int, indices: Indices) -> Iterator[tuple[Inputs, NDArray[np.int64]]]:
        """Yield what is at ``indices`` in batches of ``size``."""
        for start in range(0, len(indices), size):
            yield self.batch(indices[start : start + size])
