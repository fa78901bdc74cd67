"""Calibrating a patched PyTorch model: moments, refitted weights, what is left alone, and refusals."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import normswap
from normswap import GroupNorm
from normswap.errors import InputError, UnsupportedError, VerificationError
from normswap.finetune.calibration.calibrate import calibrate, observe
from normswap.finetune.calibration.least_squares import LinearFit, Moments
from normswap.finetune.calibration.torch.layers import get_weights, linear_layers, patches, set_weights

from ..helpers import exactly
from .models import fingerprint, trained_


def pair(model, target):
    """The model patched, and a copy from before."""
    original = copy.deepcopy(model)
    return normswap.patch(model, target).model, original


def error(model, original, x):
    """Mean square distance of the outputs."""
    with torch.no_grad():
        return float((model(x) - original(x)).square().mean())


@pytest.mark.parametrize("target", ["gn", "in", "sn"])
@pytest.mark.parametrize("refit", [True, False])
def test_each_layer_gets_the_originals_moments(model, images, target, refit):
    """After calibration each replaced layer's output has the original's mean and deviation on those inputs."""
    model, original = pair(model, target)
    residuals = {r.name: r for r in calibrate(model, original, [images[:2], images[2:]], refit=refit)}
    seen = {}
    for net, label in ((model, "new"), (original, "old")):
        net.bn.register_forward_hook(lambda m, i, o, label=label: seen.update({label: o}))
        net(images)

    assert list(residuals) == (["stem.1", "conv", "bn", "head"] if refit else ["stem.1", "bn"])
    assert all(residuals[name].after < 1e-6 <= residuals[name].before for name in ("stem.1", "bn"))
    assert all(r.after <= r.before for r in residuals.values())
    dims = (0, 2, 3)
    torch.testing.assert_close(seen["new"].mean(dims), seen["old"].mean(dims), atol=1e-4, rtol=0)
    torch.testing.assert_close(seen["new"].std(dims), seen["old"].std(dims), atol=1e-4, rtol=1e-4)


def test_refitting_comes_nearer_on_other_inputs(model):
    """The refitted model is nearer to the original than norms alone bring it, also on inputs it was not fitted to."""
    noise = torch.randn(2, 64, 3, 12, 12, generator=torch.Generator().manual_seed(5))
    fitted, other = noise * torch.linspace(0.2, 3, 64)[:, None, None, None] + noise[..., :1, :1]
    patched, original = pair(model, GroupNorm(groups=4))
    plain = copy.deepcopy(patched)
    calibrate(patched, original, [fitted])
    calibrate(plain, original, [fitted], refit=False)

    assert error(patched, original, other) < error(plain, original, other)


def test_what_is_left_alone(model, images):
    """Before the first replaced layer nothing changes, nor where weights are frozen, nor anywhere without refit."""
    model.head.requires_grad_(False)
    model, original = pair(model, "gn")
    calibrate(model, original, [images], refit=False)
    assert torch.equal(model.conv.weight, original.conv.weight)
    calibrate(model, original, [images])

    assert torch.equal(model.stem[0].weight, original.stem[0].weight)
    assert torch.equal(model.head.weight, original.head.weight)
    assert not torch.equal(model.conv.weight, original.conv.weight)


def test_a_function_that_was_kept_stays(model, images):
    """Where the patch changed nothing, calibration changes no weight beyond rounding."""
    model, original = pair(model, normswap.SwitchNorm("exact"))
    calibrate(model, original, [images])

    for name, value in original.conv.state_dict().items():
        torch.testing.assert_close(model.conv.state_dict()[name], value, atol=1e-4, rtol=0)


def test_a_layer_called_twice_is_solved_for_both_calls(images):
    """The moments of a shared layer's calls together are the original's."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.bn(self.conv(self.bn(self.conv(x)).relu()))

    model, original = pair(trained_(Twice()), "gn")
    residuals = calibrate(model, original, [images], refit=False)
    calls = []
    observe(original, ["bn"], images, lambda name, x, y: calls.append(y))

    assert len(calls) == 2
    assert [r.name for r in residuals] == ["bn"]
    assert residuals[0].after < residuals[0].before


def test_batches_may_be_any_iterable(model, images):
    """A one-shot iterator and a list give the same."""
    found = []
    for batches in ([images[:2], images[2:]], iter([images[:2], images[2:]])):
        patched, original = pair(copy.deepcopy(model), "gn")
        calibrate(patched, original, batches)
        found.append(patched(images))

    assert torch.equal(*found)


def test_a_compiled_model(model, images):
    """A model under torch.compile is calibrated as what it wraps, whether the reference is compiled or not."""
    plain, original = pair(copy.deepcopy(model), "gn")
    wrapped = torch.compile(pair(model, "gn")[0], backend="eager")

    assert calibrate(wrapped, original, [images]) == calibrate(plain, torch.compile(original), [images])
    assert all(map(torch.equal, wrapped.parameters(), plain.parameters()))


def test_a_dead_channel_stays_dead(model, images):
    """γ = 0 is kept."""
    nn.init.zeros_(model.bn.weight)
    model, original = pair(model, "gn")
    calibrate(model, original, [images])

    assert torch.count_nonzero(model.bn.weight) == 0


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(6, 5), (2, 4, 6)),
        (nn.Conv1d(3, 5, 3, stride=2, padding=1), (2, 3, 9)),
        (nn.Conv2d(3, 5, (3, 2), dilation=2, padding="same", bias=False), (2, 3, 8, 7)),
        (nn.Conv2d(3, 5, 3, padding=(1, 2), padding_mode="reflect"), (2, 3, 8, 7)),
        (nn.Conv3d(2, 5, 2, stride=(1, 2, 1)), (2, 2, 4, 5, 6)),
    ],
)
def test_patches_times_weights_are_the_layers_output(layer, shape):
    """Each output is its patch times the weights, whatever the rank, padding, stride, dilation and bias."""
    seen = []
    observe(nn.Sequential(layer), ["0"], torch.randn(shape), lambda *call: seen.append(call))
    _, inputs, outputs = seen[0]
    found = np.stack([patches(layer, x) @ get_weights(layer) for x in inputs])
    np.testing.assert_allclose(found.reshape(outputs.shape), outputs, atol=1e-5)

    before = get_weights(layer)
    set_weights(layer, 2 * before)
    np.testing.assert_allclose(get_weights(layer), 2 * before)


def test_layers_that_are_refitted():
    """Groups, a subclass, and a frozen or shared weight or bias stand in the way."""

    class Mine(nn.Conv2d):
        pass

    model = nn.ModuleDict(
        {
            "conv": nn.Conv2d(4, 4, 3),
            "grouped": nn.Conv2d(4, 4, 3, groups=2),
            "mine": Mine(4, 4, 3),
            "frozen": nn.Conv2d(4, 4, 3).requires_grad_(False),
            "tied": nn.Linear(4, 4),
            "twin": nn.Linear(4, 4),
            "frozen_bias": nn.Linear(4, 4),
            "head": nn.Linear(4, 4),
            "tied_bias": nn.Linear(4, 4),
        }
    )
    model["twin"].weight = model["tied"].weight
    model["frozen_bias"].bias.requires_grad_(False)
    model["tied_bias"].bias = model["mine"].bias

    assert list(linear_layers(model)) == ["conv", "head"]


def test_a_linear_fit_finds_the_map():
    """With plenty of inputs the fit nears the map that made the outputs, and reports what is left."""
    rng = np.random.default_rng(0)
    true, start = rng.normal(size=(2, 6, 3))
    fit = LinearFit(start)
    for x in rng.normal(size=(10, 100, 6)):
        fit.add(x, x @ true)
    found, before, after = fit.solve()

    assert np.linalg.norm(found - true) < 0.15 * np.linalg.norm(start - true)
    assert after < 0.15 * before


def test_moments_are_streamed():
    """Moments of a stream are those of everything together, also far from zero."""
    values = np.random.default_rng(0).normal(1e6, 1, (100, 3))
    moments = Moments()
    for part in np.split(values, [10, 11, 60]):
        moments.add(part)

    np.testing.assert_allclose(moments.mean, values.mean(0))
    np.testing.assert_allclose(moments.deviation, values.std(0), rtol=1e-6)


def test_refusals(model, images):
    """No inputs, constant ones and NaN, an unpatched model and a foreign reference are refused, nothing changed."""
    original = copy.deepcopy(model)
    message = "expected a patched model to calibrate, received one without replaced layers"
    with pytest.raises(UnsupportedError, match=exactly(message)):
        calibrate(model, original, [images])
    normswap.patch(model, "gn")
    with pytest.raises(InputError, match=exactly("expected inputs to calibrate on, received none")):
        calibrate(model, original, [])
    state = fingerprint(model)
    message = "expected finite inputs and outputs, received batches on which stem.1 has others"
    with pytest.raises(InputError, match=exactly(message)):
        calibrate(model, original, [images, torch.full_like(images, torch.nan)])
    message = (
        "expected a reference with the layers of the model, which it is before the patch, received one without "
        "stem.0, stem.1, conv, bn, head"
    )
    with pytest.raises(InputError, match=exactly(message)):
        calibrate(model, nn.Conv2d(3, 3, 1), [images])
    assert fingerprint(model) == state
    nn.init.zeros_(model.stem[0].weight)
    before = model.stem[1].weight.clone()
    message = "expected inputs that differ, received batches on which stem.1 is constant"
    with pytest.raises(VerificationError, match=exactly(message)):
        calibrate(model, original, [images])

    assert torch.equal(model.stem[1].weight, before)
