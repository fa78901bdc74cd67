"""Looking at a model changes nothing of it, whatever state its calls move."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import normswap
from normswap.convert.targets import BatchRenorm
from normswap.errors import NormswapError
from normswap.frameworks.keras import inference

from ..helpers import exactly

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)

NOTE = "called with training=True: batch statistics at inference, the answer depends on the batch"


@keras.saving.register_keras_serializable(package="normswap-tests")
class Trains(keras.Model):
    """A model that calls its norm as in training, always, and counts its calls."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first = layers.Conv2D(4, 3, name="first")
        self.norm = layers.BatchNormalization(name="norm")
        self.head = layers.Dense(3, name="head")
        self.calls = self.add_weight(shape=(), initializer="zeros", trainable=False, name="calls")

    def call(self, inputs, training=None):
        """Compute the logits."""
        self.calls.assign_add(1.0)
        x = self.first(inputs)
        x = self.norm(x, training=True)
        return self.head(ops.max(x, (1, 2)))


@keras.saving.register_keras_serializable(package="normswap-tests")
class Noise(layers.Layer):
    """A layer that is random at inference."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seed = keras.random.SeedGenerator(1)

    def call(self, inputs):
        """Add noise."""
        return inputs + keras.random.normal(ops.shape(inputs), seed=self.seed)


def trains(images):
    """Return a built model that calls its norm as in training."""
    model = Trains()
    model(images)
    return model


def noisy(images):
    """Return a model that is random at inference."""
    inputs = keras.Input((8, 8, 3))
    return keras.Model(inputs, layers.BatchNormalization()(Noise()(inputs)))


def stateful(images):
    """Return a model whose recurrent layer goes on from where its last call ended."""
    inputs = keras.Input((8, 8, 3), batch_size=4)
    rows = layers.Reshape((8, 24))(inputs)
    return keras.Model(inputs, layers.BatchNormalization()(layers.LSTM(3, stateful=True)(rows)))


def state(model):
    """Return the values of all that a model holds."""
    return [np.array(ops.convert_to_numpy(each)) for each in model.variables]


LOOKS = {
    "plan": lambda model, x, path: normswap.plan(model, "gn", example=x),
    "drift": lambda model, x, path: normswap.patch(model, "brn", example=x).drift(x),
    "calibrate": lambda model, x, path: normswap.calibrate(normswap.patch(model, "gn", example=x), [x] * 2),
    "way back": lambda model, x, path: normswap.plan(model, "bn", example=x),
}


@pytest.mark.backends
@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("build", [trains, noisy, stateful])
def test_a_look_gives_all_state_back(build, look, images, tmp_path):
    """Statistics, counters, random and recurrent states are after a look what they were, whatever the call moves."""
    model = build(images)
    before = {each.path: value for each, value in zip(model.variables, state(model), strict=True)}
    inputs = np.concatenate([images * number for number in range(1, 5)]) if look == "calibrate" else images
    if look == "calibrate" and build is stateful:
        pytest.skip("takes four images at a time")
    try:
        LOOKS[look](model, 100 * inputs, tmp_path / "m.onnx")
    except NormswapError:
        assert build is noisy  # and refused
    after = {each.path: value for each, value in zip(model.variables, state(model), strict=True)}
    learned = {each.path for each in model.trainable_variables}
    kept = set(before) & set(after) - learned
    assert kept
    assert [path for path in kept if not np.array_equal(before[path], after[path])] == []


def test_export_and_verification_give_all_state_back(images, tmp_path):
    """A model that moves its statistics at inference is exported as it computes, and they are what they were."""
    model = trains(images)
    before = state(model)
    report = normswap.to_onnx(model, tmp_path / "m.onnx", example=images)
    assert report.verdict.passed
    assert normswap.verify(model, tmp_path / "m.onnx", example=images).passed
    assert all(map(np.array_equal, state(model), before))


@pytest.mark.backends
def test_what_is_random_differs_within_one_look(images):
    """Two calls within a look draw other numbers, so that a random model is known for one; the state comes back."""
    model = noisy(images)
    before = state(model)
    with inference(model):
        with inference(model):
            first = ops.convert_to_numpy(model(images, training=False))
        with inference(model):
            second = ops.convert_to_numpy(model(images, training=False))
    assert not np.array_equal(first, second)
    assert all(map(np.array_equal, state(model), before))


@pytest.mark.backends
def test_a_norm_that_trains_at_inference_is_noted(images):
    """The plan says of a norm that code calls as in training that the answer depends on the batch."""
    plan = normswap.plan(trains(images), BatchRenorm(), example=images)
    assert [each.note for each in plan.decisions] == [NOTE]


@pytest.mark.backends
def test_a_graph_that_trains_a_norm_is_noted_without_an_example():
    """A graph tells by itself that it calls a norm as in training, and a frozen norm computes as ever."""
    inputs = keras.Input((8, 8, 3))
    frozen = layers.BatchNormalization(name="frozen", trainable=False)
    x = frozen(layers.BatchNormalization(name="norm")(inputs, training=True), training=True)
    plan = normswap.plan(keras.Model(inputs, x), BatchRenorm())
    assert [(each.site.name, each.note) for each in plan.decisions] == [("norm", NOTE), ("frozen", "")]


def test_a_refused_export_gives_random_states_back(images, tmp_path):
    """Where a random model cannot be exported its random state is what it was."""
    model = noisy(images)
    before = state(model)
    with pytest.raises(NormswapError, match=exactly(RANDOM)):
        normswap.to_onnx(model, tmp_path / "m.onnx", example=images)
    assert all(map(np.array_equal, state(model), before))


RANDOM = (
    "expected operations that tf2onnx can write in ONNX, received StatelessRandomNormalV2; express them through "
    "other keras.ops"
)
