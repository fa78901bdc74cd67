"""SwitchNormalization against its formula written out in float64 NumPy."""

import re

import keras
import numpy as np
import pytest

from normswap.layers.keras import SwitchNormalization

pytestmark = [
    pytest.mark.keras,
    # Keras's own saving converts variables this way.
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
]

SHAPES = [((4, 6), -1), ((4, 5, 6), -1), ((4, 6, 5), 1), ((3, 5, 4, 6), -1), ((3, 6, 5, 4), 1), ((2, 3, 4, 2, 6), 4)]


def softmax(logits):
    """Return the gates for ``logits``."""
    return np.exp(logits) / np.exp(logits).sum()


def filled(layer, shape, seed=0):
    """Build a layer and give every variable a value that tells it from the others."""
    layer.build(shape)
    rng = np.random.default_rng(seed)
    for variable in layer.weights:
        variable.assign(rng.uniform(0.5, 1.5, variable.shape))
    return layer


def by_formula(x, layer, training):
    """Return the output and the batch statistics, straight from the definition."""
    x = np.moveaxis(x.astype(np.float64), layer.axis, 1)
    spatial, channels = tuple(range(2, x.ndim)), (1, -1, *[1] * (x.ndim - 2))
    layer_axes = tuple(range(1, x.ndim))
    means = [x.mean(layer_axes, keepdims=True)]
    variances = [x.var(layer_axes, keepdims=True)]
    own = (x.mean(spatial, keepdims=True), x.var(spatial, keepdims=True)) if spatial else (means[0], variances[0])
    means.insert(0, own[0])
    variances.insert(0, own[1])
    batch = x.mean((0, *spatial)), x.var((0, *spatial))
    if layer.batch_statistics != "none":
        live = training and layer.batch_statistics == "moving"
        moving = layer.moving_mean.numpy(), layer.moving_variance.numpy()
        for statistics, values in zip((means, variances), batch if live else moving, strict=True):
            statistics.append(values.reshape(channels))
    mean = sum(w * m for w, m in zip(softmax(layer.mean_weight.numpy()), means, strict=True))
    var = sum(w * v for w, v in zip(softmax(layer.var_weight.numpy()), variances, strict=True))
    y = (x - mean) / np.sqrt(var + layer.epsilon)
    y = y * layer.gamma.numpy().reshape(channels) + layer.beta.numpy().reshape(channels)
    return np.moveaxis(y, 1, layer.axis), *batch


@pytest.mark.parametrize("batch_statistics", ["moving", "frozen", "none"])
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
@pytest.mark.parametrize("training", [False, True])
def test_computes_the_formula(shape, axis, batch_statistics, training):
    """Any rank and axis, in training and at inference: the output is the paper's formula."""
    layer = filled(SwitchNormalization(axis=axis, batch_statistics=batch_statistics), shape)
    x = np.random.default_rng(1).normal(2.0, 3.0, shape).astype("float32")
    expected, _, _ = by_formula(x, layer, training)
    np.testing.assert_allclose(layer(x, training=training), expected, rtol=1e-5, atol=1e-5)


def test_training_moves_the_moving_statistics():
    """``momentum`` is the weight of the old value, as everywhere in Keras; variances are biased."""
    layer = filled(SwitchNormalization(momentum=0.75), (4, 5, 6))
    mean, var = layer.moving_mean.numpy(), layer.moving_variance.numpy()
    x = np.random.default_rng(1).normal(size=(4, 5, 6)).astype("float32")
    layer(x, training=True)
    np.testing.assert_allclose(layer.moving_mean, 0.75 * mean + 0.25 * x.mean((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(layer.moving_variance, 0.75 * var + 0.25 * x.var((0, 1)), rtol=1e-5)


@pytest.mark.parametrize("options", [{"batch_statistics": "frozen"}, {"trainable": False}])
def test_frozen_statistics_stay(options):
    """Frozen statistics and an untrainable layer compute the same in training as at inference, and stay."""
    layer = filled(SwitchNormalization(**options), (4, 5, 6))
    before = layer.get_weights()
    x = np.random.default_rng(1).normal(size=(4, 5, 6)).astype("float32")
    np.testing.assert_array_equal(layer(x, training=True), layer(x, training=False))
    assert all(map(np.array_equal, layer.get_weights(), before))


def test_samples_do_not_meet_without_live_batch_statistics():
    """With frozen or no batch statistics a sample's training output depends on no other sample."""
    x = np.random.default_rng(1).normal(size=(4, 5, 6)).astype("float32")
    for batch_statistics in ("frozen", "none"):
        layer = filled(SwitchNormalization(batch_statistics=batch_statistics), x.shape)
        alone = layer(x[:1], training=True)
        np.testing.assert_allclose(layer(x, training=True)[:1], alone, rtol=1e-6)


def test_variables():
    """Names, shapes and order of the variables are what a weights file relies on."""
    layer = filled(SwitchNormalization(), (None, 8, 6))
    assert [(v.name, tuple(v.shape), v.trainable) for v in layer.weights] == [
        ("gamma", (6,), True),
        ("beta", (6,), True),
        ("mean_weight", (3,), True),
        ("var_weight", (3,), True),
        ("moving_mean", (6,), False),
        ("moving_variance", (6,), False),
    ]
    layer = filled(SwitchNormalization(batch_statistics="none", center=False, scale=False), (None, 8, 6))
    assert [(v.name, tuple(v.shape)) for v in layer.weights] == [("mean_weight", (2,)), ("var_weight", (2,))]


def test_one_hot_batch_gate_is_batch_normalization():
    """With both gates on the batch the layer computes BatchNormalization, in training and at inference."""
    x = np.random.default_rng(1).normal(3.0, 2.0, (4, 5, 5, 6)).astype("float32")
    ours, theirs = filled(SwitchNormalization(), x.shape), filled(keras.layers.BatchNormalization(), x.shape)
    for name in ("gamma", "beta", "moving_mean", "moving_variance"):
        getattr(ours, name).assign(getattr(theirs, name))
    ours.mean_weight.assign([-120.0, -120.0, 0.0])
    ours.var_weight.assign([-120.0, -120.0, 0.0])
    for training in (True, False):
        np.testing.assert_allclose(ours(x, training=training), theirs(x, training=training), rtol=2e-5, atol=2e-5)
        np.testing.assert_allclose(ours.moving_variance, theirs.moving_variance, rtol=1e-5)


def test_masked_timesteps_stay_out_of_the_batch_statistics():
    """What a mask hides moves no moving statistic, as in BatchNormalization."""
    x = np.random.default_rng(1).normal(size=(3, 4, 6)).astype("float32")
    mask = np.array([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]], bool)
    ours, theirs = SwitchNormalization(), keras.layers.BatchNormalization()
    ours(x, training=True, mask=mask)
    theirs(x, training=True, mask=mask)
    np.testing.assert_allclose(ours.moving_mean, theirs.moving_mean, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(ours.moving_variance, theirs.moving_variance, rtol=1e-5)
    changed = np.where(mask[..., None], x, np.float32(1e6))
    again = SwitchNormalization()
    again(changed, training=True, mask=mask)
    np.testing.assert_array_equal(again.moving_variance, ours.moving_variance)


def test_mask_is_passed_on():
    """Layers behind see the mask that the layer received."""
    model = keras.Sequential([keras.Input((4, 2)), keras.layers.Masking(), SwitchNormalization()])
    x = np.zeros((1, 4, 2), "float32")
    x[:, :2] = 1
    assert keras.ops.convert_to_numpy(model(x)._keras_mask).tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_half_precision_input_has_float32_statistics(policy):
    """Half input whose squares overflow is normalized; variables stay float32, output has the compute dtype."""
    layer = SwitchNormalization(dtype=policy)
    x = np.random.default_rng(1).normal(0.0, 3000.0, (2, 8, 8, 4)).astype("float32")
    y = layer(x, training=True)
    assert keras.backend.standardize_dtype(y.dtype) == layer.compute_dtype
    assert {v.dtype for v in layer.weights} == {"float32"}
    y = keras.ops.convert_to_numpy(keras.ops.cast(y, "float32"))
    np.testing.assert_allclose(y, SwitchNormalization()(x, training=True), atol=0.05)


@pytest.mark.parametrize("shape", [(1, 1, 1, 4), (2, 1, 1, 4), (1, 4), (1, 7, 7, 1)])
@pytest.mark.parametrize("training", [False, True])
def test_degenerate_shapes_are_finite(shape, training):
    """1x1 maps, batches of one and single channels give finite outputs and moving statistics."""
    layer = SwitchNormalization()
    y = layer(np.random.default_rng(1).normal(size=shape).astype("float32"), training=training)
    assert np.isfinite(y).all()
    assert all(np.isfinite(w).all() for w in layer.get_weights())


def test_a_1x1_map_is_its_own_instance_mean():
    """A map of one value has the instance variance 0: an instance gate of 1 erases it, and nothing is NaN."""
    layer = filled(SwitchNormalization(center=False), (None, 1, 1, 4))
    layer.mean_weight.assign([0.0, -120.0, -120.0])
    x = np.random.default_rng(1).normal(size=(2, 1, 1, 4)).astype("float32")
    np.testing.assert_array_equal(layer(x), np.zeros_like(x))


def test_a_mean_far_above_the_deviation():
    """A mean 10,000 times the deviation costs no accuracy beyond the input's own rounding."""
    x = (1e4 + np.random.default_rng(1).normal(size=(4, 8, 8, 3))).astype("float32")
    layer = filled(SwitchNormalization(), x.shape)
    layer.moving_mean.assign([1e4, 1e4, 1e4])
    for training in (False, True):
        expected, _, _ = by_formula(x, layer, training)
        np.testing.assert_allclose(layer(x, training=training), expected, atol=5e-3)


def test_configuration_survives():
    """Every constructor argument comes back from the configuration."""
    layer = SwitchNormalization(
        axis=1,
        momentum=0.5,
        epsilon=1e-4,
        center=False,
        batch_statistics="frozen",
        gamma_initializer=keras.initializers.Constant(2.0),
        mean_weight_initializer="zeros",
        var_weight_regularizer=keras.regularizers.L2(0.1),
        gamma_constraint="non_neg",
        name="sn",
    )
    config = SwitchNormalization.from_config(layer.get_config()).get_config()
    assert config == layer.get_config()
    assert {k: config[k] for k in ("axis", "momentum", "epsilon", "center", "scale", "batch_statistics")} == {
        "axis": 1,
        "momentum": 0.5,
        "epsilon": 1e-4,
        "center": False,
        "scale": True,
        "batch_statistics": "frozen",
    }
    assert config["var_weight_regularizer"]["config"] == {"l2": 0.1}


def test_saved_models_load_without_custom_objects(tmp_path):
    """A trained model comes back from a .keras file by its registered name with equal outputs."""
    model = keras.Sequential([keras.Input((5, 5, 3)), keras.layers.Conv2D(4, 3), SwitchNormalization()])
    model.compile("sgd", "mse")
    x = np.random.default_rng(1).normal(size=(4, 5, 5, 3)).astype("float32")
    model.fit(x, np.zeros((4, 3, 3, 4)), verbose=0)
    model.save(tmp_path / "m.keras")
    np.testing.assert_array_equal(keras.models.load_model(tmp_path / "m.keras")(x), model(x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"axis": [1]}, "expected `axis` to be one integer, received axis=[1]"),
        ({"momentum": 1.5}, "expected `momentum` between 0 and 1, received momentum=1.5"),
        ({"epsilon": 0}, "expected `epsilon` above 0, received epsilon=0"),
        (
            {"batch_statistics": "live"},
            "expected `batch_statistics` out of moving, frozen, none, received batch_statistics='live'",
        ),
    ],
)
def test_wrong_arguments(options, message):
    """A wrong argument is named with what was expected."""
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        SwitchNormalization(**options)


@pytest.mark.parametrize(
    ("axis", "shape", "message"),
    [
        (-1, (4,), "expected input of rank 2 or more, received shape=(4,)"),
        (0, (4, 3), "expected `axis` to be a channel axis of shape=(4, 3), received axis=0"),
        (3, (4, 3, 2), "expected `axis` to be a channel axis of shape=(4, 3, 2), received axis=3"),
        (-1, (4, None), "expected a known size along axis=-1, received shape=(4, None)"),
    ],
)
def test_wrong_shapes(axis, shape, message):
    """A shape that the layer cannot be built for is named with what was expected."""
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        SwitchNormalization(axis=axis).build(shape)
