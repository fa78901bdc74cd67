"""What BatchRenormalization promises beside conformance: its likeness to BatchNormalization, limits and refusals."""

import keras
import numpy as np
import pytest

from normswap.layers.keras import BatchRenormalization

from ..helpers import exactly

pytestmark = [
    pytest.mark.keras,
    # Keras's own saving converts variables this way.
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
]

SHAPES = [((8, 6), -1), ((4, 5, 6), -1), ((4, 6, 5), 1), ((3, 6, 5, 4), 1), ((2, 3, 4, 2, 6), -1)]


def filled(layer, shape):
    """Build a layer with moving statistics and affine parameters that are not the initial ones."""
    layer.build(shape)
    rng = np.random.default_rng(0)
    for name in ("gamma", "beta", "moving_mean", "moving_variance"):
        variable = getattr(layer, name)
        variable.assign(rng.uniform(0.5, 1.5, variable.shape))
    return layer


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
@pytest.mark.parametrize("affine", [{}, {"center": False}, {"scale": False}])
def test_inference_is_batch_normalization(shape, axis, affine):
    """At inference the output equals BatchNormalization's bit for bit."""
    ours, theirs = BatchRenormalization(axis, **affine), keras.layers.BatchNormalization(axis, **affine)
    theirs.build(shape)
    ours.build(shape)
    for variable, other in zip(theirs.weights, ours.weights, strict=False):
        variable.assign(np.random.default_rng(2).uniform(0.5, 1.5, variable.shape))
        other.assign(variable)
    x = np.random.default_rng(1).normal(2.0, 3.0, shape).astype("float32")
    np.testing.assert_array_equal(ours(x), theirs(x))


def test_limits_of_one_and_zero_are_batch_normalization_in_training():
    """With r_max=1 and d_max=0 nothing is corrected, so that training starts as BatchNormalization."""
    x = np.random.default_rng(1).normal(2.0, 3.0, (4, 5, 6)).astype("float32")
    ours = filled(BatchRenormalization(r_max=1.0, d_max=0.0), x.shape)
    theirs = filled(keras.layers.BatchNormalization(), x.shape)
    np.testing.assert_allclose(ours(x, training=True), theirs(x, training=True), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("jit", [False, True])
def test_limits_take_effect_inside_a_compiled_training_function(jit):
    """A schedule that sets the limits changes what an already traced training step computes, with one trace."""
    traces = []

    class Counted(BatchRenormalization):
        def call(self, inputs, training=None, mask=None):
            traces.extend([training] if training else [])
            return super().call(inputs, training=training, mask=mask)

    model = keras.Sequential([keras.Input((6,)), Counted(r_max=1.0, d_max=0.0, momentum=1.0)])
    model.compile(keras.optimizers.SGD(0.0), "mse", jit_compile=jit)
    x = np.random.default_rng(1).normal(2.0, 3.0, (64, 6)).astype("float32")
    corrected = model.train_on_batch(x, x)
    traced = len(traces)
    model.layers[-1].set_limits(100.0, 100.0)
    assert model.train_on_batch(x, x) < corrected / 100  # unclipped, the layer returns its input
    if keras.backend.backend() == "tensorflow":
        assert len(traces) == traced > 0


def limits_of(layer, steps):
    """Return the limits in force in the training calls of these numbers, one column per limit."""
    x = np.random.default_rng(1).normal(size=(8, 2)).astype("float32")
    layer.build(x.shape)
    found = []
    for step in steps:
        layer.step.assign(step)
        layer(x, training=True)
        assert float(layer.step.numpy()) == step + 1
        found.append((float(layer.r_max.numpy()), float(layer.d_max.numpy())))
    return np.array(found)


def test_the_paper_schedule():
    """Plain BatchNorm for 4 % of the run, then r_max to 3 at 31 % and d_max to 5 at 19 %, linearly."""
    layer = BatchRenormalization(schedule="paper", schedule_steps=100)
    found = limits_of(layer, [0, 4, 10, 19, 25, 31, 101])
    np.testing.assert_allclose(found[:, 0], [1, 1, 1 + 2 * 6 / 27, 1 + 2 * 15 / 27, 1 + 2 * 21 / 27, 3, 3], rtol=1e-5)
    np.testing.assert_allclose(found[:, 1], [0, 0, 5 * 6 / 15, 5, 5, 5, 5], rtol=1e-5, atol=1e-6)


def test_the_papers_own_steps():
    """Without a number of steps the paper's: 5,000, then r_max to 3 at 40,000 and d_max to 5 at 25,000."""
    found = limits_of(BatchRenormalization(schedule="paper"), [0, 5000, 15000, 22500, 25000, 40000, 130000])
    np.testing.assert_allclose(found[:, 0], [1, 1, 1 + 2 * 10 / 35, 2, 1 + 2 * 20 / 35, 3, 3], rtol=1e-5)
    np.testing.assert_allclose(found[:, 1], [0, 0, 2.5, 5 * 17.5 / 20, 5, 5, 5], rtol=1e-5)


def test_the_pretrained_schedule():
    """From nothing to 1.25 and 0.5 over the whole run, or to the limits given."""
    found = limits_of(BatchRenormalization(schedule="pretrained", schedule_steps=4), range(6))
    np.testing.assert_allclose(found[:, 0], [1, 1.0625, 1.125, 1.1875, 1.25, 1.25], rtol=1e-6)
    np.testing.assert_allclose(found[:, 1], [0, 0.125, 0.25, 0.375, 0.5, 0.5], rtol=1e-6)
    given = BatchRenormalization(schedule="pretrained", schedule_steps=1, r_max=2.0, d_max=0.0)
    np.testing.assert_allclose(limits_of(given, range(2)), [[1, 0], [2, 0]])


def test_the_sigmoid_schedule():
    """Logistic growth in t = t_delta · step, at the values tabulated for t_delta = 0.001."""
    found = limits_of(BatchRenormalization(schedule="sigmoid"), [0, 1000, 3000, 5000, 10000])
    np.testing.assert_allclose(found[:, 0], [1, 1.73, 2.73, 2.96, 3.00], atol=0.005)
    np.testing.assert_allclose(found[:, 1], [0.001, 0.007, 0.37, 4.08, 5.00], atol=0.005)
    unshifted = limits_of(BatchRenormalization(schedule="sigmoid", d_max=0.0), range(2))
    assert unshifted[:, 1].tolist() == [0, 0]


def test_a_schedule_goes_on_where_a_saved_run_stopped(tmp_path):
    """The count of training calls is in the file; inference does not count."""
    model = keras.Sequential([keras.Input((6,)), BatchRenormalization(schedule="pretrained", schedule_steps=8)])
    model.compile(keras.optimizers.SGD(0.0), "mse")
    x = np.random.default_rng(1).normal(size=(8, 6)).astype("float32")
    for _ in range(5):
        model.train_on_batch(x, x)
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    loaded.predict(x, verbose=0)
    assert float(loaded.layers[-1].step.numpy()) == 5
    loaded.train_on_batch(x, x)
    assert float(loaded.layers[-1].r_max.numpy()) == 1 + 0.25 * 5 / 8


def test_limits_are_saved(tmp_path):
    """The limits in force travel with the weights and the configuration."""
    model = keras.Sequential([keras.Input((6,)), BatchRenormalization()])
    model.layers[-1].set_limits(1.25, 0.5)
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras").layers[-1]
    assert (float(loaded.r_max.numpy()), float(loaded.d_max.numpy())) == (1.25, 0.5)
    assert (loaded.get_config()["r_max"], loaded.get_config()["d_max"]) == (1.25, 0.5)


def test_variables():
    """Names, shapes and order of the variables are what a weights file relies on."""
    layer = BatchRenormalization()
    layer.build((None, 6))
    assert [(v.name, tuple(v.shape), v.trainable) for v in layer.weights] == [
        ("gamma", (6,), True),
        ("beta", (6,), True),
        ("moving_mean", (6,), False),
        ("moving_variance", (6,), False),
        ("r_max", (), False),
        ("d_max", (), False),
    ]


def test_untrainable_means_inference():
    """As in BatchNormalization, an untrainable layer neither uses nor moves with the batch."""
    x = np.random.default_rng(1).normal(size=(8, 6)).astype("float32")
    layer = filled(BatchRenormalization(trainable=False), x.shape)
    before = layer.get_weights()
    np.testing.assert_array_equal(layer(x, training=True), layer(x))
    assert all(map(np.array_equal, layer.get_weights(), before))


def test_masked_timesteps_stay_out_of_the_statistics():
    """A batch with masked timesteps gives the statistics, and outputs, of the batch without them."""
    x = np.random.default_rng(1).normal(size=(2, 4, 6)).astype("float32")
    mask = np.array([[1, 1, 0, 0], [1, 1, 0, 0]], bool)
    masked, short = BatchRenormalization(), BatchRenormalization()
    y = masked(x, training=True, mask=mask)
    np.testing.assert_allclose(y[:, :2], short(x[:, :2], training=True), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(masked.moving_variance, short.moving_variance, rtol=1e-5)


def test_a_mask_of_the_wrong_rank_is_named():
    """The message says which shapes do not fit."""
    message = (
        "expected a mask of the input's shape without its channels, "
        "received mask.shape=(2, 4) for input.shape=(2, 4, 4, 6)"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        BatchRenormalization().call(np.ones((2, 4, 4, 6), "float32"), training=True, mask=np.ones((2, 4), bool))


@pytest.mark.parametrize("training", [False, True])
def test_mixed_precision(training):
    """Half input whose squares overflow is normalized; variables stay float32, output has the compute dtype."""
    layer = BatchRenormalization(dtype="mixed_float16", r_max=1.0, d_max=0.0)
    x = np.random.default_rng(1).normal(0.0, 3000.0, (16, 4)).astype("float32")
    y = layer(x, training=training)
    assert keras.backend.standardize_dtype(y.dtype) == "float16"
    assert {v.dtype for v in layer.weights} == {"float32"}
    assert np.isfinite(y).all()


@pytest.mark.parametrize("shape", [(1, 4), (1, 1, 1, 4)])
def test_a_single_value_per_channel_is_finite(shape):
    """Where BatchNormalization has no variance to divide by, the output is what d makes of it, and finite."""
    layer = filled(BatchRenormalization(), shape)
    y = layer(np.random.default_rng(1).normal(size=shape).astype("float32"), training=True)
    assert np.isfinite(y).all()
    assert all(np.isfinite(w).all() for w in layer.get_weights())


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ((0.5, 1.0), "expected `r_max` of at least 1, received r_max=0.5"),
        ((2.0, -1.0), "expected `d_max` of at least 0, received d_max=-1.0"),
    ],
)
def test_wrong_limits(limits, message):
    """Limits that would exclude no correction at all are refused, at construction and later."""
    with pytest.raises(ValueError, match=exactly(message)):
        BatchRenormalization(r_max=limits[0], d_max=limits[1])
    with pytest.raises(ValueError, match=exactly(message)):
        BatchRenormalization().set_limits(*limits)


def test_limits_set_beside_a_schedule():
    """A layer that sets its own limits refuses others, and says which."""
    layer = BatchRenormalization(schedule="sigmoid", name="brn")
    message = (
        "expected schedule=None for limits set from outside, received schedule='sigmoid' in layer brn; "
        "drop the one or the other"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        layer.set_limits(2.0, 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"schedule": "linear"},
            "expected `schedule` to be None or out of paper, pretrained, sigmoid, received schedule='linear'",
        ),
        (
            {"schedule": "pretrained"},
            "expected `schedule_steps`, the number of training calls in the run, with schedule='pretrained', "
            "received schedule_steps=None",
        ),
        (
            {"schedule": "pretrained", "schedule_steps": 0},
            "expected `schedule_steps`, the number of training calls in the run, with schedule='pretrained', "
            "received schedule_steps=0",
        ),
        ({"schedule": "sigmoid", "t_delta": 0}, "expected `t_delta` above 0, received t_delta=0"),
        ({"compat": "keras"}, "expected `compat` to be None or 'titu1994', received compat='keras'"),
    ],
)
def test_wrong_arguments(options, message):
    """A wrong argument is named with what was expected."""
    with pytest.raises(ValueError, match=exactly(message)):
        BatchRenormalization(**options)
