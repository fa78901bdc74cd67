"""Names, outputs and dimensions of exported Keras models: the user's own, each its own value."""

from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import onnx
import pytest
from keras import layers

import normswap
from normswap.errors import InputError, UnsupportedError

from ..helpers import exactly


@dataclass
class Answer:
    logits: Any
    hidden: Any = None


class Opaque:
    pass


class Body(keras.Model):
    """A convolution and a norm; ``answer`` makes what the model returns of what they compute."""

    def __init__(self, answer=lambda y, x: y):
        super().__init__()
        self.conv, self.bn = layers.Conv2D(4, 1, name="conv"), layers.BatchNormalization(name="bn")
        self.answer = answer

    def call(self, x):
        return self.answer(self.bn(self.conv(x)), x)


@pytest.fixture
def x():
    return np.random.default_rng(0).standard_normal((2, 4, 4, 3)).astype(np.float32)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "m.onnx"


def exported(model, path, *example, **options):
    """Return the report of a verified export of a model, called first, and the file's output names."""
    model(*example)
    report = normswap.to_onnx(model, path, example=example, **options)
    assert report.verdict or not options.get("check", True)
    return report, [value.name for value in onnx.load(path).graph.output]


class TestOutputs:
    @pytest.mark.parametrize(
        ("answer", "names"),
        [
            (lambda y, x: {"a": y, "b": y}, ["a", "b"]),
            (lambda y, x: (y, y, x), ["output_0", "output_1", "output_2"]),
            (lambda y, x: {"x": y}, ["x_2"]),
            (lambda y, x: {"a": [y], "a/0": y * 2.0}, ["a/0_2", "a/0"]),
            (lambda y, x: Answer(y, y * 2.0), ["logits", "hidden"]),
            (lambda y, x: (y, Answer(y), None), ["output_0", "1/logits"]),
            (lambda y, x: (y, keras.ops.mean(keras.ops.square(y))), ["output_0", "output_1"]),
            (lambda y, x: (y, 3), ["output_0", "output_1"]),
        ],
    )
    def test_each_is_a_value_of_its_own(self, path, x, answer, names):
        """One tensor under several names, an input, fields, single numbers: all are in the file, and proven."""
        report, outputs = exported(Body(answer), path, x)

        assert outputs == names
        assert {check.output for check in report.verdict.checks} == set(names)

    def test_one_layer_under_two_names(self, path):
        """A functional model may return one layer's output twice."""
        image = keras.Input((4, 4, 3), name="image")
        y = layers.BatchNormalization(name="norm")(layers.Conv2D(4, 1)(image))
        assert exported(keras.Model(image, [y, y]), path, np.zeros((2, 4, 4, 3), np.float32))[1] == ["norm", "norm_2"]

    def test_a_shape_that_the_framework_lost(self, path, x):
        """Its rank is that of what the model returns."""

        class Net(Body):
            def call(self, x):
                y = super().call(x)
                return keras.ops.reshape(y, keras.ops.shape(y)) if keras.backend.backend() != "tensorflow" else lost(y)

        def lost(y):
            import tensorflow as tf

            return tf.reshape(y, tf.shape(y)[: tf.rank(y)])

        exported(Net(), path, x)
        assert len(onnx.load(path).graph.output[0].type.tensor_type.shape.dim) == 4

    def test_what_is_no_tensor_is_refused(self, path, x):
        """It is named by its type and place."""
        message = (
            "expected a model that returns tensors, in tuples, lists, mappings or dataclasses, received Opaque as "
            "output 1; return the tensors in it"
        )
        with pytest.raises(UnsupportedError, match=exactly(message)):
            exported(Body(lambda y, x: (y, Opaque())), path, x)


def test_a_layer_called_like_an_input(path, x):
    """The input keeps its name, and the layer's value gets another."""

    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.inner, self.norm = layers.Conv2D(4, 1, name="x"), layers.BatchNormalization(name="output")

        def call(self, x):
            return self.norm(keras.ops.relu(self.inner(x)))

    report, outputs = exported(Net(), path, x)
    assert (list(report.inputs), outputs) == (["x"], ["output"])


def test_tokens_of_a_model_written_as_code(path):
    """Whole numbers stay whole numbers."""

    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.table, self.norm = layers.Embedding(50, 8), layers.BatchNormalization()

        def call(self, tokens):
            return self.norm(self.table(tokens))

    exported(Net(), path, np.arange(14, dtype=np.int32).reshape(2, 7))
    assert onnx.load(path).graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.INT32


def test_states_are_refused(path):
    """A file starts anew with every call, which is said before the export."""
    model = keras.Sequential([keras.Input((5, 3), batch_size=2), layers.LSTM(4, stateful=True, name="memory")])
    message = (
        "expected layers that start anew with every call, as a file does, received memory with stateful=True; build it "
        "with stateful=False"
    )
    with pytest.raises(UnsupportedError, match=exactly(message)):
        normswap.to_onnx(model, path)
    assert not path.exists()


def test_a_batch_that_the_model_fixes_is_the_users_own(path, x):
    """The report says at what it is fixed."""

    def stacked(y, x):
        return keras.ops.stack([keras.ops.mean(y[index], (0, 1)) for index in range(y.shape[0])])

    report, _ = exported(Body(stacked), path, x[:1])
    assert report.inputs == {"x": [1, 4, 4, 3]}
    assert report.notes == ["the model fixes size 0 of x: the file takes 1 alone"]


def test_equal_first_sizes_share_a_name_and_others_have_their_own(path, x):
    """So a model of images and queries takes any number of either."""

    class Net(Body):
        def call(self, x, queries):
            return keras.ops.matmul(keras.ops.mean(super().call(x), (1, 2)), keras.ops.transpose(queries))

    report, _ = exported(Net(), path, x, np.ones((5, 4), np.float32))
    assert report.inputs == {"x": ["batch", 4, 4, 3], "queries": ["queries_dim_0", 4]}


def test_open_steps_of_a_layer_for_each(path):
    """A model that works step by step has its steps fixed, with a note, or open where the file can be right so."""
    frames = keras.Input((None, 4, 4, 3), name="frames")
    model = keras.Model(frames, layers.BatchNormalization()(layers.TimeDistributed(layers.Conv2D(4, 1))(frames)))
    report, _ = exported(model, path, np.ones((2, 5, 4, 4, 3), np.float32), dynamic_size=True)

    assert report.inputs == {"frames": ["batch", 5, 4, 4, 3]}
    assert report.notes == ["the model fixes size 1 of frames: the file takes 5 alone"]


def test_a_failure_names_the_line(path, x):
    """What the framework cannot trace is told with the line of the model's own code."""
    with pytest.raises(UnsupportedError, match=r"\(test_export_interface.py, line \d+\)"):
        exported(Body(lambda y, x: y if keras.ops.sum(y) > 0 else x), path, x)


def test_an_example_the_model_does_not_take_is_told(x, path):
    """By what Keras says, without its colours and its account of the call; nothing is written."""
    model = Body()
    model(x)
    with pytest.raises(
        InputError,
        match=exactly(
            "expected an example the model accepts, received one on which it fails: Input 0 with name 'None' of layer "
            "'conv' is incompatible with the layer: expected axis -1 of input shape to have value 3, but received "
            "input with shape (2, 4, 4, 2)"
        ),
    ):
        normswap.to_onnx(model, path, example=x[..., :2])
    assert not path.exists()
