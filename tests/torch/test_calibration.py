"""Calibrating a patched PyTorch model: what is solved, what is refitted, what is left alone, and refusals."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import normswap
from normswap import GroupNorm
from normswap.errors import InputError, UnsupportedError, VerificationError, command_line
from normswap.finetune import update_statistics
from normswap.finetune.calibration import refit
from normswap.finetune.calibration.calibrate import calibrate
from normswap.finetune.calibration.least_squares import LinearFit, Moments
from normswap.finetune.calibration.torch.layers import (
    get_weights,
    left_layers,
    linear_layers,
    picked,
    rows,
    set_weights,
)

from ..helpers import exactly
from .models import trained_


@pytest.fixture
def inputs():
    """Sixty-four samples that differ in brightness and contrast, as images do, in two batches."""
    random = torch.Generator().manual_seed(5)
    noise = torch.randn(64, 3, 12, 12, generator=random)
    varied = noise * torch.linspace(0.3, 2, 64)[torch.randperm(64, generator=random), None, None, None]
    return list((varied + torch.randn(64, 3, 1, 1, generator=random)).split(32))


def pair(model, target, example=None):
    """The model patched, and a copy from before."""
    original = copy.deepcopy(model)
    return normswap.patch(model, target, example=example).model, original


def error(model, original, x):
    """Mean square distance of the outputs."""
    with torch.no_grad():
        return float((model(x) - original(x)).square().mean())


@pytest.mark.parametrize("target", ["gn", "in", "sn", GroupNorm(groups=2)])
@pytest.mark.parametrize("equalize", [True, "scale", False])
def test_it_comes_nearer_on_other_inputs(model, inputs, target, equalize):
    """The output is nearer to the original's on inputs that nothing was fitted to, and no layer is further off."""
    original = copy.deepcopy(model)
    report = normswap.patch(model, target, example=inputs[0], equalize=equalize)
    fresh = inputs[0].flip(0) * 0.9 + 0.1
    before = error(model, original, fresh)
    residuals = calibrate(report, [inputs[0], inputs[1]])

    assert [r.name for r in residuals] == ["stem.1", "bn", "output"]
    assert all(r.after <= r.before for r in residuals[:-1])
    closer = 1.1 if target == "sn" else 1.0  # which starts at the original
    assert error(model, original, fresh) < closer * before
    assert residuals[-1].after < closer * residuals[-1].before


def test_a_report_or_the_original(model, inputs):
    """The same comes of a report, which knows the original, and of the model and a copy from before."""
    twin, original = copy.deepcopy(model), copy.deepcopy(model)
    report = normswap.patch(model, "gn", example=inputs[0])
    normswap.patch(twin, "gn", example=inputs[0])

    found = calibrate(report, inputs)
    assert found == calibrate(twin, original, inputs)
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=1e-4, atol=1e-5)


def test_a_calibrated_patch_can_be_undone(model, inputs, monkeypatch):
    """`undo` brings every bit back after a calibration, refitted layers too, and `drift` tells of it before."""
    monkeypatch.setattr(refit, "WORTH", 0.0)
    original = copy.deepcopy(model)
    report = normswap.patch(model, GroupNorm(groups=8), example=inputs[0])
    drift = report.drift(inputs[0])[-1].rms
    calibrate(report, inputs)

    assert not torch.equal(model.head.weight, original.head.weight)
    assert report.drift(inputs[0])[-1].rms < drift
    report.undo()
    assert all(map(torch.equal, model.state_dict().values(), original.state_dict().values()))
    assert model.state_dict().keys() == original.state_dict().keys()


def test_refitting_is_kept_as_far_as_it_helps(model, inputs, monkeypatch):
    """The refitted model is at least as near on the inputs kept aside as the solved one; without refit others stay."""
    monkeypatch.setattr(refit, "WORTH", 0.0)
    model, original = pair(model, GroupNorm(groups=4), inputs[0])
    plain = copy.deepcopy(model)

    refitted, solved = calibrate(model, original, inputs)[-1], calibrate(plain, original, inputs, refit=False)[-1]

    assert refitted.after <= solved.after
    assert torch.equal(plain.head.weight, original.head.weight)


def test_frozen_layers_stay(model, inputs, monkeypatch):
    """A frozen layer is not refitted."""
    monkeypatch.setattr(refit, "WORTH", 0.0)
    model.head.requires_grad_(False)
    model, original = pair(model, GroupNorm(groups=4), inputs[0])
    calibrate(model, original, inputs)

    assert torch.equal(model.head.weight, original.head.weight)


def test_a_layer_called_twice_is_solved_for_both_calls():
    """A shared layer is solved for the samples of all its calls."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.bn(self.conv(self.bn(self.conv(x)).relu()))

    model, original = pair(trained_(Twice()), "gn")
    images = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    residuals = calibrate(model, original, [images], refit=False)

    assert [r.name for r in residuals] == ["bn", "output"]
    assert residuals[0].after < residuals[0].before


def test_batches_may_be_any_iterable(model, inputs):
    """A one-shot iterator and a list give the same, and the size of batches makes no difference but rounding."""
    found = []
    for batches in (inputs, iter(inputs), torch.cat(inputs).split(16)):
        patched, original = pair(copy.deepcopy(model), "gn", inputs[0])
        calibrate(patched, original, batches, refit=False)
        found.append(patched(inputs[0]))

    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[0], found[2], rtol=1e-3, atol=1e-4)


def test_an_array_is_one_batch(model, inputs):
    """It is not its samples, wherever batches are taken."""
    x = torch.cat(inputs)
    found = []
    for batches in ([x], x, x.numpy()):
        report = normswap.patch(copy.deepcopy(model), "gn")
        residuals = normswap.calibrate(report, batches)
        update_statistics(original := copy.deepcopy(model), batches)
        drops = normswap.patch(report.model, "bn", data=batches).drops
        found.append((residuals, original.state_dict()["bn.running_var"].tolist(), drops))

    assert found[0] == found[1] == found[2]


def test_what_ends_it_early_leaves_the_model(model, inputs):
    """Whenever that comes, also after the norms are solved, and the patch can still be undone."""
    before = copy.deepcopy(model.state_dict())

    class Ending:
        """Batches that end with an exception after so many."""

        def __init__(self, left):
            self.left = left

        def __iter__(self):
            for batch in inputs:
                self.left -= 1
                if not self.left:
                    raise KeyboardInterrupt
                yield batch

    for left in range(1, 12):
        report = normswap.patch(model, "gn", example=inputs[0])
        patched = copy.deepcopy(model.state_dict())
        batches = Ending(left)
        try:
            normswap.calibrate(report, batches)
        except KeyboardInterrupt:
            pass
        else:
            break
        assert all(torch.equal(value, patched[name]) for name, value in model.state_dict().items())
        report.undo()
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert left > 4


@pytest.mark.parametrize("batches", [None, 3, "images.npz"])
def test_what_has_no_batches(model, batches):
    """It is refused by name."""
    report = normswap.patch(copy.deepcopy(model), "gn")
    message = f"expected batches of inputs as the model takes them, received {batches!r}"
    for take in (normswap.calibrate, lambda report, given: update_statistics(model, given)):
        with pytest.raises(InputError, match=exactly(message)):
            take(report, batches)


def test_a_compiled_model(model, inputs):
    """A model under torch.compile is calibrated as what it wraps, whether the original is compiled or not."""
    plain, original = pair(copy.deepcopy(model), "gn", inputs[0])
    wrapped = torch.compile(pair(model, "gn", inputs[0])[0], backend="eager")

    assert calibrate(wrapped, original, inputs) == calibrate(plain, torch.compile(original), inputs)
    assert all(map(torch.equal, wrapped.parameters(), plain.parameters()))


def test_a_dead_channel_stays_dead(model, inputs):
    """γ = 0 is kept."""
    nn.init.zeros_(model.bn.weight)
    model, original = pair(model, "gn", inputs[0])
    calibrate(model, original, inputs)

    assert torch.count_nonzero(model.bn.weight) == 0


class Padded(nn.Conv2d):
    """A convolution that pads by itself, as timm's and efficientnet's "same" ones do."""

    def forward(self, x):
        return nn.functional.conv2d(nn.functional.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(6, 5), (2, 4, 6)),
        (nn.Linear(6, 5), (2, 6)),
        (nn.Conv1d(3, 5, 3, stride=2, padding=1), (2, 3, 9)),
        (nn.Conv2d(3, 5, (3, 2), dilation=2, padding="same", bias=False), (2, 3, 8, 7)),
        (nn.Conv2d(3, 5, 3, padding=(1, 2), padding_mode="reflect"), (2, 3, 8, 7)),
        (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 8, 7)),
        (nn.Conv2d(4, 4, 3, groups=4), (2, 4, 8, 7)),
        (Padded(3, 5, 3, stride=2), (2, 3, 8, 8)),
        (nn.Conv3d(2, 5, 2, stride=(1, 2, 1)), (2, 2, 4, 5, 6)),
    ],
)
def test_rows_times_weights_are_the_layers_output(layer, shape):
    """Each output is its window times the weights, whatever the rank, padding, stride, groups and bias."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    y = layer(x).detach()
    for count in (3, 10_000):
        np.testing.assert_allclose(rows(layer, x, y, count) @ get_weights(layer), picked(layer, y, count), atol=1e-5)
    assert picked(layer, y, 10_000).size == y.numel()

    before = get_weights(layer)
    set_weights(layer, 2 * before)
    np.testing.assert_allclose(get_weights(layer), 2 * before)


def test_layers_that_are_refitted():
    """Subclasses and grouped convolutions are; a frozen or shared weight or bias stands in the way."""
    model = nn.ModuleDict(
        {
            "conv": nn.Conv2d(4, 4, 3),
            "grouped": nn.Conv2d(4, 4, 3, groups=2),
            "mine": Padded(4, 4, 3),
            "frozen": nn.Conv2d(4, 4, 3).requires_grad_(False),
            "tied": nn.Linear(4, 4),
            "twin": nn.Linear(4, 4),
            "frozen_bias": nn.Linear(4, 4),
            "head": nn.Linear(4, 4),
            "tied_bias": nn.Linear(4, 4),
            "turned": nn.ConvTranspose2d(4, 4, 3),
        }
    )
    model["twin"].weight = model["tied"].weight
    model["frozen_bias"].bias.requires_grad_(False)
    model["tied_bias"].bias = model["frozen"].bias

    model["wide"] = nn.Linear(8192, 1)
    model["computed"] = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    shared = "its parameters are those of another layer, too"

    assert list(linear_layers(model)) == ["conv", "grouped", "mine", "head"]
    assert left_layers(model) == {
        "frozen": shared,
        "tied": shared,
        "twin": shared,
        "frozen_bias": "it is frozen",
        "tied_bias": shared,
        "turned": "it is a transposed convolution",
        "wide": "each of its outputs has 8192 inputs, too many",
        "computed": "its weight is computed, by a parametrization or a hook",
    }


class Standardized(nn.Conv2d):
    """A convolution whose output is no linear function of its weight."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias)


class Enlarged(nn.Conv2d):
    """A convolution that makes a larger map of its output."""

    def forward(self, x):
        return nn.functional.interpolate(super().forward(x), scale_factor=2)


class Clipped(nn.Linear):
    """A linear layer that does more."""

    def forward(self, x):
        return super().forward(x).relu()


def test_classes_that_compute_more_are_left(inputs, monkeypatch):
    """A layer whose output is not its weights times its input is calibrated around and keeps its weights."""
    monkeypatch.setattr(refit, "WORTH", 0.0)
    parts = [Standardized(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3), Enlarged(4, 4, 4), nn.Flatten()]
    parts += [Clipped(400, 9)]
    model = nn.Sequential(*parts, nn.Linear(9, 3)).eval()
    original = copy.deepcopy(model)
    x = inputs[0]
    assert rows(model[0], x, model[0](x), 5) is None
    model[4].turned = nn.ConvTranspose2d(3, 3, 3)
    residuals = calibrate(normswap.patch(model, "gn", example=x), inputs)
    more = "it computes something else than its weights times its input"
    assert residuals.left == {"4.turned": "it is a transposed convolution", "0": more, "3": more, "5": more}

    left = [
        now is not None and torch.equal(now, was) for now, was in zip(*map(_weights, (model, original)), strict=True)
    ]
    assert left == [True, False, True, True, False]


def _weights(model):
    return [layer.weight for layer in model if isinstance(layer, nn.Linear | nn.Conv2d)]


def test_a_linear_fit_finds_the_map():
    """With plenty of inputs the fit nears the map that made the outputs, group by group, or half of the way."""
    rng = np.random.default_rng(0)
    true, start = rng.normal(size=(2, 2, 6, 3))
    fit = LinearFit(start)
    for x in rng.normal(size=(10, 2, 100, 6)):
        fit.add(x, x @ true)

    assert np.linalg.norm(fit.solve(0.1) - true) < 0.15 * np.linalg.norm(start - true)
    np.testing.assert_allclose(fit.solve(0.1, 0.5), (fit.solve(0.1) + start) / 2)


def test_moments_are_streamed():
    """Moments of a stream are those of everything together, also far from zero."""
    values = np.random.default_rng(0).normal(1e6, 1, (100, 3))
    moments = Moments()
    for part in np.split(values, [10, 11, 60]):
        moments.add(part)

    np.testing.assert_allclose(moments.mean, values.mean(0))
    np.testing.assert_allclose(moments.deviation, values.std(0), rtol=1e-6)


def _refusals():
    nan = torch.full((16, 3, 12, 12), float("nan"))
    yield (
        "few",
        [torch.randn(3, 3, 12, 12)],
        InputError,
        ("expected 16 or more inputs to calibrate on, received 3; a few hundred are good"),
    )
    yield "none", [], InputError, "expected 16 or more inputs to calibrate on, received 0; a few hundred are good"
    yield "nan", [nan], InputError, "expected finite inputs and outputs, received batches on which stem.1 has others"
    yield (
        "constant",
        [torch.ones(16, 3, 12, 12)],
        VerificationError,
        ("expected inputs that differ, received batches on which stem.1 is constant"),
    )


@pytest.mark.parametrize(("case", "batches", "kind", "message"), _refusals())
def test_refused_inputs(model, case, batches, kind, message):
    """Too few, none, NaN and constant inputs are refused, and the model stays what it is."""
    model, original = pair(model, "gn", torch.randn(2, 3, 12, 12))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(kind, match=exactly(message)):
        calibrate(model, original, batches)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_refused_models(model, inputs):
    """An unpatched model, a foreign original, a trained model and images of another kind are refused by name."""
    original = copy.deepcopy(model)
    with pytest.raises(
        UnsupportedError, match=exactly("expected a patched model to calibrate, received one without replaced layers")
    ):
        calibrate(model, original, inputs)
    report = normswap.patch(model, "gn", example=inputs[0])
    message = (
        "expected an original with the layers of the model, which it is before the patch, received one without stem.1, "
        "bn"
    )
    with pytest.raises(InputError, match=exactly(message)):
        calibrate(model, nn.Sequential(nn.BatchNorm2d(3)), inputs)
    message = "expected an original whose stem.1 is the BatchNorm that was replaced, received GroupNorm"
    with pytest.raises(InputError, match=exactly(message)):
        calibrate(model, model, inputs)
    with pytest.raises(InputError, match="expected inputs the model accepts"):
        calibrate(model, original, [torch.randn(32, 5, 12, 12)])
    message = (
        "expected calibrate(report, batches) or calibrate(model, original, batches), received a model without a report "
        "and no batches"
    )
    with pytest.raises(TypeError, match=exactly(message)):
        calibrate(model, inputs)
    with torch.no_grad():
        model.stem[0].weight += 0.1 * torch.randn(model.stem[0].weight.shape)
    message = (
        "expected a model that has not changed since the patch, received one whose stem.0 has; calibrate before "
        "training, and once"
    )
    with pytest.raises(UnsupportedError, match=exactly(message)):
        calibrate(model, original, inputs)
    with pytest.raises(UnsupportedError, match="expected untrained replacements"):
        calibrate(report, inputs)


def test_a_norm_that_never_runs(inputs):
    """A replaced layer that the inputs do not reach is refused with the way out."""

    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.spare = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.norm(self.conv(x))

    model, original = pair(trained_(Spare()), "gn")
    message = "expected inputs on which every replaced layer runs, received batches on which spare does not; patch"
    with pytest.raises(InputError, match=exactly(f"{message} without it: exclude='spare'")):
        calibrate(model, original, inputs)
    with command_line(), pytest.raises(InputError, match=exactly(f"{message} without it: --exclude spare")):
        calibrate(model, original, inputs)
