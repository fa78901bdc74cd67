"""The plan's `folds`: what an export does with each norm of a Keras model, or that it is not known."""

import keras
import pytest
from keras import layers

import normswap

from .exporting import settled

pytestmark = pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="TensorFlow's graph tells it")


def norm(x):
    return layers.BatchNormalization()(x)


WAYS = {
    "a layer": (lambda x: norm(layers.Conv2D(4, 3)(x)), True),
    "frozen": (lambda x: norm(layers.Conv2D(4, 3, trainable=False)(x)), True),
    "scaled": (lambda x: norm(layers.Rescaling(0.5, 1.0)(layers.Conv2D(4, 3)(x))), True),
    "reshaped": (lambda x: norm(layers.Reshape((-1, 4))(layers.Conv2D(4, 3)(x))), True),
    "moved": (
        lambda x: layers.BatchNormalization(axis=1)(layers.Permute((3, 1, 2))(layers.Conv2D(4, 3)(x))),
        True,
    ),
    "an activation": (lambda x: norm(layers.Conv2D(4, 3, activation="relu")(x)), False),
    "pooled": (lambda x: norm(layers.AveragePooling2D(2)(layers.Conv2D(4, 3)(x))), False),
    "read elsewhere": (lambda x: (lambda y: layers.Add()([norm(y), y]))(layers.Conv2D(4, 3)(x)), False),
    "cut": (lambda x: norm(layers.Cropping2D()(layers.Conv2D(4, 3)(x))), None),
}


@pytest.mark.parametrize("name", WAYS)
def test_the_plan_says_what_the_export_does(name, tmp_path):
    """The column is true of layers and of what lies between, or says that it is not known."""
    way, expected = WAYS[name]
    x = keras.Input((8, 8, 3))
    model = settled(keras.Model(x, way(x)))
    (decision,) = normswap.plan(model, "brn").decisions
    assert decision.folds is expected

    normswap.patch(model, "brn")
    report = normswap.to_onnx(model, tmp_path / "m.onnx", check=False)
    if expected is not None:
        assert bool(report.folded) is expected
