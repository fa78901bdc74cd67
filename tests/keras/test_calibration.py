"""Calibrating a Keras model: its replaced layers, what is solved and refitted, and parity with PyTorch."""

import copy
from functools import partial

import keras
import numpy as np
import pytest
from keras import layers, ops

from normswap.convert.targets import BatchRenorm, GroupNorm, SwitchNorm
from normswap.errors import InputError, UnsupportedError
from normswap.finetune.calibration import refit
from normswap.finetune.calibration.calibrate import calibrate
from normswap.finetune.calibration.keras.layers import (
    get_affine,
    get_weights,
    left_layers,
    linear_layers,
    picked,
    rows,
    set_affine,
    set_weights,
    site_layers,
)
from normswap.frameworks.keras import to_numpy
from normswap.patchers.keras.patch import patch

from ..helpers import exactly
from .test_fronts import KINDS, Standardized

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
    monkeypatch.setattr(refit, "TRIED", ((0.1, 0.05),))
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


def assert_linear(layer, x):
    """The layer's output on ``x``, at some and at all positions, is what its weights make of its rows; so if set."""
    layer(x)
    layer.bias.assign(np.random.default_rng(0).normal(size=layer.bias.shape))
    y = layer(x)
    for count in (3, 10_000):
        expected = picked(layer, y, count)
        np.testing.assert_allclose(rows(layer, x, y, count) @ get_weights(layer), expected, atol=1e-5)
    set_weights(layer, 2 * get_weights(layer))
    np.testing.assert_allclose(to_numpy(layer(x)), 2 * to_numpy(y), atol=1e-5)


REFITTED = [kind for kind in KINDS if "Transpose" not in kind]


@pytest.mark.parametrize("kind", REFITTED)
def test_rows_times_weights_are_the_layers_output(kind):
    """Each output of a convolution of any kind, or a dense layer, is its window times the weights."""
    make, shape = KINDS[kind]
    assert_linear(make(), np.random.default_rng(0).normal(size=(3, *shape)).astype("float32"))


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("options", [{"strides": 2}, {"dilation_rate": (1, 2)}, {"data_format": "channels_first"}])
@pytest.mark.parametrize("make", [layers.Conv2D, partial(layers.Conv2D, groups=5), layers.SeparableConv2D])
def test_rows_whatever_the_padding_and_the_stride(make, padding, options):
    """An even kernel on sides of different lengths, padded, strided, dilated or with the channels first."""
    x = np.random.default_rng(0).normal(size=(2, 5, 10, 5)).astype("float32")
    assert_linear(make(10, (2, 3), padding=padding, **options), x)


def test_rows_without_a_bias(images):
    """A layer without a bias has zeros for one, and ignores another."""
    layer = layers.Conv2D(5, 3, use_bias=False)
    y = layer(images)
    weights = get_weights(layer)
    assert not weights[:, -1].any()
    np.testing.assert_allclose(rows(layer, images, y, 7) @ weights, picked(layer, y, 7), atol=1e-5)
    set_weights(layer, weights + 1)
    np.testing.assert_allclose(get_weights(layer)[:, :-1], weights[:, :-1] + 1, atol=1e-6)
    assert layer.bias is None


class Padding(layers.Conv2D):
    """A convolution that pads by itself, with what comes around."""

    def call(self, inputs):
        """Convolve inputs that are wider on two sides."""
        return super().call(ops.pad(inputs, [(0, 0), (2, 0), (0, 1), (0, 0)], mode="symmetric"))

    def compute_output_shape(self, shape):
        """Tell the shape for wider inputs."""
        return super().compute_output_shape((shape[0], shape[1] + 2, shape[2] + 1, shape[3]))


class PaddingDepthwise(layers.DepthwiseConv2D):
    """A depthwise convolution in code of its own."""

    def call(self, inputs):
        """Convolve inputs that are wider on all sides."""
        inputs = ops.pad(inputs, [(0, 0), (1, 1), (1, 1), (0, 0)], mode="reflect")
        return keras.ops.depthwise_conv(inputs, self.kernel, strides=self.strides) + self.bias


class Clipped(layers.Dense):
    """A dense layer that does more."""

    def call(self, inputs):
        """Clip the output."""
        return ops.relu(super().call(inputs))


@pytest.mark.parametrize("layer", [Padding(4, 3, strides=2), PaddingDepthwise(3, depth_multiplier=2)])
def test_rows_of_a_class_that_pads(layer, images):
    """The windows are of what a subclass gives the convolution."""
    assert_linear(layer, images)


class Enlarged(layers.Conv2D):
    """A convolution that makes a larger map of its output."""

    def call(self, inputs):
        """Convolve, and repeat."""
        return ops.repeat(super().call(inputs), 2, axis=1)


class Asking(layers.Conv2D):
    """A convolution that is to be told more than its input."""

    def call(self, inputs, factor):
        """Convolve what is scaled."""
        return super().call(inputs * factor)


@pytest.mark.parametrize("make", [Standardized, Enlarged])
def test_rows_of_something_else(make, images):
    """A class that convolves with other weights than the layer's, or changes the output's sizes, has none."""
    layer = make(4, 3)
    assert rows(layer, images, layer(images), 5) is None


def test_rows_of_a_class_that_takes_more(images):
    """A class that takes more than its input has none."""
    layer = Asking(4, 3)
    assert rows(layer, images, layer(images, factor=2.0), 5) is None


def every_kind():
    """A network with a layer of each kind that is refitted, and two that compute more than their weights say."""
    body = [Padding(6, 3, name="padding"), layers.Conv2D(6, 2, groups=2, name="grouped")]
    body += [layers.DepthwiseConv2D(3, name="depthwise"), layers.SeparableConv2D(6, 2, name="separable")]
    body += [Standardized(6, 1, name="standardized"), layers.Reshape((-1, 6)), layers.Conv1D(6, 1, name="conv")]
    norms = [layers.BatchNormalization(name=f"bn{number}") for number in range(len(body))]
    parts = [each for layer, norm in zip(body, norms, strict=True) for each in (layer, norm, layers.ReLU())]
    parts += [layers.Flatten(), Clipped(5, name="clipped"), layers.Dense(3, name="dense")]
    return keras.Sequential([keras.Input((8, 8, 3)), *parts])


def test_layers_of_every_kind_are_refitted(train, inputs, monkeypatch):
    """Refitting changes the layers that are linear, brings the model nearer, and leaves those that compute more."""
    monkeypatch.setattr(refit, "WORTH", 0.0)
    net = train(every_kind())
    models = [every_kind() for _ in range(2)]
    for model in models:
        model.set_weights(net.get_weights())
        patch(model, GroupNorm(groups=3), mode=None)
    solved, refitted = (
        calibrate(m, net, inputs, refit=choice) for m, choice in zip(models, (False, True), strict=True)
    )
    assert refitted[-1].after < solved[-1].after
    more = "it computes something else than its weights times its input"
    assert (solved.left, refitted.left) == ({}, {"standardized": more, "clipped": more})
    before, now = map(linear_layers, (net, models[1]))
    assert [*before] == [
        *("padding", "grouped", "depthwise", "separable", "standardized", "conv"),
        *("clipped", "dense"),
    ]
    assert [name for name in before if np.array_equal(get_weights(before[name]), get_weights(now[name]))] == [
        "standardized",
        "clipped",
    ]


def test_layers_that_are_refitted(train):
    """What computes more than its weights say, or may not change, stands in the way; a layer held twice comes once."""
    dense = layers.Dense(4, name="dense")
    lora = layers.Dense(4, name="lora")
    model = keras.Sequential(
        [
            keras.Input((8, 8, 4)),
            layers.Conv2D(4, 3, name="conv"),
            layers.Conv2D(4, 3, name="frozen", trainable=False),
            layers.Conv2D(4, 1, name="constrained", kernel_constraint="unit_norm"),
            layers.Conv2DTranspose(4, 1, name="transposed"),
            lora,
            keras.Sequential([dense], name="one"),
            keras.Sequential([dense], name="two"),
            layers.Dense(2, activation="softmax", name="head"),
        ]
    )
    lora.enable_lora(2)
    assert list(linear_layers(model)) == ["conv", "one/dense"]
    assert left_layers(model) == {
        "frozen": "it is frozen",
        "constrained": "a constraint holds its weights",
        "transposed": "it is a transposed convolution",
        "lora": "its kernel is computed, by LoRA",
        "head": "its activation is in between",
    }
