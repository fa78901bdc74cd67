"""A Keras model computes channels last, its file channels first: what is left of the changes between the two."""

import keras
import numpy as np
import pytest
from keras import layers
from keras.src.applications.resnet import ResNet, stack_residual_blocks_v1

from normswap.convert.targets import BatchRenorm, GroupNorm, SwitchNorm
from normswap.patchers.keras.patch import patch

from .exporting import exported, settled

pytestmark = pytest.mark.keras


def block(x):
    return layers.Conv2D(4, 3, padding="same")(layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(4, 1)(x))))


def concatenated(x):
    return layers.Conv2D(4, 1)(layers.BatchNormalization()(layers.concatenate([x, block(x)])))


def pooled(x):
    x = layers.AveragePooling2D(2)(layers.MaxPooling2D(2)(layers.BatchNormalization()(layers.ZeroPadding2D(1)(x))))
    return layers.Conv2D(4, 1)(x)


def squeezed(x):
    x = layers.BatchNormalization()(x)
    scale = layers.Reshape((1, 1, 4))(layers.GlobalAveragePooling2D()(x))
    scale = layers.Conv2D(4, 1, activation="sigmoid")(layers.Conv2D(2, 1, activation="swish")(scale))
    return block(layers.multiply([x, scale]))


BODIES = {
    "a block": block,
    "a residual": lambda x: layers.add([x, block(x)]),
    "a concatenation": concatenated,
    "pooling": pooled,
    "a depthwise convolution": lambda x: block(layers.DepthwiseConv2D(3, strides=2, bias_initializer="ones")(x)),
    "squeeze and excitation": squeezed,
    "an activation after a scalar": lambda x: block(layers.Rescaling(2.0, offset=[1.0, 2.0, 3.0, 4.0])(x)),
}


@pytest.mark.parametrize("target", [BatchRenorm(), GroupNorm(2), SwitchNorm()])
@pytest.mark.parametrize("body", BODIES)
def test_only_the_input_is_transposed(body, target, tmp_path):
    """Whatever lies between convolutions and norms, one Transpose brings the image's channels forward."""
    image = keras.Input((12, 12, 3), name="image")
    x = BODIES[body](layers.Conv2D(4, 3, padding="same", name="stem")(image))
    model = settled(keras.Model(image, layers.Dense(2)(layers.GlobalAveragePooling2D()(x))))
    patch(model, target)
    graph = exported(model, tmp_path / "model.onnx")

    assert [list(node.input) for node in graph.node if node.op_type == "Transpose"] == [["image"]]


def test_a_flattened_map_keeps_its_order(tmp_path):
    """A Dense layer that reads a map channels last has one more Transpose before it."""
    image = keras.Input((6, 6, 3), name="image")
    model = settled(keras.Model(image, layers.Dense(2)(layers.Flatten()(block(image)))))
    patch(model, GroupNorm(2))
    graph = exported(model, tmp_path / "model.onnx")
    followers = {entry: node.op_type for node in graph.node for entry in node.input}

    assert [followers[node.output[0]] for node in graph.node if node.op_type == "Transpose"] == ["Conv", "Reshape"]


def resnet(**options):
    """A ResNet of two stages, with bottlenecks that change the width or the size and ones that do not."""

    def stages(x):
        x = stack_residual_blocks_v1(x, 8, 2, stride1=1, name="conv2")
        return stack_residual_blocks_v1(x, 16, 2, name="conv3")

    return ResNet(stages, preact=False, use_bias=True, **options)


@pytest.mark.parametrize("network", [keras.applications.MobileNetV2, resnet], ids=["MobileNetV2", "ResNet"])
def test_whole_networks_have_one_transpose(network, tmp_path):
    """A patched network of keras.applications has one Transpose, and folds all of its batch renormalizations."""
    model = settled(network(weights=None, input_shape=(32, 32, 3), classes=10))
    patch(model, BatchRenorm())
    graph = exported(model, tmp_path / "model.onnx")
    operators = [node.op_type for node in graph.node]

    assert operators.count("Transpose") == 1
    assert "BatchNormalization" not in operators


def test_channels_first_needs_none(tmp_path):
    """A channels_first model is written as it is."""
    image = keras.Input((3, 8, 8), name="image")
    x = layers.Conv2D(4, 3, data_format="channels_first", name="conv")(image)
    x = layers.ReLU()(layers.BatchNormalization(axis=1, name="norm")(x))
    x = layers.GlobalAveragePooling2D(data_format="channels_first")(x)
    model = settled(keras.Model(image, layers.Dense(2, name="scores")(x)))
    patch(model, GroupNorm(2))

    assert not np.any([node.op_type == "Transpose" for node in exported(model, tmp_path / "model.onnx").node])
