"""Keras norms that become BatchNorms: which can, what they then compute, the file, the way out, and refusals."""

import keras
import numpy as np
import pytest
from keras import layers

import normswap
from normswap import BatchNorm, SwitchNorm
from normswap.errors import UnsupportedError, UsageError
from normswap.layers.keras import SwitchNormalization

from ..helpers import exactly
from .models import output


@pytest.fixture
def data():
    """Two batches of images that differ in contrast."""
    images = np.random.default_rng(1).normal(size=(32, 8, 8, 3)) * np.linspace(0.3, 3, 32)[:, None, None, None]
    return np.split(images.astype("float32"), 2)


def net(norm):
    """A convolution, a norm of six channels with scales of its own, a ReLU, and another convolution."""
    body = [layers.Conv2D(6, 3, name="first"), norm, layers.ReLU(), layers.Conv2D(4, 3, name="last")]
    model = keras.Sequential([keras.Input((8, 8, 3)), *body])
    rng = np.random.default_rng(0)
    for variable in norm.weights:
        variable.assign(rng.uniform(0.5, 2.0, variable.shape))
    return model


def bits(model):
    """Every variable by its path."""
    return [(variable.path, variable.numpy().tobytes()) for variable in model.weights]


NORMS = {
    "gn": lambda: layers.GroupNormalization(2, name="norm"),
    "in": lambda: layers.GroupNormalization(-1, name="norm", scale=False),
    "ln": lambda: layers.LayerNormalization(name="norm"),
    "sn": lambda: SwitchNormalization(name="norm"),
}


@pytest.mark.backends
@pytest.mark.parametrize("kind", NORMS)
def test_each_norm_becomes_its_line(kind, data):
    """The BatchNorm has the norm's mean and deviation in every channel; undo brings every bit back."""
    model = net(NORMS[kind]())
    norm, images = model.get_layer("norm"), np.concatenate(data)
    x = output(model.get_layer("first"), images)
    y, before, scores, cls = output(norm, x), bits(model), output(model, images), type(norm)
    report = normswap.patch(model, "bn", data=data)
    line = output(norm, x)

    assert type(norm) is layers.BatchNormalization
    np.testing.assert_allclose(line.mean((0, 1, 2)), y.mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(line.std((0, 1, 2)), y.std((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(norm.moving_mean.numpy(), x.mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(norm.moving_variance.numpy(), x.var((0, 1, 2)), rtol=1e-4)
    (drop,) = report.drops
    left = np.square(line - y).mean((0, 1, 2)).sum() / y.var((0, 1, 2)).sum()
    assert drop.before == pytest.approx(np.sqrt(left), rel=1e-4)
    assert drop.after == pytest.approx(drop.before, rel=1e-4)
    assert report.drift(images)[0].name == "norm"

    report.undo()
    assert type(norm) is cls
    assert bits(model) == before
    np.testing.assert_array_equal(output(model, images), scores)


def test_as_in_torch(data):
    """The same network in both frameworks gets the same BatchNorms."""
    torch = pytest.importorskip("torch")
    model = net(layers.GroupNormalization(2, name="norm", epsilon=1e-5))
    twin = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3), torch.nn.GroupNorm(2, 6), torch.nn.ReLU()).eval()
    for layer, theirs in (("first", twin[0]), ("norm", twin[1])):
        weight, bias = model.get_layer(layer).get_weights()
        theirs.weight.data = torch.tensor(np.moveaxis(weight, (-1, -2), (0, 1)) if weight.ndim == 4 else weight)
        theirs.bias.data = torch.tensor(bias)
    drops = normswap.patch(model, "bn", data=data).drops
    report = normswap.patch(twin, "bn", data=[torch.from_numpy(part).permute(0, 3, 1, 2) for part in data])

    assert report.drops[0].before == pytest.approx(drops[0].before, rel=1e-5)
    for mine, name in zip(
        model.get_layer("norm").get_weights(), ("weight", "bias", "running_mean", "running_var"), strict=True
    ):
        np.testing.assert_allclose(getattr(twin[1], name).detach(), mine, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["gn", "ln"])
def test_the_file_has_no_norm(kind, data, tmp_path):
    """What precedes it takes the BatchNorm in, and the file is proved."""
    onnx = pytest.importorskip("onnx")
    model = net(NORMS[kind]())
    normswap.patch(model, "bn", data=data)
    written = normswap.to_onnx(model, tmp_path / "m.onnx")

    assert written.folded == {"norm": "Conv"}
    assert written.verdict
    operators = {node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node}
    assert operators == {"Conv", "Relu", "Transpose"}


def test_there_and_back(make, images):
    """A patched network whose BatchNorms come back is one like any other: it is saved, loaded and patched again."""
    model = make("functional")
    before = bits(model)
    there = normswap.patch(model, "gn")
    gn = bits(model)
    data = np.random.default_rng(0).normal(size=(32, 8, 8, 3)).astype("float32")
    report = normswap.patch(model, "bn", data=[data])
    assert [path for path, _ in bits(model)] == [path for path, _ in before]
    assert normswap.plan(model, "gn").having("replace")
    report.undo()
    assert bits(model) == gn
    there.undo()
    assert bits(model) == before


@pytest.mark.parametrize(
    ("target", "exact"), [("brn", True), (SwitchNorm(start="exact"), True), (SwitchNorm(), False)], ids=str
)
def test_what_is_a_batch_norm_needs_no_data(make, images, target, exact):
    """A BatchRenorm, and a SwitchNorm of the batch statistics alone, are BatchNorms at inference."""
    model = make("functional")
    normswap.patch(model, target)
    before = output(model, images)
    if not exact:
        with pytest.raises(UsageError, match="^expected data to fit BatchNorms to, which 2 norms"):
            normswap.patch(model, "bn")
        return
    normswap.patch(model, "bn")

    np.testing.assert_allclose(output(model, images), before, atol=1e-5)


@pytest.mark.backends
def test_statistics_are_measured_anew(data):
    """BatchNorms get the mean and variance of what reaches them, with converted norms and measured ones before them."""
    body = [layers.GroupNormalization(1, name="norm"), layers.Conv2D(4, 3), layers.BatchNormalization(name="bn")]
    model = keras.Sequential([keras.Input((8, 8, 3)), *body])
    before = bits(model)
    report = normswap.patch(model, BatchNorm(reestimate=True), data=[np.concatenate(data)])
    x = np.concatenate(data)
    for layer in model.layers[:-1]:
        x = output(layer, x)
    bn = model.get_layer("bn")

    np.testing.assert_allclose(bn.moving_mean.numpy(), x.mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(bn.moving_variance.numpy(), x.var((0, 1, 2)), rtol=1e-4)
    report.undo()
    assert bits(model) == before


class WithActivation(layers.GroupNormalization):
    """A GroupNorm with a ReLU of its own."""

    def call(self, inputs):
        """Normalize and clip."""
        return keras.ops.relu(super().call(inputs))


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (
            lambda: layers.LayerNormalization(axis=[1, 2, 3], name="norm"),
            "norm (LayerNormalization): a LayerNormalization over positions (axis=[1, 2, 3]) scales each by itself, a "
            "BatchNorm only channels: put a GroupNormalization of one group in its place and train it",
        ),
        (
            lambda: WithActivation(1, name="norm"),
            "norm (WithActivation): WithActivation overrides call: a BatchNorm would lose what it adds",
        ),
    ],
    ids=["positions", "activation"],
)
def test_a_refused_model_is_untouched(build, reason, data):
    """A norm that no BatchNorm can follow is named with the reason, and the model is as it was."""
    model = net(build())
    before = bits(model)
    message = (
        f"expected norms that can become BatchNorms, received 1 that cannot:\n  {reason}\n"
        "leave such a layer as it is with exclude='NAME'"
    )
    with pytest.raises(UnsupportedError, match=exactly(message)):
        normswap.patch(model, "bn", data=data)

    assert bits(model) == before


def test_training_goes_on(data):
    """A compiled model keeps its optimizer, learns on, and what it learned is not undone without a word."""
    model = keras.Sequential([*net(layers.GroupNormalization(2, name="norm")).layers, layers.GlobalAveragePooling2D()])
    model.compile("sgd", "mse")
    model.fit(data[0], np.zeros((16, 4)), verbose=0)
    report = normswap.patch(model, "bn", data=data)
    model.fit(data[0], np.zeros((16, 4)), verbose=0)
    message = (
        "expected untrained replacements, received 1 that have changed since the patch (first: norm); undoing would "
        "lose what they have learned: load the model from before again"
    )
    with pytest.raises(UnsupportedError, match=exactly(message)):
        report.undo()


def test_a_bundle_is_saved_and_loaded(data, tmp_path):
    """A bundle of what had GroupNorms of its own, and of what was patched, holds the BatchNorms."""
    for start in (net(layers.GroupNormalization(2, name="norm")), net(layers.BatchNormalization(name="norm"))):
        if isinstance(start.get_layer("norm"), layers.BatchNormalization):
            normswap.patch(start, "gn")
        normswap.save(normswap.patch(start, "bn", data=data), tmp_path / "bn", overwrite=True)
        loaded = normswap.load(tmp_path / "bn")

        assert isinstance(loaded.get_layer("norm"), layers.BatchNormalization)
        np.testing.assert_array_equal(output(loaded, data[0]), output(start, data[0]))
