"""Keras models of every kind and what is in their files: folded norms, ranks, open sizes, precision."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import layers

from normswap.convert.targets import BatchRenorm, GroupNorm, SwitchNorm
from normswap.errors import UnsupportedError
from normswap.export.onnx import to_onnx
from normswap.patchers.keras.patch import patch

from .exporting import count, exported, graph_of, names, settled, small_net, write_small_net

pytestmark = pytest.mark.keras


@pytest.fixture
def path(tmp_path):
    """Where the file is written."""
    return tmp_path / "model.onnx"


def image_model(body, shape=(8, 8, 4)):
    image = keras.Input(shape, name="image")
    return settled(keras.Model(image, body(image)))


def folded(model, path):
    return to_onnx(model, path, overwrite=True).folded


def test_a_convolution_read_twice_keeps_its_norm(path):
    """A convolution that something else reads too keeps its values: the norm is not folded."""

    def body(x):
        x = layers.Conv2D(4, 3, name="conv")(x)
        return layers.concatenate([layers.BatchNormalization(name="norm")(x), layers.ReLU()(x)])

    assert count(exported(image_model(body), path), "BatchNormalization") == 1


def test_a_convolution_called_twice_takes_in_both_norms(path):
    """A shared convolution before two norms is right with both."""
    shared = layers.Conv2D(4, 1, name="shared")

    def body(x):
        first, second = (layers.BatchNormalization(name=name)(shared(x * i)) for i, name in enumerate("ab", 1))
        return layers.add([first, second])

    assert set(folded(image_model(body), path)) == {"a", "b"}


def test_a_norm_called_twice_is_folded_twice(path):
    """A shared norm behind two convolutions is folded into both."""
    norm = layers.BatchNormalization(name="norm")

    def body(x):
        return layers.add([norm(layers.Conv2D(4, 1)(x)), norm(layers.Conv2D(4, 1)(x))])

    assert folded(image_model(body), path) == {"norm": "Conv", "norm#2": "Conv"}


@pytest.mark.parametrize(
    ("layer", "into"),
    [
        (lambda: layers.Conv2DTranspose(4, 3, strides=2), "ConvTranspose"),
        (lambda: layers.Conv2D(4, 3, groups=2, use_bias=False), "Conv"),
        (lambda: layers.DepthwiseConv2D(3, depth_multiplier=2), "Conv"),
        (lambda: layers.Conv2D(4, 3, use_bias=False), "Conv"),
        (lambda: layers.SeparableConv2D(4, 3), "Conv"),
    ],
)
@pytest.mark.parametrize("affine", [True, False])
def test_convolutions_of_every_kind_take_the_norm_in(layer, into, affine, path):
    """A norm, with scale and shift or without, goes into the convolution before it."""
    model = image_model(lambda x: layers.BatchNormalization(scale=affine, center=affine, name="norm")(layer()(x)))

    assert folded(model, path) == {"norm": into}


@pytest.mark.parametrize(
    ("layer", "shape", "into"),
    [
        (lambda: layers.Conv1D(4, 3), (9, 3), "Conv"),
        (lambda: layers.Conv1D(4, 3, padding="causal", use_bias=False), (9, 3), "Conv"),
        (lambda: layers.SeparableConv1D(4, 3), (9, 3), "Conv"),
        (lambda: layers.DepthwiseConv1D(3), (9, 4), "Conv"),
        (lambda: layers.Conv1DTranspose(4, 3, strides=2), (9, 3), "ConvTranspose"),
        (lambda: layers.Conv1DTranspose(4, 3, strides=2, padding="same"), (9, 3), "ConvTranspose"),
        (lambda: layers.Conv2DTranspose(4, 2, strides=2), (4, 5, 3), "ConvTranspose"),
        (lambda: layers.Conv3DTranspose(4, 3, strides=2), (3, 4, 5, 3), "ConvTranspose"),
        (lambda: layers.Dense(4), (9, 3), "Gemm"),
        (lambda: layers.Dense(4, use_bias=False), (2, 9, 3), "Gemm"),
        (lambda: layers.EinsumDense("abc,cd->abd", output_shape=(None, 4), bias_axes="d"), (9, 3), "MatMul"),
        (lambda: keras.Sequential([layers.Dense(4), layers.Rescaling(0.5, 1.0)]), (9, 3), "Gemm"),
        (lambda: keras.Sequential([layers.Dense(4), layers.Reshape((3, 3, 4))]), (9, 3), "Gemm"),
        (lambda: keras.Sequential([layers.Conv2D(4, 3), layers.Reshape((-1, 4))]), (8, 8, 3), "Conv"),
        (lambda: keras.Sequential([layers.Conv1D(4, 9), layers.Flatten()]), (9, 3), "Conv"),
    ],
)
def test_sequences_and_other_shapes_take_the_norm_in(layer, shape, into, path):
    """Where a layer's channels stay together on the way to the norm, in whatever shape, the norm goes into it."""
    model = image_model(lambda x: layers.ReLU()(layers.BatchNormalization(name="norm")(layer()(x))), shape)
    decisions = patch(model, BatchRenorm()).replaced
    report = to_onnx(model, path)

    assert report.verdict
    assert report.folded == {"norm": into}
    assert [decision.folds for decision in decisions] in ([True], [None])  # of an Einsum the plan does not know
    assert count(graph_of(path), "BatchNormalization") == 0


@pytest.mark.parametrize("layer", [layers.Dense(4), layers.Conv1D(4, 3)])
def test_open_lengths_take_the_norm_in(layer, path):
    """A sequence whose length is open has its norm folded as well."""
    clip = keras.Input((None, 3))
    model = settled(keras.Model(clip, layers.ReLU()(layers.BatchNormalization(name="norm")(layer(clip)))))
    report = to_onnx(model, path, example=np.zeros((2, 9, 3), np.float32), dynamic_size=True)

    assert report.verdict
    assert list(report.folded) == ["norm"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (layers.Permute((2, 1)), "it is no scale and shift for each channel of the Conv before it"),
        (layers.Reshape((2, 8)), "it is no scale and shift for each channel of the Conv before it"),
        (layers.ZeroPadding1D(1), "it follows Pad, not a linear layer"),
    ],
)
def test_channels_that_do_not_stay_together_keep_the_norm(body, reason, path):
    """Where a norm's channels are not the layer's, or zeros stand beside what it computes, the norm stays."""
    report = to_onnx(image_model(lambda x: layers.BatchNormalization()(body(layers.Conv1D(4, 3)(x))), (6, 3)), path)

    assert report.verdict
    assert list(report.kept.values()) == [reason]


def test_a_transposed_convolution_computes_no_sizes(path):
    """By how much its output is to be cut or padded is known where all sizes but the batch are."""
    graph = exported(image_model(lambda x: layers.Conv1DTranspose(4, 3, strides=2)(x), (9, 3)), path)

    assert [node.op_type for node in graph.node if node.op_type not in ("Reshape", "Transpose", "Unsqueeze")] == [
        "ConvTranspose",
        "Squeeze",
    ]


def test_a_norm_before_a_convolution_stays(path):
    """A norm before a padded convolution, or behind an activation, is not folded: padding would not be shifted."""

    def body(x):
        x = layers.Conv2D(4, 3, padding="same")(layers.BatchNormalization(name="first")(x))
        return layers.Conv2D(4, 3, padding="same")(layers.BatchNormalization(name="second")(layers.ReLU()(x)))

    assert folded(image_model(body), path) == {}


def test_batch_renormalization_is_a_batch_norm(path):
    """Patched to BRN, a model's file is that of the BatchNorm, but for what it tells of its norms."""
    model = small_net()
    before = exported(model, path)
    patch(model, BatchRenorm())
    after = exported(model, path)

    assert [node.op_type for node in before.node] == [node.op_type for node in after.node]
    for one, other in zip(before.initializer, after.initializer, strict=True):
        assert one.raw_data == other.raw_data


@pytest.mark.parametrize("target", [SwitchNorm(), GroupNorm(2), GroupNorm(1)])
@pytest.mark.parametrize("shape", [(4,), (5, 4), (3, 3, 4), (2, 3, 3, 4), (1, 1, 4)])
def test_every_rank_is_proven(target, shape, path):
    """Vectors, sequences, images, volumes and maps of one value are proven alike."""
    model = image_model(lambda x: layers.BatchNormalization(name="norm")(x), shape)
    patch(model, target)

    assert to_onnx(model, path).verdict


@pytest.mark.parametrize("target", [SwitchNorm(), GroupNorm(2)])
def test_open_height_and_width_stay_open(target, path):
    """A model that leaves its sizes open has a file that does."""
    model = small_net(shape=(None, None, 3))
    patch(model, target)
    graph = exported(model, path, example=np.zeros((2, 16, 16, 3), np.float32), dynamic_size=True)
    sizes = [size.dim_param or size.dim_value for size in graph.input[0].type.tensor_type.shape.dim]

    assert sizes == ["batch", "image_dim_1", "image_dim_2", 3]


def test_sizes_the_model_fixes_cannot_be_open(path):
    """Height and width cannot be left open that the model itself fixes."""
    with pytest.raises(UnsupportedError) as raised:
        to_onnx(small_net(), path, dynamic_size=True)

    assert not path.exists()
    assert str(raised.value) == (
        "expected a model that leaves height and width open, received one with inputs of image=(8, 8, 3); "
        "build it with None for them"
    )


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_is_exported_as_float32(policy, path):
    """A model of a mixed policy, whose weights are float32, has a float32 file, says so, and stays as it is."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        model = small_net()
        patch(model, SwitchNorm())
    finally:
        keras.config.set_dtype_policy(before)
    report = to_onnx(model, path)

    assert report.verdict
    assert report.notes == [f"the model's dtype policy is {policy}: the file computes in float32"]
    assert model.dtype_policy.name == policy


@pytest.mark.parametrize("kind", ["functional", "sequential", "nested", "shared", "time_distributed", "custom"])
@pytest.mark.parametrize("target", [BatchRenorm(), SwitchNorm(), GroupNorm(1)])
def test_models_of_every_kind_keep_their_names(kind, target, make, path):
    """However a model is put together, its file has its names and no other input."""
    model = make(kind)
    patch(model, target)
    graph = exported(model, path)

    assert names(graph.input) == [tensor._keras_history.operation.name for tensor in model.inputs]
    assert [name for node in graph.node for name in node.output if ":" in name] == []


def test_two_processes_write_the_same_bytes(tmp_path):
    """Nothing of time, place or process is in a file."""
    first, second = tmp_path / "first.onnx", tmp_path / "second.onnx"
    code = "import sys; from tests.keras import exporting; exporting.write_small_net(sys.argv[1])"
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    subprocess.run([sys.executable, "-c", code, str(second)], check=True, capture_output=True, env=environment)
    write_small_net(first)
    first, second = first.read_bytes(), second.read_bytes()

    assert first == second
    assert str(tmp_path).encode() not in first


def test_layer_normalization_stays(path):
    """A LayerNormalization beside patched norms is none of them, and right."""

    def body(x):
        return layers.LayerNormalization(name="layer")(layers.BatchNormalization(name="batch")(layers.Conv2D(4, 1)(x)))

    model = image_model(body)
    patch(model, SwitchNorm())
    report = to_onnx(model, path)

    assert report.verdict
    assert set(report.kept) == {"batch"}
