"""What a file of a Keras model is proved on, and what an example of one may be."""

import keras
import numpy as np
import onnx
import pytest
from keras import layers, ops
from onnx import numpy_helper

import normswap
from normswap import Inputs

RNG = np.random.default_rng(0)
IMAGES = RNG.random((3, 8, 8, 3)).astype(np.float32) + np.float32(0.1)
GAIN = RNG.random((3, 8)).astype(np.float32)
IDS = (np.arange(18).reshape(3, 6) + 32).astype(np.int32)


def scores(x):
    """Return a head of scores behind a convolution and a norm."""
    norm = layers.BatchNormalization(moving_mean_initializer="random_normal")
    return layers.GlobalAveragePooling2D()(norm(layers.Conv2D(8, 3, padding="same")(x)))


def of_a_mapping():
    """A model whose inputs are a mapping, which Keras takes in the order of the alphabet."""
    image, gain = keras.Input((8, 8, 3), name="image"), keras.Input((8,), name="gain")
    return keras.Model({"image": image, "gain": gain}, layers.Dense(4)(scores(image) * gain))


def of_a_list():
    """A model whose inputs are a list."""
    image, gain = keras.Input((8, 8, 3), name="image"), keras.Input((8,), name="gain")
    return keras.Model([image, gain], layers.Dense(4)(scores(image) * gain))


def of_one():
    """A model of one input, which is above zero."""
    image = keras.Input((8, 8, 3))
    return keras.Model(image, layers.Dense(4)(scores(ops.log(image))))


def of_bytes():
    """A model of images in bytes."""
    image = keras.Input((8, 8, 3), dtype="uint8")
    return keras.Model(image, layers.Dense(4)(scores(ops.cast(image, "float32") / 255)))


def of_ids():
    """A model of token ids."""
    ids = keras.Input((6,), dtype="int32")
    x = layers.BatchNormalization()(layers.Conv1D(8, 3)(layers.Embedding(50, 8, name="table")(ids)))
    return keras.Model(ids, layers.Dense(4)(layers.GlobalAveragePooling1D()(x)))


class Keywords(keras.Model):
    """A model that takes arguments by keyword alone."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = layers.Conv2D(4, 3), layers.BatchNormalization()

    def call(self, *, image, gain=None, double=False):
        """Return maps, which a gain multiplies, and a flag doubles."""
        x = self.norm(self.conv(image)) * gain[:, None, None, :4]
        return x * 2 if double else x


def of_keywords():
    """A model of keywords, called once."""
    model = Keywords()
    model(image=IMAGES, gain=GAIN)
    return model


CASES = {
    "a mapping": (of_a_mapping, {"image": IMAGES, "gain": GAIN}),
    "a mapping in another order": (of_a_mapping, {"gain": GAIN, "image": IMAGES}),
    "one mapping": (of_a_mapping, Inputs({"image": IMAGES, "gain": GAIN})),
    "a tuple": (of_a_list, (IMAGES, GAIN)),
    "a list": (of_a_list, [IMAGES, GAIN]),
    "a list in a tuple": (of_a_list, ([IMAGES, GAIN],)),
    "by the layers' names": (of_a_list, {"gain": GAIN, "image": IMAGES}),
    "doubles above zero": (of_one, IMAGES.astype(np.float64)),
    "a list of one": (of_one, [IMAGES]),
    "bytes": (of_bytes, (IMAGES * 200).astype(np.uint8)),
    "ids": (of_ids, IDS),
    "long ids": (of_ids, IDS.astype(np.int64)),
    "keywords alone": (of_keywords, {"gain": GAIN, "image": IMAGES, "double": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_examples_of_every_form(case, tmp_path):
    """One example serves plan, patch, drift, export and verification."""
    build, example = CASES[case]
    keras.utils.set_random_seed(0)
    model = build()
    assert normswap.plan(model, "gn", example=example).having("replace")
    report = normswap.patch(model, "gn", example=example)
    assert report.drift(example)
    written = normswap.to_onnx(report.model, tmp_path / "m.onnx", example=example, data=[example])

    assert {"example", "data"} <= {check.inputs for check in written.verdict.checks}
    assert normswap.verify(report.model, tmp_path / "m.onnx", example=example)
    assert normswap.verify(report.model, tmp_path / "m.onnx", data=[example])


@pytest.mark.parametrize("row", [3, 40])
def test_every_row_of_a_table_is_in_the_proof(row, tmp_path):
    """One wrong row of an embedding fails, whether the example reaches it or not."""
    keras.utils.set_random_seed(0)
    model = of_ids()
    written = normswap.to_onnx(model, tmp_path / "m.onnx", example=IDS)
    assert written.verdict.coverage == {"table": (50, 50)}

    proto = onnx.load(tmp_path / "m.onnx")
    table = next(tensor for tensor in proto.graph.initializer if tensor.dims[:] == [50, 8])
    array = numpy_helper.to_array(table).copy()
    array[row] = 0
    table.CopyFrom(numpy_helper.from_array(array, table.name))
    onnx.save(proto, tmp_path / "m.onnx")
    assert not normswap.verify(model, tmp_path / "m.onnx")
    assert not normswap.verify(model, tmp_path / "m.onnx", example=IDS)
