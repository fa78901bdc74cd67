"""Files of Keras models without an example: what they say of their inputs is drawn as they take it."""

import keras
import numpy as np
import pytest
from keras import layers

import normswap
from normswap.errors import InputError, UnsupportedError

from ..helpers import exactly
from .exporting import settled

pytestmark = pytest.mark.skipif(keras.backend.backend() == "jax", reason="JAX models are not exported")


def behind(x):
    """Return a dense layer and a norm behind ``x``, averaged over what is no batch and no channel."""
    y = layers.BatchNormalization()(layers.Dense(8)(x))
    return layers.GlobalAveragePooling1D()(y) if len(y.shape) > 2 else y


def tokens(dtype):
    ids = keras.Input((7,), dtype=dtype, name="ids")
    return keras.Model(ids, behind(layers.Embedding(50, 8)(ids)))


def beside():
    ids, x = keras.Input((7,), dtype="int64", name="ids"), keras.Input((3,), name="x")
    y = layers.GlobalAveragePooling1D()(layers.Embedding(50, 8)(ids))
    return keras.Model([ids, x], behind(layers.Concatenate()([y, x])))


def categories():
    ids = keras.Input((4,), dtype="int32", name="ids")
    return keras.Model(ids, behind(layers.CategoryEncoding(num_tokens=6, output_mode="multi_hot")(ids)))


def two_tables():
    ids, kinds = (keras.Input((7,), dtype="int32", name=name) for name in ("ids", "kinds"))
    y = layers.Concatenate()([layers.Embedding(50, 8)(ids), layers.Embedding(5, 8)(kinds)])
    return keras.Model([ids, kinds], behind(y))


def masked():
    x, mask = keras.Input((6, 4), name="x"), keras.Input((6,), dtype="bool", name="mask")
    return keras.Model([x, mask], behind(x * keras.ops.cast(mask, "float32")[..., None]))


def pairs():
    x = keras.Input((6,))
    y = keras.ops.reshape(behind(x), (-1, 2, 8))
    return keras.Model(x, y[:, 0] - y[:, 1])


def images():
    x = keras.Input((16, 3), dtype="uint8", name="x")
    return keras.Model(x, behind(layers.Rescaling(1 / 255)(x)))


@pytest.mark.parametrize(
    ("build", "coverage"),
    [
        (lambda: tokens("int32"), [50]),
        (lambda: tokens("uint8"), [50]),
        (lambda: tokens("float32"), [50]),
        (beside, [50]),
        (categories, [6]),
        (two_tables, [50, 5]),
        (masked, []),
        (pairs, []),
        (images, []),
    ],
    ids=["int32", "uint8", "float ids", "beside", "categories", "two tables", "mask", "pairs", "images"],
)
def test_inputs_of_every_type(build, coverage, tmp_path):
    """A model is planned, patched, exported and verified by what it says; all rows of its tables are in the proof."""
    model = settled(build())
    assert normswap.plan(model, "sn").having("replace")
    normswap.patch(model, "sn")
    verdict = normswap.to_onnx(model, tmp_path / "m.onnx").verdict

    for found in (verdict, normswap.verify(model, tmp_path / "m.onnx")):
        assert found
        assert sorted(found.coverage.values()) == sorted((rows, rows) for rows in coverage)


def test_what_cannot_be_drawn(tmp_path):
    """A model that takes none of the numbers drawn is refused with its inputs and the way out."""

    class Above(layers.Layer):
        def compute_output_spec(self, x):
            return keras.KerasTensor(x.shape, "float32")

        def call(self, x):
            if not keras.tree.is_nested(x) and hasattr(x, "numpy") and not (x.numpy() > 9).all():
                raise ValueError("years begin at 10")
            return keras.ops.cast(x, "float32")

    years = keras.Input((1,), dtype="int32", name="years")
    model = keras.Model(years, behind(Above()(years)))
    message = "expected an `example`, since the model takes no numbers drawn for years (batch, 1): years begin at 10"
    with pytest.raises(InputError, match=exactly(message)):
        normswap.to_onnx(model, tmp_path / "m.onnx")


def test_lookups_are_refused(tmp_path):
    """A table of numbers is in no file, which is said with the layer's name."""
    number = keras.Input((1,), dtype="int64")
    found = layers.IntegerLookup(vocabulary=[10, 20, 30], output_mode="one_hot", name="lookup")(number)
    message = (
        "expected layers that compute with numbers, received lookup, a IntegerLookup with a table that no ONNX file "
        "has; look up before the model, and export one of the layers behind it"
    )
    with pytest.raises(UnsupportedError, match=exactly(message)):
        normswap.to_onnx(keras.Model(number, behind(found)), tmp_path / "m.onnx")


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="text is TensorFlow's")
class TestText:
    def build(self, reader):
        text = keras.Input((1,), dtype="string", name="text")
        return keras.Model(text, behind(reader(text)))

    def test_is_patched_and_measured(self):
        """A model that reads text is planned, patched, measured and calibrated on an example of text."""
        model = settled(self.build(layers.StringLookup(vocabulary=["a", "b"], output_mode="one_hot")))
        text = np.array([["a"], ["b"], ["c"]] * 8)
        report = normswap.patch(model, "sn", example=text)
        before = report.drift(text)[-1].rms
        normswap.calibrate(report, [text])

        assert report.drift(text)[-1].rms < before

    def test_is_refused_by_the_export(self, tmp_path):
        """No file reads text: the input is named, with an example and without."""
        model = self.build(layers.Hashing(3, output_mode="one_hot"))
        message = "expected inputs of numbers, received text of text; export the model behind what reads it"
        for example in (None, np.array([["a"], ["b"]])):
            with pytest.raises(UnsupportedError, match=exactly(message)):
                normswap.to_onnx(model, tmp_path / "m.onnx", example=example)
