"""A small task and networks for it, that a few steps of training solve."""

from functools import partial

import keras
import numpy as np
from keras import layers

from normswap.data.dataset import Data, from_arrays
from normswap.data.preprocessing import Preprocessing
from normswap.finetune.run.batches import batch_indices
from normswap.finetune.run.keras.train import train
from normswap.finetune.run.training import Training
from normswap.layers.keras import BatchRenormalization, SwitchNormalization

BATCH_SIZE = 16
PREPROCESSING = Preprocessing((6, 6, 1), "channels_last", mean=(0.5,), std=(0.3,))
NORMS = {
    "bn": layers.BatchNormalization,
    "gn": partial(layers.GroupNormalization, 2),
    "sn": SwitchNormalization,
    "brn": BatchRenormalization,
}


def stripes(*, flipped=False) -> Data:
    """Noisy images, bright on the left for class 0 and on the right for class 1, or labelled the other way round."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 64)
    images = rng.uniform(0, 0.6, (64, 6, 6, 1)).astype(np.float32)
    images[labels == 0, :, :3] += 0.4
    images[labels == 1, :, 3:] += 0.4
    return from_arrays(images, 1 - labels if flipped else labels, PREPROCESSING)


class Spoiled(Data):
    """The stripes, of which the batch of one step is NaN, or raises ``error``."""

    def __init__(self, step, error=None):
        whole = stripes()
        super().__init__(whole._images, whole.preprocessing)
        self.at, self.error = batch_indices(len(whole), BATCH_SIZE, step, seed=0), error

    def batch(self, indices, *how):
        """Return images and labels."""
        images, labels = super().batch(indices, *how)
        if not np.array_equal(indices, self.at):
            return images, labels
        if self.error is not None:
            raise self.error
        return np.full_like(images, np.nan), labels


def small_net(norm="bn", *, end="linear", dropout=0.0) -> keras.Model:
    """A network with one norm, the same each time."""
    keras.utils.set_random_seed(3)
    image = keras.Input((6, 6, 1))
    x = layers.ReLU()(NORMS[norm](name="norm")(layers.Conv2D(4, 3, name="conv")(image)))
    x = layers.Dropout(dropout)(layers.Flatten()(x))
    return keras.Model(image, layers.Dense(2, activation=end, name="scores")(x))


def fitted(model, data=None, *, on_step=None, **options):
    """Train ``model`` and return what was taken."""
    found = []

    def note(taken):
        found.append(taken)
        return None if on_step is None else on_step(taken)

    given = {name: options.pop(name) for name in ("teacher", "hooks", "first", "start", "state") if name in options}
    settings = Training(**{"steps": 12, "batch_size": BATCH_SIZE, "lr": 0.1, **options})
    train(model, data or stripes(), settings, on_step=note, **given)
    return found


def losses(*args, **options):
    """Train and return the loss of each step."""
    return [taken.loss for taken in fitted(*args, **options)]


def values(model):
    """Every weight of ``model`` by path."""
    return {weight.path: np.array(keras.ops.convert_to_numpy(weight)) for weight in model.weights}


def changed(before, after):
    """The names of the weights that are not the same bits."""
    assert before.keys() == after.keys()
    return {name.partition("/")[2] or name for name in before if not np.array_equal(before[name], after[name])}
