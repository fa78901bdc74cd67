"""Calibrating a Keras model: its replaced layers, what is solved and refitted, and parity with PyTorch."""

import copy

import keras
import numpy as np
import pytest
from keras import layers

from normswap.convert.targets import BatchRenorm, GroupNorm, SwitchNorm
from normswap.errors import InputError, UnsupportedError
from normswap.finetune.calibration import refit
from normswap.finetune.calibration.calibrate import calibrate
from normswap.finetune.calibration.keras.layers import (
    get_affine,
    get_weights,
    linear_layers,
    picked,
    rows,
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


@pytest.fixture
def inputs():
    """Forty-eight samples that differ in brightness and contrast, as images do, in two batches."""
    random = np.random.default_rng(5)
    noise = random.normal(size=(48, 8, 8, 3)) * random.uniform(0.3, 2, (48, 1, 1, 1))
    return np.split((noise + random.normal(size=(48, 1, 1, 3))).astype("float32"), 2)


@pytest.fixture
def net(train):
    """A trained network whose norms have convolutions in front, and a head."""
    return train(
        keras.Sequential(
            [
                keras.Input((8, 8, 3)),
                layers.Conv2D(8, 3, use_bias=False, name="conv1"),
                layers.BatchNormalization(name="bn1"),
                layers.ReLU(),
                layers.DepthwiseConv2D(3, name="conv2"),
                layers.BatchNormalization(name="bn2"),
                layers.ReLU(),
                layers.Flatten(),
                layers.Dense(3, name="head"),
            ]
        )
    )


def error(model, original, x):
    """Mean square distance of the outputs."""
    return float(np.square(model(x).numpy() - original(x).numpy()).mean())


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


@pytest.mark.parametrize("target", [GroupNorm(), GroupNorm(groups=4), SwitchNorm("even")])
@pytest.mark.parametrize("mode", ["full", "scale", None])
def test_it_comes_nearer_on_other_inputs(net, inputs, target, mode):
    """The output is nearer to the original's on inputs that nothing was fitted to, and no layer is further off."""
    report = patch(net, target, example=inputs[0], inplace=False, mode=mode)
    fresh = inputs[0][::-1] * 0.9 + 0.1
    before = error(report.model, net, fresh)
    residuals = calibrate(report, inputs)

    assert [residual.name for residual in residuals] == ["bn1", "bn2", "output"]
    assert all(residual.after <= residual.before for residual in residuals[:-1])
    assert error(report.model, net, fresh) < before


def test_a_report_or_the_original(net, inputs):
    """The same comes of a report, which knows the original, and of the model and a copy from before."""
    report, twin = (patch(net, GroupNorm(), example=inputs[0], inplace=False) for _ in range(2))

    found, same = calibrate(report, inputs), calibrate(twin.model, net, inputs)
    for each, other in zip(found, same, strict=True):
        assert (each.name, each.before, each.after) == (
            other.name,
            *(pytest.approx(value, rel=1e-3) for value in (other.before, other.after)),
        )
    np.testing.assert_allclose(report.model(inputs[0]), twin.model(inputs[0]), rtol=1e-3, atol=1e-4)


def test_a_calibrated_patch_can_be_undone(net, inputs, monkeypatch):
    """`undo` brings every bit back after a calibration, refitted layers too."""
    monkeypatch.setattr(refit, "WORTH", 0.0)
    monkeypatch.setattr(refit, "STEP", 0.05)
    before = copy.deepcopy(net.get_weights())
    report = patch(net, GroupNorm(groups=4), example=inputs[0])
    calibrate(report, inputs)
    assert not np.array_equal(net.get_layer("head").kernel.numpy(), before[-2])

    report.undo()
    for now, then in zip(net.get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_refusals(net, make, inputs):
    """Few inputs, a foreign original and a model that was trained are refused, and nothing has changed."""
    report = patch(net, GroupNorm(), example=inputs[0], inplace=False)
    before = report.model.get_weights()
    message = "expected 16 or more inputs to calibrate on, received 4; a few hundred are good"
    with pytest.raises(InputError, match=exactly(message)):
        calibrate(report, [inputs[0][:4]])
    message = (
        "expected an original with the layers of the model, which it is before the patch, received one without bn1, bn2"
    )
    with pytest.raises(InputError, match=exactly(message)):
        calibrate(report.model, make("nested"), inputs)
    assert all(map(np.array_equal, report.model.get_weights(), before))
    kernel = report.model.get_layer("conv1").kernel
    kernel.assign(kernel + 0.1 * np.random.default_rng(0).normal(size=kernel.shape))
    message = (
        "expected a model that has not changed since the patch, received one whose conv1 has; calibrate before "
        "training, and once"
    )
    with pytest.raises(UnsupportedError, match=exactly(message)):
        calibrate(report.model, net, inputs)


def test_affine():
    """Scale and shift are written as given and read back in float64."""
    layer = layers.GroupNormalization(1)
    layer.build((None, 4))
    set_affine(layer, np.arange(4.0), -np.arange(4.0))
    gamma, beta = get_affine(layer)
    assert gamma.dtype == beta.dtype == np.float64
    assert (gamma.tolist(), beta.tolist()) == ([0, 1, 2, 3], [0, -1, -2, -3])


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("options", [{"strides": 2}, {"dilation_rate": (1, 2)}, {"use_bias": False}])
def test_rows_times_weights_are_the_layers_output(padding, options, images):
    """Each output of a convolution is its window times the weights, whatever its padding, stride and bias."""
    layer = layers.Conv2D(5, 3, padding=padding, bias_initializer="normal", **options)
    y = layer(images)
    for count in (3, 10_000):
        expected = picked(layer, y, count)
        np.testing.assert_allclose(rows(layer, images, y, count) @ get_weights(layer), expected, atol=1e-5)
    set_weights(layer, 2 * get_weights(layer))
    np.testing.assert_allclose(layer(images).numpy(), 2 * y.numpy(), atol=1e-5)


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
