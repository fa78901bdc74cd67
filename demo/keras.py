"""The demo's network in Keras."""

import keras
from keras import layers as kinds

from ..data.dataset import Data
from ..finetune.run.batches import batch_indices


def build() -> keras.Model:
    """Return three convolutions with BatchNorm, and a classifier, for (N, 8, 8, 1) images."""
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            keras.Input((8, 8, 1), name="image"),
            kinds.Conv2D(16, 3, padding="same", use_bias=False),
            kinds.BatchNormalization(),
            kinds.ReLU(),
            kinds.Conv2D(32, 3, strides=2, padding="same", use_bias=False),
            kinds.BatchNormalization(),
            kinds.ReLU(),
            kinds.Conv2D(64, 3, padding="same", use_bias=False),
            kinds.BatchNormalization(),
            kinds.ReLU(),
            kinds.GlobalAveragePooling2D(),
            kinds.Dense(10, name="scores"),
        ]
    )


def trained(data: Data, steps: int = 300) -> keras.Model:
    """Return the network trained on ``data``."""
    model = build()
    for layer in model.layers:
        if isinstance(layer, kinds.BatchNormalization):
            layer.momentum = 0.9  # Keras's 0.99 would not have settled by the end
    model.compile(keras.optimizers.Adam(3e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    for step in range(steps):
        model.train_on_batch(*data.batch(batch_indices(len(data), 64, step, seed=0)))
    return model
