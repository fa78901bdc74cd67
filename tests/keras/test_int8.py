"""Int8 files of Keras models."""

import keras
import numpy as np
import pytest
from keras import layers

import normswap

from .exporting import settled

pytestmark = pytest.mark.keras


@pytest.mark.parametrize("target", ["bn", "sn", "gn"])
def test_a_keras_model(tmp_path, target):
    """Convolutions, depthwise too, and dense layers of a Keras model become int8, and the file is proven."""
    rng = np.random.default_rng(0)
    image = keras.Input((12, 12, 3), name="image")
    x = layers.ReLU()(layers.BatchNormalization(name="norm")(layers.Conv2D(8, 3, use_bias=False, name="conv")(image)))
    x = layers.DepthwiseConv2D(3, name="deep")(x)
    model = settled(keras.Model(image, layers.Dense(4, name="head")(layers.GlobalAveragePooling2D()(x))))
    if target != "bn":
        normswap.patch(model, target)
    data = rng.standard_normal((48, 12, 12, 3), np.float32)

    report = normswap.to_onnx(model, tmp_path / "int8.onnx", int8=[data[:24], data[24:]])

    assert report.verdict
    assert report.int8.layers == 3
    plain = normswap.to_onnx(model, tmp_path / "float.onnx", check=False).output
    assert normswap.verify(model, tmp_path / "int8.onnx", data=data[:16], float_file=plain)
    model.get_layer("head").bias.assign_add(np.full(4, 0.1, np.float32))
    assert not normswap.verify(model, tmp_path / "int8.onnx", data=data[:16], float_file=plain)
