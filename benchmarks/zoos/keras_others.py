"""Other Keras libraries, and models as people write them: U-Nets, temporal convolutions, subclasses, sequences."""

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from normswap import Inputs

from . import Network

WIDTHS = [8, 16, 32]
U_NETS = {
    "unet_2d": {"filter_num": WIDTHS, "batch_norm": True},
    "unet_plus_2d": {"filter_num": WIDTHS, "batch_norm": True},
    "r2_unet_2d": {"filter_num": WIDTHS, "batch_norm": True},
    "att_unet_2d": {"filter_num": WIDTHS, "batch_norm": True},
    "unet_3plus_2d": {"filter_num_down": WIDTHS, "batch_norm": True},
    "u2net_2d": {"filter_num_down": WIDTHS, "batch_norm": True},
}


def networks() -> dict[str, Callable[[], Network]]:
    """Return the builders by their names."""
    return {name: _u_net(name, options) for name, options in U_NETS.items()} | {
        "keras-tcn": _tcn,
        "U-Net of a subclass": _subclass,
        "speech commands": _speech,
        "masked LSTM": _masked,
        "time distributed": _time_distributed,
        "nested backbone": _nested,
        "Siamese": _siamese,
        "3-D convolutions": _volumes,
        "generator": _generator,
    }


def _u_net(name: str, options: dict[str, Any]) -> Callable[[], Network]:
    def build() -> Network:
        models = importlib.import_module("keras_unet_collection.models")
        return Network(getattr(models, name)((64, 64, 3), n_labels=2, **options), _images(64))

    return build


def _images(side: int = 32) -> Inputs:
    return Inputs(np.random.default_rng(0).random((2, side, side, 3), "float32"))


def _tcn() -> Network:
    import keras

    tcn = importlib.import_module("tcn")
    model = keras.Sequential(
        [keras.Input((20, 4)), tcn.TCN(8, dilations=(1, 2, 4), use_batch_norm=True), keras.layers.Dense(3)]
    )
    return Network(model, Inputs(np.random.default_rng(0).random((2, 20, 4), "float32")))


def _subclass() -> Network:
    import keras
    from keras import layers

    class Block(layers.Layer):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.conv, self.norm = layers.Conv2D(width, 3, padding="same"), layers.BatchNormalization()

        def call(self, x: Any, training: bool = False) -> Any:
            return keras.ops.relu(self.norm(self.conv(x), training=training))

    class UNet(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.middle, self.up = Block(8), Block(16), Block(8)
            self.pool, self.grow, self.head = layers.MaxPooling2D(), layers.UpSampling2D(), layers.Conv2D(2, 1)

        def call(self, x: Any, training: bool = False) -> Any:
            skip = self.down(x, training=training)
            x = self.grow(self.middle(self.pool(skip), training=training))
            return self.head(self.up(keras.ops.concatenate([skip, x], axis=-1), training=training))

    model, example = UNet(), _images()
    model(example.args[0])
    return Network(model, example)


def _speech() -> Network:
    import keras
    from keras import layers

    model = keras.Sequential(
        [
            keras.Input((50, 20)),
            layers.Conv1D(16, 5, padding="same"),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.SeparableConv1D(16, 5),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Bidirectional(layers.GRU(8)),
            layers.Dense(8),
            layers.BatchNormalization(),
            layers.Dense(4),
        ]
    )
    return Network(model, Inputs(np.random.default_rng(0).random((2, 50, 20), "float32")))


def _masked() -> Network:
    import keras
    from keras import layers

    model = keras.Sequential(
        [
            keras.Input((12, 6)),
            layers.Masking(),
            layers.Dense(8),
            layers.BatchNormalization(),
            layers.LSTM(8, return_sequences=True),
            layers.BatchNormalization(),
            layers.LSTM(4),
        ]
    )
    x = np.random.default_rng(0).random((2, 12, 6), "float32")
    x[1, 7:] = 0
    return Network(model, Inputs(x))


def _time_distributed() -> Network:
    import keras
    from keras import layers

    frame = keras.Sequential(
        [keras.Input((32, 32, 3)), layers.Conv2D(8, 3, 2), layers.BatchNormalization(), layers.GlobalAveragePooling2D()]
    )
    model = keras.Sequential(
        [keras.Input((4, 32, 32, 3)), layers.TimeDistributed(frame), layers.LSTM(8), layers.Dense(3)]
    )
    return Network(model, Inputs(np.random.default_rng(0).random((2, 4, 32, 32, 3), "float32")))


def _nested() -> Network:
    import keras
    from keras import layers

    backbone = keras.applications.MobileNetV2(weights=None, include_top=False, input_shape=(64, 64, 3), alpha=0.35)
    inputs = keras.Input((64, 64, 3))
    x = layers.GlobalAveragePooling2D()(backbone(layers.Rescaling(2.0, offset=-1.0)(inputs)))
    x = layers.BatchNormalization()(layers.Dense(16)(x))
    return Network(keras.Model(inputs, layers.Dense(3)(x)), _images(64))


def _siamese() -> Network:
    import keras
    from keras import layers

    tower = keras.Sequential(
        [keras.Input((32, 32, 3)), layers.Conv2D(8, 3), layers.BatchNormalization(), layers.GlobalAveragePooling2D()]
    )
    left, right = keras.Input((32, 32, 3)), keras.Input((32, 32, 3))
    model = keras.Model([left, right], layers.Dot(1)([tower(left), tower(right)]))
    x = _images().args[0]
    return Network(model, Inputs([x, x[::-1].copy()]))


def _volumes() -> Network:
    import keras
    from keras import layers

    model = keras.Sequential(
        [
            keras.Input((8, 16, 16, 1)),
            layers.Conv3D(8, 3),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Conv3DTranspose(4, 2, 2),
            layers.BatchNormalization(),
            layers.GlobalAveragePooling3D(),
            layers.Dense(2),
        ]
    )
    return Network(model, Inputs(np.random.default_rng(0).random((2, 8, 16, 16, 1), "float32")))


def _generator() -> Network:
    import keras
    from keras import layers

    model = keras.Sequential(
        [
            keras.Input((16,)),
            layers.Dense(128, use_bias=False),
            layers.BatchNormalization(),
            layers.LeakyReLU(),
            layers.Reshape((4, 4, 8)),
            layers.Conv2DTranspose(8, 5, 2, "same", use_bias=False),
            layers.BatchNormalization(),
            layers.LeakyReLU(),
            layers.Conv2DTranspose(3, 5, 2, "same", activation="tanh"),
        ]
    )
    return Network(model, Inputs(np.random.default_rng(0).random((2, 16), "float32")))
