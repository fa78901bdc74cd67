"""Faults in rows of tables, in one output of several, and in what a Keras file declares of its sizes: all are found."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import normswap

from ..planting import SPOILT, behind, dropped, edited, resized, spoil_rows, swapped, twice

pytestmark = [
    pytest.mark.keras,
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
]

RNG = np.random.default_rng(0)
IDS = np.arange(12, dtype=np.int32).reshape(2, 6)


def patched(model, target, example):
    """Give the norms statistics, and patch them."""
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.moving_mean.assign(RNG.normal(size=layer.moving_mean.shape))
            layer.moving_variance.assign(RNG.uniform(0.5, 2, layer.moving_variance.shape))
    normswap.patch(model, target, example=example)
    return model


@pytest.mark.parametrize("how", SPOILT)
def test_rows_are_compared_whether_reached_or_not(tmp_path, how):
    """Rows other than the model's are found and named, be they among those that the proof reaches or not."""
    ids = keras.Input((6,), dtype="int32")
    x = layers.BatchNormalization()(layers.Embedding(3000, 8, name="table")(ids))
    model = patched(keras.Model(ids, layers.Dense(4)(layers.GlobalAveragePooling1D()(x))), "brn", IDS)
    normswap.to_onnx(model, tmp_path / "m.onnx", example=IDS)
    edited(tmp_path / "m.onnx", spoil_rows, table=(3000, 8), rows=[3, 2999], how=how)
    assert normswap.verify(model, tmp_path / "m.onnx", example=IDS).problems == (
        "expected the rows of table, received others in 2 of 3000: 3, 2999",
    )


X = RNG.normal(size=(2, 12, 20, 3)).astype(np.float32)
NAMES = ["maps", "scores/0", "scores/1", "mean"]


@pytest.fixture
def heads(tmp_path):
    """A model of several outputs, and its file, whose height and width are open."""
    keras.utils.set_random_seed(0)
    image = keras.Input((None, None, 3), name="x")
    maps = layers.BatchNormalization()(layers.Conv2D(8, 3)(image))
    scores = [layers.Dense(4)(layers.GlobalAveragePooling2D()(maps)) for _ in range(2)]
    model = patched(keras.Model(image, {"maps": maps, "scores": scores, "mean": ops.mean(maps)}), "sn", X)
    written = normswap.to_onnx(model, tmp_path / "m.onnx", example=X, dynamic_size=True)
    assert sorted({check.output for check in written.verdict.checks}) == sorted(NAMES)
    return model, tmp_path / "m.onnx"


@pytest.mark.parametrize("name", NAMES)
def test_one_output_of_several(heads, name):
    """Any one output that is larger by a thousandth fails, and is named; one that is not there is missed."""
    model, path = heads
    verdict = normswap.verify(model, edited(path, behind, name=name, operator="Mul", operand=1.001))
    assert {check.output for check in verdict.checks if not check.passed} == {name}
    (problem,) = normswap.verify(model, edited(path, dropped, name=name)).problems
    assert problem.startswith("expected the outputs ")


def test_outputs_swapped_or_twice(heads, tmp_path):
    """Outputs of one shape that are each other, or one of them both, fail."""
    model, path = heads
    (tmp_path / "other.onnx").write_bytes(path.read_bytes())
    verdict = normswap.verify(model, edited(path, swapped, names=("scores/0", "scores/1")))
    assert {check.output for check in verdict.checks if not check.passed} == {"scores/0", "scores/1"}
    verdict = normswap.verify(model, edited(tmp_path / "other.onnx", twice, name="scores/1", other="scores/0"))
    assert {check.output for check in verdict.checks if not check.passed} == {"scores/1"}


@pytest.mark.parametrize(
    ("sizes", "received"),
    [
        ({"batch": 2}, "2, x_dim_1, x_dim_2, 3"),
        ({"x_dim_2": 20}, "batch, x_dim_1, 20, 3"),
        ({"x_dim_2": "x_dim_1"}, "batch, x_dim_1, x_dim_1, 3"),
        ({"x_dim_1": "x_dim_2", "x_dim_2": "x_dim_1"}, "batch, x_dim_2, x_dim_1, 3"),
    ],
)
def test_inputs_take_what_they_were_exported_with(heads, sizes, received):
    """A size that was open and is fixed, or is called like another, fails, though the file computes the same."""
    model, path = heads
    (problem, *_) = normswap.verify(model, edited(path, resized, sizes=sizes)).problems
    assert problem in (
        f"expected the input x (batch, x_dim_1, x_dim_2, 3), as which it was exported, received ({received})",
        f"expected the input x of shape (None, None, 3) without the batch, received x ({received})",
    )


def test_a_mean_near_zero_of_large_inputs(tmp_path):
    """One number that nearly cancels does not fail a correct file, on inputs a hundred times as large."""
    keras.utils.set_random_seed(0)
    image = keras.Input((16, 16, 3))
    maps = layers.BatchNormalization()(layers.Conv2D(16, 3)(image))
    model = patched(keras.Model(image, [maps, ops.mean(maps)]), "brn", RNG.normal(size=(3, 16, 16, 3)))
    data = [(100 * RNG.normal(size=(3, 16, 16, 3))).astype(np.float32) for _ in range(30)]
    verdict = normswap.to_onnx(model, tmp_path / "m.onnx", example=data[0], data=data).verdict
    assert verdict
