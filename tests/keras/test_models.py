"""The networks of `normswap.models` in Keras, and weights files of three systems, made up in the layout of Keras 2."""

import json
import math

import keras
import numpy as np
import pytest
from click.testing import CliRunner
from numpy.lib.stride_tricks import sliding_window_view

import normswap
from normswap.cli import main
from normswap.convert.gates import softmax
from normswap.layers.keras import SwitchNormalization
from normswap.models import keras as models

from ..helpers import exactly
from .models import output
from .test_load_weights import norm as published_norm
from .test_load_weights import write

pytestmark = [
    pytest.mark.keras,
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
]

NORM = {"sn": "switch_normalization", "brn": "batch_renormalization", "gn": "group_normalization"}
PREFIX = {"sn": "{}/{}:0", "brn": "{0}/{0}_{1}:0", "gn": "{}/{}:0"}
"""What Keras 2 calls a norm's weights: BatchRenormalization names its own after the layer."""

GN = "GroupNormalization-keras"
EPSILON = {"sn": 1e-3, "brn": 1e-5, "gn": 1e-6}


class Published:
    """A network of one of the systems by its published script: its weights as Keras 2 lists them, and its function.

    It is run once on arrays of the input's shape, which makes the weights up in the order of the script, as Keras
    numbers layers, and computes by the published formulas, in float64.
    """

    def __init__(self, kind, seed=0):
        self.kind, self.weights, self.numbers = kind, {}, {}
        self.rng = np.random.default_rng(seed)

    def add(self, base, form, parts):
        """Add a layer under the next number of its kind, and return its arrays."""
        self.numbers[base] = self.numbers.get(base, 0) + 1
        name = f"{base}_{self.numbers[base]}"
        self.weights[name] = {form.format(name, part): array.astype(np.float32) for part, array in parts.items()}
        return {part: array.astype(np.float32).astype(np.float64) for part, array in parts.items()}

    def convolution(self, x, width, stride=1, size=3, *, bias=True, padding="same"):
        parts = {"kernel": self.rng.normal(size=(size, size, x.shape[3], width)) * math.sqrt(2 / size**2 / x.shape[3])}
        parts |= {"bias": self.rng.normal(size=width) / 4} if bias else {}
        own = self.add("conv2d", "{}/{}:0", parts)
        if padding == "same":
            total = [max((-(-n // stride) - 1) * stride + size - n, 0) for n in x.shape[1:3]]
            x = np.pad(x, [(0, 0), *((n // 2, n - n // 2) for n in total), (0, 0)])
        windows = sliding_window_view(x, (size, size), axis=(1, 2))[:, ::stride, ::stride]
        return np.tensordot(windows, own["kernel"], ((4, 5, 3), (0, 1, 2))) + own.get("bias", 0)

    def norm(self, x, groups=8):
        """Normalize and activate."""
        kind, channels, epsilon = self.kind, x.shape[3], EPSILON[self.kind]
        own = self.add(NORM[kind], PREFIX[kind], published_norm(kind, self.rng, channels))
        gamma, beta = own["gamma"].ravel(), own["beta"].ravel()
        if kind == "gn":
            grouped = x.reshape(*x.shape[:3], groups, channels // groups)
            mean, variance = (f(grouped, (1, 2, 4), keepdims=True) for f in (np.mean, np.var))
            y = ((grouped - mean) / np.sqrt(variance + epsilon)).reshape(x.shape)
        elif kind == "brn":
            y = (x - own["running_mean"]) / np.sqrt(own["running_std"] + epsilon)
        else:
            mean, variance = x.mean((1, 2), keepdims=True), x.var((1, 2), keepdims=True)
            layer = mean.mean(3, keepdims=True)
            layer_variance = (variance + mean**2).mean(3, keepdims=True) - layer**2
            m, v = softmax(own["mean_weights"]), softmax(own["variance_weights"])
            mean = m[0] * mean + m[1] * layer + m[2] * own["moving_mean"]
            variance = v[0] * variance + v[1] * layer_variance + v[2] * own["moving_variance"]
            y = (x - mean) / np.sqrt(variance + epsilon)
        return np.maximum(y * gamma + beta, 0)

    def dense(self, x, width):
        kernel = self.rng.normal(size=(x.shape[1], width)) / math.sqrt(x.shape[1])
        own = self.add("dense", "{}/{}:0", {"kernel": kernel, "bias": self.rng.normal(size=width)})
        return x @ own["kernel"] + own["bias"]


def cifar10(net, x):
    """keras-switchnorm's network: scores before the softmax."""
    for width, stride in ((64, 1), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1)):
        x = net.norm(net.convolution(x, width, stride))
    return net.dense(x.mean((1, 2)), 10)


def wide_resnet(net, x):
    """BatchRenormalization's WRN-16-4: scores before the softmax."""
    x = net.norm(net.convolution(x, 16, bias=False))
    for width, stride in ((64, 1), (128, 2), (256, 2)):
        x = net.norm(x) if stride == 2 else x
        y = net.convolution(net.norm(net.convolution(x, width, stride, bias=False)), width, bias=False)
        x = y + net.convolution(x, width, stride, 1, bias=False)
        y = net.convolution(net.norm(x), width, bias=False)
        x = x + net.convolution(net.norm(y), width, bias=False)
    return net.dense(x.mean((1, 2)), 10)


def fashion_mnist(net, x):
    """GroupNormalization-keras's network: scores before the softmax."""
    for width in (32, 64):
        x = net.norm(net.convolution(x, width, padding="valid"))
    x = x.reshape(len(x), 12, 2, 12, 2, 64).max((2, 4))
    return net.dense(np.maximum(net.dense(x.reshape(len(x), -1), 128), 0), 10)


CASES = {
    "sn": ("cifar10_net", cifar10, (32, 32, 3), "keras-switchnorm weights for 6 norms and 7 other layers"),
    "brn": ("wide_resnet", wide_resnet, (32, 32, 3), "BatchRenormalization weights for 12 norms and 17 other layers"),
    "gn": ("fashion_mnist_net", fashion_mnist, (28, 28, 1), f"{GN} weights for 2 norms and 4 other layers"),
}
FORMS = {
    "sn": ([], ["its statistics are taken from each sample (moments)"] * 6, 170),
    "brn": (["Conv"] * 7, ["it follows Add, not a linear layer"] * 5, 42),
    "gn": ([], ["its statistics are taken from each sample (instance)"] * 2, 19),
}
"""Into what norms fold, why others stay and in which form, and how many nodes the file has at most."""


def close(found, expected):
    """Whether scores agree to 1e-5 of their size."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("kind", CASES)
def test_a_weights_file_on_the_command_line(tmp_path, monkeypatch, kind):
    """A whole weights file becomes a proven file, whose norms are those that were published."""
    import onnxruntime

    monkeypatch.chdir(tmp_path)
    name, script, shape, said = CASES[kind]
    images = np.random.default_rng(1).normal(size=(2, *shape)).astype(np.float32)
    published = Published(kind)
    expected = script(published, images.astype(np.float64))
    write(tmp_path / "w.h5", published.weights)

    def run(*arguments):
        result = CliRunner().invoke(main, [*arguments, "--json"])
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)

    groups = ("--groups", "8") if kind == "gn" else ()
    told = run("patch", f"normswap.models.keras:{name}", "--to", kind, *groups, "--weights", "w.h5", "-o", "b")
    assert told["weights"] == said
    own = getattr(models, name)(norm=kind)
    normswap.load_weights(own, "w.h5")
    for model in (own, normswap.load("b")):
        close(output(model, images), expected)
    told = run("export", "b", "-o", "b.onnx", "--no-latency")
    session = onnxruntime.InferenceSession("b.onnx")
    close(session.run(None, {session.get_inputs()[0].name: images})[0], expected)
    folded, kept, nodes = FORMS[kind]
    assert (list(told["folded"].values()), list(told["kept"].values())) == (folded, kept)
    assert told["nodes"] <= nodes


NORMS = ["bn", "sn", "brn", "gn", "ln", "in", lambda channels: SwitchNormalization(momentum=0.98)]
NETWORKS = {"cifar10_net": 6, "wide_resnet": 12, "fashion_mnist_net": 2}


def norms_of(model):
    """Return a network's norms, which alone have an ε."""
    return [layer for layer in model.layers if hasattr(layer, "epsilon")]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", NETWORKS)
def test_any_norm(name, norm):
    """Whatever the norms are, a network has as many as published, and gives scores."""
    model = getattr(models, name)(norm=norm, classes=5)

    assert len(norms_of(model)) == NETWORKS[name]
    assert output(model, np.ones((2, *model.input_shape[1:]), np.float32)).shape == (2, 5)


def test_published_settings():
    """ε and groups are those of each system's script."""
    norms = {
        "sn": norms_of(models.cifar10_net("sn")),
        "brn": norms_of(models.wide_resnet(10, 1, "brn")),
        "gn": norms_of(models.fashion_mnist_net("gn")),
    }

    assert {kind: {layer.epsilon for layer in found} for kind, found in norms.items()} == {
        kind: {epsilon} for kind, epsilon in EPSILON.items()
    }
    assert [layer.groups for layer in norms["gn"]] == [8, 8]
    assert [layer.groups for layer in norms_of(models.wide_resnet(10, 1, "gn"))][:3] == [16, 16, 16]


def test_both_frameworks_build_the_same_wide_resnet():
    """WRN-16-4 has as many weights to train as the one in PyTorch."""
    model = models.wide_resnet(dropout=0.3)

    assert sum(math.prod(v.shape) for v in model.trainable_variables) == 2_748_378
    assert [layer.rate for layer in model.layers if isinstance(layer, keras.layers.Dropout)] == [0.3] * 3


@pytest.mark.parametrize("name", NETWORKS)
def test_a_norm_that_there_is_not(name):
    """It is told with those that there are."""
    message = (
        "expected `norm` out of bn, sn, brn, gn, ln, in, or a function that returns a layer for a number of channels, "
        "received norm='renorm'"
    )
    with pytest.raises(ValueError, match=exactly(message)):
        getattr(models, name)(norm="renorm")


def test_a_depth_that_there_is_not():
    """A wide ResNet's three stages are equally deep."""
    with pytest.raises(ValueError, match=exactly("expected `depth` as 6 n + 4, 10 or more, received depth=18")):
        models.wide_resnet(18)
