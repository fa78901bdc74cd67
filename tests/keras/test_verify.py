"""Verification of ONNX files against Keras models: what Keras models know of their inputs is held against the file."""

import keras
import numpy as np
import onnx
import pytest
from onnx import helper

import normswap
from normswap.verification.stored import load_reference
from normswap.verification.verify import verify_against


def network(height=None, width=None, name="img"):
    """A network that knows its inputs: channels last, height and width free unless given."""
    keras.utils.set_random_seed(0)
    x = keras.Input((height, width, 3), name=name)
    y = keras.layers.Conv2D(4, 3, padding="same", name="conv")(x)
    y = keras.layers.BatchNormalization(name="bn")(y)
    y = keras.layers.GlobalAveragePooling2D(name="pool")(keras.ops.relu(y))
    return keras.Model(x, keras.layers.Dense(2, name="scores")(y))


@pytest.fixture
def written(tmp_path):
    """A patched network of 8 by 8 pixels and its file."""
    model = normswap.patch(network(8, 8), "sn").model
    normswap.to_onnx(model, tmp_path / "m.onnx", check=False)
    return model, tmp_path / "m.onnx"


def test_a_good_file_passes(written):
    """Every batch size and scale passes."""
    verdict = normswap.verify(*written)

    assert verdict, verdict.explain("m.onnx")
    assert {check.batch for check in verdict.checks} == {1, 2, 5, 3}


def test_free_sizes_are_held_at_two_sizes(tmp_path):
    """A file whose height and width are free is held to the model at two sizes."""
    model = normswap.patch(network(), "brn").model
    normswap.to_onnx(model, tmp_path / "m.onnx", example=np.ones((2, 12, 12, 3), np.float32), check=False)
    proto = onnx.load(tmp_path / "m.onnx")
    for size, free in zip(list(proto.graph.input[0].type.tensor_type.shape.dim)[1:3], ("height", "width"), strict=True):
        size.dim_param = free
    del proto.graph.value_info[:]
    onnx.save(proto, tmp_path / "m.onnx")
    verdict = normswap.verify(model, tmp_path / "m.onnx", save_reference=tmp_path / "r.npz")

    assert verdict, verdict.explain("m.onnx")
    shapes = {batch.arrays["img"].shape for batch in load_reference(tmp_path / "r.npz").batches}
    assert shapes == {(1, 64, 64, 3), (2, 77, 101, 3), (5, 64, 64, 3), (3, 77, 101, 3)}


def test_inputs_of_another_name_fail(written):
    """Inputs that are not the model's by name fail before anything is run."""
    verdict = normswap.verify(network(8, 8, name="picture"), written[1])

    assert verdict.problems == ("expected the inputs picture, received img",)


def test_inputs_of_another_shape_fail(written):
    """So do inputs of a size that the model does not take."""
    verdict = normswap.verify(network(8, 9), written[1])

    assert verdict.problems == (
        "expected the input img of shape (8, 9, 3) without the batch, received img (batch, 8, 8, 3)",
    )


def test_inputs_the_model_has_not_fail(written):
    """An input the exporter made of a constant is an input the model does not have."""
    proto = onnx.load(written[1])
    proto.graph.input.append(helper.make_tensor_value_info("mean", onnx.TensorProto.FLOAT, [3]))
    onnx.save(proto, written[1])

    assert normswap.verify(*written).problems == ("expected the inputs img, received img, mean",)


def test_a_reference(written, tmp_path):
    """What a Keras model answers is saved and gives the same verdict without it."""
    verdict = normswap.verify(*written, save_reference=tmp_path / "r.npz")

    assert verify_against(tmp_path / "r.npz", written[1]) == verdict
