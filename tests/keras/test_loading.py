"""Reading ahead in Keras's workers: the same batches as without any."""

import keras
import numpy as np
import pytest

from normswap.data.dataset import from_arrays
from normswap.data.preprocessing import Preprocessing
from normswap.finetune.run.loading import StepBatches
from normswap.finetune.run.training import Training


class Batches(keras.utils.PyDataset):
    """The images and labels of a training's steps."""

    def __init__(self, batches, **options):
        super().__init__(**options)
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        return self.batches[index][:2]


class Seen(keras.Layer):
    """Passes on what it is given, and keeps a copy."""

    def __init__(self):
        super().__init__()
        self.inputs = []

    def call(self, x):
        """Return ``x``."""
        self.inputs.append(np.array(keras.ops.convert_to_numpy(x)))
        return keras.ops.mean(x, axis=(1, 2))


@pytest.mark.parametrize("processes", [False, True])
def test_workers(processes):
    """Threads or processes, every step sees the same bits in the same order."""
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), np.uint8)
    data = from_arrays(images, np.arange(20) % 3, Preprocessing((8, 8, 3), "channels_last"))
    batches = StepBatches(data, Training(batch_size=4, augment="crop,flip", seed=3), first=2, steps=6)
    model = keras.Sequential([seen := Seen()])
    model.compile(loss="sparse_categorical_crossentropy", run_eagerly=True)
    model.evaluate(Batches(batches, workers=2, use_multiprocessing=processes), verbose=0)

    found = seen.inputs[-6:]
    assert all(np.array_equal(x, batches[step][0]) for step, x in enumerate(found))
