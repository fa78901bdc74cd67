"""What each step of a training learns from, for the loaders of either framework to hand to their workers."""

import numpy as np
from numpy.typing import NDArray

from ...data.dataset import Data
from ...errors import NormswapError
from .batches import batch_indices
from .training import Training

Batch = tuple[NDArray[np.float32], NDArray[np.int64], int]
"""One process's images and labels, and how many images all processes have together."""

EVERYTHING = slice(None)


class StepBatches:
    """The augmented batches of ``steps`` steps from ``first`` on, ``training.accumulate`` for each step.

    ``share`` is the part of every batch that falls to this process. A batch depends on the seed and its number alone,
    so that neither the order in which workers read nor a restart changes any. Pickles without the images that are kept
    in memory.
    """

    def __init__(self, data: Data, training: Training, *, first: int, steps: int, share: slice = EVERYTHING) -> None:
        self._data, self._training, self._share = data, training, share
        self._first, self._count = first * training.accumulate, steps * training.accumulate

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, item: int) -> Batch | NormswapError:
        """Return a batch, or the error of reading it: loaders mix an error raised in a worker with its traceback."""
        if not 0 <= item < self._count:
            raise IndexError(f"expected an item from 0 to {self._count - 1}, received {item}")
        number, seed = self._first + item, self._training.seed
        indices = batch_indices(len(self._data), self._training.batch_size, number, seed)
        try:
            images, labels = self._data.batch(indices[self._share], (seed, number), self._training.augment)
        except NormswapError as error:
            return error
        return images, labels, len(indices)
