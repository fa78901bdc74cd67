"""What SwitchNormalization promises beside conformance: its modes, options and refusals."""

import re

import keras
import numpy as np
import pytest

from normswap.layers.keras import SwitchNormalization

from ..helpers import exactly

pytestmark = [
    pytest.mark.keras,
    # Keras's own saving converts variables this way.
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
]


def softmax(logits):
    """Return the gates for ``logits``."""
    exponentials = np.exp(np.float64(logits))
    return exponentials / exponentials.sum()


def filled(layer, shape, seed=0):
    """Build a layer and give every variable a value that tells it from the others."""
    layer.build(shape)
    rng = np.random.default_rng(seed)
    for variable in layer.weights:
        variable.assign(rng.uniform(0.5, 1.5, variable.shape))
    return layer


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
        ("temperature", (), False),
    ]
    layer = filled(SwitchNormalization(batch_statistics="none", center=False, scale=False), (None, 8, 6))
    assert [(v.name, tuple(v.shape)) for v in layer.weights] == [
        ("mean_weight", (2,)),
        ("var_weight", (2,)),
        ("temperature", ()),
    ]


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


@pytest.mark.parametrize("shape", [(1, 1, 1, 4), (1, 4)])
@pytest.mark.parametrize("training", [False, True])
def test_degenerate_shapes_are_finite(shape, training):
    """A single value per channel gives finite outputs and moving statistics."""
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


@pytest.mark.parametrize("temperature", [0.25, 1.0, 4.0])
def test_temperature_divides_the_logits(temperature):
    """Gates are softmax(logits / temperature), in `gates` and in what the layer computes."""
    layer, plain = (filled(SwitchNormalization(), (4, 5, 6)) for _ in range(2))
    layer.set_temperature(temperature)
    plain.set_temperature(1.0)
    for name in ("mean_weight", "var_weight"):
        getattr(plain, name).assign(getattr(layer, name).numpy() / temperature)
    for gates, logits in zip(layer.gates(), (layer.mean_weight, layer.var_weight), strict=True):
        np.testing.assert_allclose(gates, softmax(logits.numpy() / temperature), rtol=1e-6)
    x = np.random.default_rng(1).normal(2.0, 3.0, (4, 5, 6)).astype("float32")
    np.testing.assert_allclose(layer(x), plain(x), rtol=1e-5, atol=1e-5)


def test_hard_gates_take_the_largest_logit():
    """At temperature 0 the first of the largest logits takes all, and no logit gets a gradient."""
    layer = SwitchNormalization(temperature=0.0)
    layer.build((4, 5, 6))
    layer.mean_weight.assign([0.5, 2.0, 2.0])
    layer.var_weight.assign([0.5, 1.0, 2.0])
    mean, variance = (keras.ops.convert_to_numpy(gates).tolist() for gates in layer.gates())
    assert (mean, variance) == ([0.0, 1.0, 0.0], [0.0, 0.0, 1.0])
    x = np.random.default_rng(1).normal(size=(4, 5, 6)).astype("float32")
    expected = (x - x.mean((1, 2), keepdims=True)) / np.sqrt(x.var((0, 1)) + 1e-3)
    np.testing.assert_allclose(layer(x, training=True), expected, rtol=1e-5, atol=1e-5)
    model = keras.Sequential([keras.Input((5, 6)), layer])
    model.compile(keras.optimizers.SGD(1.0), "mse", jit_compile=False)
    model.train_on_batch(x, x)
    assert layer.mean_weight.numpy().tolist() == [0.5, 2.0, 2.0]


def test_temperature_takes_effect_in_compiled_functions_and_is_saved(tmp_path):
    """A model that has predicted hardens without being traced again, and its file keeps the temperature."""
    model = keras.Sequential([keras.Input((5, 6)), SwitchNormalization()])
    layer = model.layers[0]
    layer.mean_weight.assign([3.0, 2.0, 1.0])
    x = np.random.default_rng(1).normal(size=(4, 5, 6)).astype("float32")
    soft = model.predict(x, verbose=0)
    layer.set_temperature(0.0)
    hard = model.predict(x, verbose=0)
    assert not np.allclose(soft, hard)
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    assert loaded.layers[0].get_config()["temperature"] == 0.0
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), hard)


def test_zero_init_starts_a_branch_at_nothing():
    """The last normalization of a residual branch can start with gamma 0, and then outputs beta."""
    layer = SwitchNormalization(zero_init=True)
    x = np.random.default_rng(1).normal(size=(4, 5, 6)).astype("float32")
    np.testing.assert_array_equal(layer(x, training=True), np.zeros_like(x))
    assert SwitchNormalization.from_config(layer.get_config()).zero_init


def test_initializers_regularizers_and_constraints_act_on_their_variables():
    """Every variable starts by its initializer; gammas, betas and gates are penalized and constrained by theirs."""
    trained = ("gamma", "beta", "mean_weight", "var_weight")
    values = {name: float(n) for n, name in enumerate((*trained, "moving_mean", "moving_variance"), 2)}
    layer = SwitchNormalization(
        **{f"{name}_initializer": keras.initializers.Constant(value) for name, value in values.items()},
        **{f"{name}_regularizer": keras.regularizers.L1(1.0) for name in trained},
        **{f"{name}_constraint": keras.constraints.MaxNorm(0.5) for name in trained},
    )
    model = keras.Sequential([keras.Input((5, 6)), layer])
    for name, value in values.items():
        assert set(getattr(layer, name).numpy().tolist()) == {value}
    assert sorted(float(loss) for loss in layer.losses) == sorted([6 * 2.0, 6 * 3.0, 3 * 4.0, 3 * 5.0])
    model.compile(keras.optimizers.SGD(1e-9), "mse")
    model.train_on_batch(np.ones((2, 5, 6)), np.ones((2, 5, 6)))
    for name in trained:
        assert np.linalg.norm(getattr(layer, name).numpy()) == pytest.approx(0.5, rel=1e-5)


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"batch_statistics": "live"},
            "expected `batch_statistics` out of moving, frozen, none, received batch_statistics='live'",
        ),
        ({"temperature": -1}, "expected `temperature` of at least 0, received temperature=-1"),
        ({"compat": "torch"}, "expected `compat` to be None or 'keras-switchnorm', received compat='torch'"),
        (
            {"zero_init": True, "scale": False},
            "expected scale=True with zero_init=True, which starts gamma at 0, received scale=False; drop one",
        ),
    ],
)
def test_wrong_arguments(options, message):
    """A wrong argument is named with what was expected."""
    with pytest.raises(ValueError, match=exactly(message)):
        SwitchNormalization(**options)


def test_saved_gates_of_the_wrong_length(tmp_path):
    """Weights saved with two gates do not go into a layer with three, and the message says why."""
    names = {"none": "a.weights.h5", "moving": "b.weights.h5"}
    models = {k: keras.Sequential([keras.Input((5, 6)), SwitchNormalization(batch_statistics=k)]) for k in names}
    for kind, file in names.items():
        models[kind].layers[0].name = "sn"
        models[kind].save_weights(tmp_path / file)
    for kind, file, (ours, theirs) in (("moving", "a.weights.h5", (3, 2)), ("none", "b.weights.h5", (2, 3))):
        message = (
            f"expected saved mean_weight of shape=({ours},) for layer sn, received shape=({theirs},); "
            "give the layer the batch_statistics it was saved with"
        )
        with pytest.raises(ValueError, match=re.escape(message)):
            models[kind].load_weights(tmp_path / file)
        saved = {str(i): v.numpy() for i, v in enumerate(models["none" if kind == "moving" else "moving"].weights)}
        with pytest.raises(ValueError, match=exactly(message)):
            models[kind].layers[0].load_own_variables(saved)
