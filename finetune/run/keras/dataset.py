"""Batches read ahead for a Keras model."""

import keras

from ....errors import NormswapError
from ..loading import StepBatches
from ..training import Array


class Batches(keras.utils.PyDataset):  # type: ignore[misc]
    """The batches of all steps, one after the other, read ahead by threads if there are ``workers``.

    ``error`` is what reading one raised, which TensorFlow would tell within an error of its own.
    """

    def __init__(self, batches: StepBatches, workers: int) -> None:
        super().__init__(workers=max(1, workers), max_queue_size=max(2, 2 * workers))
        self._batches = batches
        self.error: NormswapError | None = None

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> tuple[Array, Array]:
        batch = self._batches[index]
        if isinstance(batch, NormswapError):
            self.error = batch
            raise batch
        return batch[0], batch[1]
