"""What calibration asks of a Keras model: its replaced layers, their outputs, their scale and shift."""

import keras
import numpy as np
import pytest
from keras import layers

from normswap.convert.targets import BatchRenorm, GroupNorm, SwitchNorm
from normswap.errors import InputError
from normswap.finetune.calibration.calibrate import calibrate, observe
from normswap.finetune.calibration.keras.layers import (
    get_affine,
    get_weights,
    linear_layers,
    patches,
    set_affine,
    set_weights,
    site_layers,
)
from normswap.patchers.keras.patch import patch

from ..helpers import exactly

pytestmark = [
    pytest.mark.keras,
    # Keras's own copying converts variables this way.
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
]


def capture(model, names, batch, stop_after=None):
    """What `observe` tells, collected by name; the pass ends once ``stop_after`` has run."""
    seen = {}

    def see(name, inputs, output):
        seen.setdefault(name, []).append(output)
        return name == stop_after

    observe(model, names, batch, see)
    return seen


def test_sites_are_the_replaced_layers(make):
    """Replaced layers come by name; a BatchRenorm, which is exact, and a BatchNorm left alone do not."""
    model = make("functional")
    assert site_layers(model) == {}
    patch(model, GroupNorm(), include=["bn1"])
    patch(model, BatchRenorm(), include=["bn2"])
    assert site_layers(model) == {"bn1": model.get_layer("bn1")}


@pytest.mark.parametrize("target", [GroupNorm(), SwitchNorm()])
def test_sites_of_a_loaded_model(target, make, tmp_path):
    """After loading the sites are known by their type, under the same names."""
    model = make("nested")
    patch(model, target)
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    assert list(site_layers(loaded)) == list(site_layers(model)) == ["middle/inner/bn", "middle/bn"]


def test_capture_returns_outputs_in_call_order(make, images):
    """Outputs of the named layers come in the order of the calls, whatever order was asked for."""
    model = make("functional")
    seen = capture(model, ["bn2", "bn1"], images)
    assert list(seen) == ["bn1", "bn2"]
    expected = keras.Model(model.input, model.get_layer("bn2").output)(images).numpy()
    np.testing.assert_array_equal(seen["bn2"][0], expected)


def test_capture_moves_channels_last(train):
    """A channels-first layer's output comes with its channels behind."""
    model = train(keras.Sequential([keras.Input((3, 4, 5)), layers.BatchNormalization(1, name="bn")]))
    x = np.random.default_rng(1).normal(size=(2, 3, 4, 5)).astype("float32")
    np.testing.assert_array_equal(capture(model, ["bn"], x)["bn"][0], np.moveaxis(model(x).numpy(), 1, -1))


def test_capture_sees_every_call(make, images):
    """A layer called twice gives two outputs, one inside TimeDistributed one per step; stopping ends at the first."""
    assert len(capture(make("shared"), ["bn"], images)["bn"]) == 2
    assert [y.shape for y in capture(make("time_distributed"), ["each/bn"], images)["each/bn"]] == [(4, 8, 3)] * 8
    assert len(capture(make("shared"), ["bn"], images, stop_after="bn")["bn"]) == 1


def test_capture_stops_and_leaves_no_trace(make, images):
    """Nothing behind the last wanted layer runs, and the model computes afterwards as before."""
    model = make("functional")
    before = model(images).numpy()
    ran = []
    head = model.layers[-1]
    head.call = lambda x, call=head.call: ran.append(1) or call(x)
    assert list(capture(model, ["bn1", "bn2"], images, stop_after="bn1")) == ["bn1"]
    assert not ran
    np.testing.assert_array_equal(model(images).numpy(), before)
    assert all("call" not in model.get_layer(name).__dict__ for name in ("bn1", "bn2"))


def test_capture_takes_several_inputs(train):
    """A batch may be a list or a mapping of arrays."""
    a, b = keras.Input((3,), name="a"), keras.Input((3,), name="b")
    x = np.random.default_rng(1).normal(size=(2, 4, 3)).astype("float32")
    total = layers.BatchNormalization(name="bn")(layers.Add()([a, b]))
    listed = capture(train(keras.Model([a, b], total)), ["bn"], [x[0], x[1]])["bn"][0]
    mapped = capture(keras.Model({"a": a, "b": b}, total), ["bn"], {"a": x[0], "b": x[1]})["bn"][0]
    np.testing.assert_array_equal(listed, mapped)


def test_a_reference_with_other_layers(make, images):
    """A reference whose layers have other names is refused with the names it lacks, before anything changes."""
    model = patch(make("functional"), GroupNorm()).model
    before = model.get_weights()
    message = (
        "expected a reference with the layers of the model, which it is before the patch, received one without bn1, bn2"
    )
    with pytest.raises(InputError, match=exactly(message)):
        calibrate(model, make("nested"), [images], refit=False)
    assert all(map(np.array_equal, model.get_weights(), before))


@pytest.mark.parametrize(("policy", "dtype"), [("mixed_bfloat16", "float32"), ("float64", "float64")])
def test_capture_dtype(policy, dtype):
    """Half outputs come widened to float32, wider ones as they are."""
    model = keras.Sequential([keras.Input((3,)), layers.BatchNormalization(name="bn", dtype=policy)])
    assert capture(model, ["bn"], np.ones((2, 3), "float32"))["bn"][0].dtype == dtype


def test_affine():
    """Scale and shift are written as given and read back in float64."""
    layer = layers.GroupNormalization(1)
    layer.build((None, 4))
    set_affine(layer, np.arange(4.0), -np.arange(4.0))
    gamma, beta = get_affine(layer)
    assert gamma.dtype == beta.dtype == np.float64
    assert (gamma.tolist(), beta.tolist()) == ([0, 1, 2, 3], [0, -1, -2, -3])


def test_calibration_of_a_keras_model(make, images):
    """Calibration brings each layer's moments to the original's and the model's output nearer to it."""
    original = make("functional")
    report = patch(original, SwitchNorm("even"), inplace=False)
    wanted, before = original(images).numpy(), report.model(images).numpy()
    residuals = calibrate(report.model, original, [images], refit=False)
    assert [residual.name for residual in residuals] == ["bn1", "bn2"]
    assert all(residual.after < 1e-4 for residual in residuals)
    after = report.model(images).numpy()
    assert np.abs(after - wanted).max() < np.abs(before - wanted).max()


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("options", [{"strides": 2}, {"dilation_rate": (1, 2)}, {"use_bias": False}])
def test_patches_times_weights_are_the_layers_output(padding, options, images):
    """Each output of a convolution is its patch times the weights, whatever its padding, stride, dilation and bias."""
    layer = layers.Conv2D(5, 3, padding=padding, bias_initializer="normal", **options)
    expected = layer(images).numpy()
    found = np.stack([patches(layer, x) @ get_weights(layer) for x in images])
    np.testing.assert_allclose(found.reshape(expected.shape), expected, atol=1e-5)
    set_weights(layer, 2 * get_weights(layer))
    np.testing.assert_allclose(layer(images).numpy(), 2 * expected, atol=1e-5)


def test_layers_that_are_refitted(train):
    """An activation inside, groups, or a frozen layer stand in the way; a layer held twice comes once."""
    dense = layers.Dense(4, name="dense")
    model = keras.Sequential(
        [
            keras.Input((8, 8, 4)),
            layers.Conv2D(4, 3, name="conv"),
            layers.Conv2D(4, 3, groups=2, name="grouped"),
            layers.Conv2D(4, 3, name="frozen", trainable=False),
            keras.Sequential([dense], name="one"),
            keras.Sequential([dense], name="two"),
            layers.Dense(2, activation="softmax", name="head"),
        ]
    )
    assert list(linear_layers(model)) == ["conv", "one/dense"]


def test_refitting_a_keras_model(train, images):
    """The layers behind the first replaced one are refitted too, and the output comes nearer than by norms alone."""
    make = lambda: train(  # noqa: E731
        keras.Sequential(
            [
                keras.Input((8, 8, 3)),
                layers.Conv2D(8, 3, name="conv1"),
                layers.BatchNormalization(name="bn1"),
                layers.ReLU(),
                layers.Conv2D(8, 3, name="conv2"),
                layers.BatchNormalization(name="bn2"),
                layers.Flatten(),
                layers.Dense(3, name="head"),
            ]
        )
    )
    original = make()
    wanted, error = original(images).numpy(), {}
    for refit in (False, True):
        model = patch(original, GroupNorm(groups=4), inplace=False).model
        residuals = calibrate(model, original, [images], refit=refit)
        error[refit] = np.square(model(images).numpy() - wanted).mean()
    assert [residual.name for residual in residuals] == ["bn1", "conv2", "bn2", "head"]
    assert all(residual.after < residual.before for residual in residuals)
    assert error[True] < error[False]
