"""BatchRenormalization against its formula written out in float64 NumPy, and against BatchNormalization."""

import re

import keras
import numpy as np
import pytest

from normswap.layers.keras import BatchRenormalization

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


def by_formula(x, layer, r_max, d_max):
    """Return the training output, the moved mean and the moved variance, straight from algorithm 1."""
    x = np.moveaxis(x.astype(np.float64), layer.axis, -1)
    axes = tuple(range(x.ndim - 1))
    gamma, beta, mu, v = (
        getattr(layer, n).numpy().astype(np.float64) for n in ("gamma", "beta", "moving_mean", "moving_variance")
    )
    mean, sigma = x.mean(axes), np.sqrt(x.var(axes) + layer.epsilon)
    moving = np.sqrt(v + layer.epsilon)
    r = np.clip(sigma / moving, 1 / r_max, r_max)
    d = np.clip((mean - mu) / moving, -d_max, d_max)
    y = gamma * ((x - mean) / sigma * r + d) + beta
    moved = layer.momentum * moving + (1 - layer.momentum) * sigma
    moved_mean = layer.momentum * mu + (1 - layer.momentum) * mean
    return np.moveaxis(y, -1, layer.axis), moved_mean, moved**2 - layer.epsilon


@pytest.mark.parametrize("limits", [(1.0, 0.0), (1.5, 0.5), (100.0, 100.0)])
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_training_computes_the_formula(shape, axis, limits):
    """Any rank and axis: output and moved statistics are those of the paper, whatever the limits."""
    layer = filled(BatchRenormalization(axis, 0.75, r_max=limits[0], d_max=limits[1]), shape)
    x = np.random.default_rng(1).normal(2.0, 3.0, shape).astype("float32")
    y, mean, var = by_formula(x, layer, *limits)
    np.testing.assert_allclose(layer(x, training=True), y, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(layer.moving_mean, mean, rtol=1e-5)
    np.testing.assert_allclose(layer.moving_variance, var, rtol=1e-5)


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


def test_no_gradient_flows_through_the_correction():
    """Unclipped, r and d cancel the normalization, yet the gradient is BatchNormalization's scaled by r."""
    tf = pytest.importorskip("tensorflow")
    if keras.backend.backend() != "tensorflow":
        pytest.skip("takes gradients with TensorFlow")
    x = tf.constant(np.random.default_rng(1).normal(2.0, 3.0, (8, 6)).astype("float32"))
    dy = np.random.default_rng(2).normal(size=(8, 6)).astype("float32")
    ours = filled(BatchRenormalization(r_max=1e6, d_max=1e6), x.shape)
    theirs = filled(keras.layers.BatchNormalization(), x.shape)
    r = np.sqrt(np.var(x, 0) + 1e-3) / np.sqrt(ours.moving_variance.numpy() + 1e-3)
    gradients = []
    for layer in (ours, theirs):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, training=True)
        gradients.append(tape.gradient(y, x, dy).numpy())
    np.testing.assert_allclose(gradients[0], gradients[1] * r, rtol=1e-3, atol=1e-5)


def test_limits_take_effect_inside_a_compiled_training_function():
    """A schedule that sets the limits changes what an already traced training step computes."""
    model = keras.Sequential([keras.Input((6,)), BatchRenormalization(r_max=1.0, d_max=0.0, momentum=1.0)])
    model.compile(keras.optimizers.SGD(0.0), "mse")
    x = np.random.default_rng(1).normal(2.0, 3.0, (64, 6)).astype("float32")
    corrected = model.train_on_batch(x, x)
    model.layers[-1].set_limits(100.0, 100.0)
    assert model.train_on_batch(x, x) < corrected / 100  # unclipped, the layer returns its input


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
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
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
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        BatchRenormalization(r_max=limits[0], d_max=limits[1])
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        BatchRenormalization().set_limits(*limits)
