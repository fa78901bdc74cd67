"""keras.applications: the smallest of every family."""

from collections.abc import Callable

import numpy as np

from normswap import Inputs

from . import Network, each

NAMES = (
    "ResNet50 ResNet50V2 DenseNet121 MobileNet MobileNetV2 MobileNetV3Small MobileNetV3Large EfficientNetB0"
    " EfficientNetV2B0 EfficientNetV2S InceptionV3 InceptionResNetV2 Xception NASNetMobile ConvNeXtTiny"
)
SIDE = 96
"""The least that all take is 75."""


def networks() -> dict[str, Callable[[], Network]]:
    """Return the builders by their names."""
    return each(NAMES, _network)


def _network(name: str) -> Network:
    import keras

    model = getattr(keras.applications, name)(weights=None, input_shape=(SIDE, SIDE, 3), classes=10)
    return Network(model, Inputs(np.random.default_rng(0).normal(size=(2, SIDE, SIDE, 3)).astype("float32")))
