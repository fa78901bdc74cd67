"""PyTorch norms that become BatchNorms: which can, what they then compute, the file, the way out, and refusals."""

import copy

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import normswap
from normswap import BatchNorm, SwitchNorm
from normswap.errors import InputError, UnsupportedError, UsageError
from normswap.layers.torch import BatchRenorm2d, SwitchNorm2d

from ..helpers import exactly
from .models import fingerprint, trained_


@pytest.fixture
def data():
    """Two batches of images that differ in contrast."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(32, 3, 12, 12, generator=generator) * torch.linspace(0.3, 3, 32)[:, None, None, None]
    return list(images.split(16))


def net(norm, channels_last=False):
    """A convolution, a norm of eight channels with scales of its own, and another convolution."""
    torch.manual_seed(0)
    for name, low, high in (("weight", 0.5, 2.0), ("bias", -1.0, 1.0), ("running_var", 0.5, 2.0)):
        if isinstance(tensor := getattr(norm, name, None), torch.Tensor):
            tensor.data.uniform_(low, high)
    body = [Moved(norm)] if channels_last else [norm]
    return nn.Sequential(nn.Conv2d(3, 8, 3), *body, nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()


class Moved(nn.Module):
    """A norm of channels that come last, as ConvNeXt has it."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x):
        """Normalize (N, C, H, W)."""
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class LayerNorm2d(nn.LayerNorm):
    """A LayerNorm over the channels of maps as timm and torchvision write it."""

    def forward(self, x):
        """Normalize (N, C, H, W)."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


NORMS = {
    "gn": lambda: nn.GroupNorm(2, 8),
    "one group": lambda: nn.GroupNorm(1, 8, eps=1e-3),
    "no affine": lambda: nn.GroupNorm(2, 8, affine=False),
    "in": lambda: nn.InstanceNorm2d(8, affine=True),
    "in without affine": lambda: nn.InstanceNorm2d(8),
    "sn": lambda: SwitchNorm2d(8),
    "sn none": lambda: SwitchNorm2d(8, batch_statistics="none"),
}


@pytest.mark.parametrize("kind", NORMS)
def test_each_norm_becomes_its_line(kind, data):
    """The BatchNorm has the norm's mean and deviation in every channel, and the drop is the share that is left."""
    model = net(NORMS[kind]())
    seen = []
    model[1].register_forward_hook(lambda m, i, o: seen.append((i[0], o)))
    model(torch.cat(data))
    report = normswap.patch(model, "bn", data=data)
    model(torch.cat(data))
    (x, y), (same, line) = seen[0], seen[-1]

    assert type(model[1]) is nn.BatchNorm2d
    torch.testing.assert_close(same, x)
    dims = (0, 2, 3)
    torch.testing.assert_close(line.mean(dims), y.mean(dims), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(line.std(dims), y.std(dims), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model[1].running_mean, x.mean(dims))
    torch.testing.assert_close(model[1].running_var, x.var(dims, correction=0))
    (drop,) = report.drops
    left = (line - y).square().mean(dims).sum() / y.var(dims, correction=0).sum()
    assert drop.before == pytest.approx(left.sqrt().item(), rel=1e-4)
    assert drop.after == pytest.approx(drop.before, rel=1e-4)


@pytest.mark.parametrize("kind", ["gn", "in", "sn"])
def test_the_file_has_no_norm(kind, data, tmp_path):
    """What precedes it takes the BatchNorm in, and the file is proved."""
    model = net(NORMS[kind]())
    normswap.patch(model, "bn", data=data)
    written = normswap.to_onnx(model, tmp_path / "m.onnx", example=data[0])

    assert written.folded == {"1": "Conv"}
    assert written.verdict
    assert [node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node] == ["Conv", "Relu", "Conv"]


@pytest.mark.parametrize("kind", NORMS)
def test_undo_restores_every_bit(kind, data):
    """The layer's class, contents and values come back, the same objects as before."""
    model = net(NORMS[kind]()).train()
    before, state, parameters = fingerprint(model), copy.copy(vars(model[1])), list(model.parameters())
    kept = {name: copy.copy(state[name]) for name in ("_parameters", "_buffers")}
    cls = type(model[1])
    report = normswap.patch(model, "bn", data=data)
    assert fingerprint(model) != before
    assert model[1].training

    report.undo()
    assert fingerprint(model) == before
    assert type(model[1]) is cls
    assert vars(model[1]).keys() == state.keys()
    assert {name: vars(model[1])[name] for name in kept} == kept
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))


def test_the_optimizers_parameters_stay(data):
    """γ and β are the same objects, so that an optimizer made before goes on training them, and training is lost last.

    What was trained since is not undone without a word.
    """
    model = net(nn.GroupNorm(2, 8))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    report = normswap.patch(model, "bn", data=data)
    model(data[0]).square().mean().backward()
    before = model[1].weight.clone()
    optimizer.step()

    assert not torch.equal(model[1].weight, before)
    message = (
        "expected untrained replacements, received 1 that have changed since the patch (first: 1); undoing would lose "
        "what they have learned: load the model from before again"
    )
    with pytest.raises(UnsupportedError, match=exactly(message)):
        report.undo()


def test_there_and_back(model, images):
    """A patched network whose BatchNorms come back loads their weights as they are, and can be patched again."""
    original = copy.deepcopy(model)
    there = normswap.patch(model, "gn")
    gn = fingerprint(model)
    data = [torch.randn(32, 3, 12, 12)]
    report = normswap.patch(model, "bn", data=data)
    assert [type(layer) for layer in (model.stem[1], model.bn)] == [nn.BatchNorm2d] * 2
    assert model.state_dict().keys() == original.state_dict().keys()
    assert report.drift(images)[-1].rms > 0

    again = copy.deepcopy(model)
    again.load_state_dict(original.state_dict())
    assert fingerprint(again) == fingerprint(original)
    assert normswap.patch(again, "gn").summary == "2 replaced, 0 already patched, 0 skipped"
    assert fingerprint(again) == gn
    report.undo()
    assert fingerprint(model) == gn
    there.undo()
    assert fingerprint(model) == fingerprint(original)


@pytest.mark.parametrize(
    "build",
    [lambda: BatchRenorm2d(8), lambda: exactly_batch(SwitchNorm2d(8)), lambda: tracked(nn.InstanceNorm2d)],
    ids=["brn", "sn of the batch", "in with running statistics"],
)
def test_what_is_a_batch_norm_needs_no_data(build):
    """A norm that computes by constants at inference becomes the BatchNorm with those, to the last bit or nearly."""
    model, x = net(build()), torch.randn(2, 3, 12, 12)
    before = model(x)
    report = normswap.patch(model, "bn")

    assert type(model[1]) is nn.BatchNorm2d
    assert report.drops == ()
    torch.testing.assert_close(model(x), before, atol=1e-6, rtol=1e-6)


def exactly_batch(norm):
    """The layer with its gates closed but for the batch's."""
    for logits in (norm.mean_weight, norm.var_weight):
        logits.data = torch.tensor([0.0, 0.0, 1.0])
    norm.harden()
    return norm


def tracked(cls):
    """An InstanceNorm that keeps running statistics."""
    return cls(8, affine=True, track_running_stats=True)


class TestChannels:
    def test_last(self, data, tmp_path):
        """A LayerNorm over channels that come last becomes a BatchNorm of those, folds, and goes back."""
        model = net(nn.LayerNorm(8), channels_last=True)
        y, before = model(data[0]), fingerprint(model)
        report = normswap.patch(model, "bn", data=data)
        norm = model[1].norm
        moved = torch.randn(4, 5, 6, 8)
        plain = nn.functional.batch_norm(
            moved.movedim(-1, 1), norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
        )

        torch.testing.assert_close(norm(moved), plain.movedim(1, -1))
        assert report.replaced[0].site.spatial == (10, 10)
        assert 0 < report.drops[0].after < 1
        normswap.to_onnx(model, tmp_path / "m.onnx", example=data[0])
        operators = [node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node]
        assert operators == ["Conv", "Relu", "Conv"]
        report.undo()
        assert fingerprint(model) == before
        torch.testing.assert_close(model(data[0]), y)

    def test_last_of_a_dense_layer_folds(self, tmp_path):
        """Behind a dense layer it goes into that, on tokens too."""
        model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 3)).eval()
        x = torch.randn(32, 5, 6)
        normswap.patch(model, "bn", data=[x])
        written = normswap.to_onnx(model, tmp_path / "m.onnx", example=x)

        assert list(written.folded.values()) == ["MatMul"]
        assert not [n for n in onnx.load(tmp_path / "m.onnx").graph.node if "Norm" in n.op_type]

    def test_in_features(self):
        """On (N, C) it is a BatchNorm1d."""
        model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8)).eval()
        normswap.patch(model, "bn", data=[torch.randn(32, 6)])

        assert type(model[1]) is nn.BatchNorm1d

    @pytest.mark.parametrize("module", ["timm.layers.norm", "torchvision.models.convnext"])
    def test_of_known_classes(self, module, data, monkeypatch):
        """LayerNorm2d of timm and of torchvision are known to normalize the channels of maps."""
        monkeypatch.setattr(LayerNorm2d, "__module__", module)
        model = net(LayerNorm2d(8))
        normswap.patch(model, "bn", data=data)

        assert type(model[1]) is nn.BatchNorm2d


class WithActivation(nn.GroupNorm):
    """A GroupNorm with a ReLU of its own."""

    def forward(self, x):
        """Normalize and clip."""
        return super().forward(x).relu()


class Skipping(nn.Module):
    """A network with a norm that inference does not reach."""

    def __init__(self):
        super().__init__()
        self.norm, self.unused = nn.GroupNorm(1, 3), nn.GroupNorm(1, 3)

    def forward(self, x):
        """Normalize by one of the two."""
        return self.norm(x)


OVER_POSITIONS = (
    "a LayerNorm over positions (normalized_shape=(3, 12, 12)) scales each by itself, a BatchNorm only channels: put a "
    "GroupNorm of one group in its place and train it"
)


def refused(line):
    """The whole message about one norm."""
    return (
        f"expected norms that can become BatchNorms, received 1 that cannot:\n  {line}\n"
        "leave such a layer as it is with exclude='NAME'"
    )


class TestRefusals:
    @pytest.mark.parametrize(
        ("build", "options", "error", "message"),
        [
            (
                lambda: nn.Sequential(nn.GroupNorm(1, 3), nn.InstanceNorm2d(3)),
                {},
                UsageError,
                "expected data to fit BatchNorms to, which 2 norms (first: 0) cannot do without, received data=None; a "
                "few hundred images without labels do",
            ),
            (
                lambda: nn.Sequential(nn.GroupNorm(1, 3)),
                {"data": [torch.randn(8, 3, 12, 12), torch.randn(7, 3, 12, 12)]},
                InputError,
                "expected at least 16 inputs to fit BatchNorms to, received 15; give more: 256 are good",
            ),
            (
                lambda: nn.Sequential(nn.GroupNorm(1, 3)),
                {"data": torch.randn(3, 12, 12).expand(16, -1, -1, -1)},
                InputError,
                "expected inputs that differ, received 16 that are all the same; give images as the model will see "
                "them",
            ),
            (
                lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.GroupNorm(1, 3)).apply(zeroed),
                {"data": torch.randn(16, 3, 12, 12)},
                InputError,
                "expected inputs that differ, received some on which every channel of 1 is constant; give images as "
                "the model will see them, or leave the layer as it is with exclude='1'",
            ),
            (
                lambda: nn.Sequential(nn.GroupNorm(1, 3)),
                {"data": [torch.randn(16, 3, 12, 12), torch.full((2, 3, 12, 12), torch.nan)]},
                InputError,
                "expected finite inputs, received NaN or infinity in 864 of 864 values of batch 1; leave such images "
                "out",
            ),
            (
                lambda: nn.Sequential(nn.GroupNorm(1, 3)),
                {"data": torch.randn(16, 3, 8, 8), "example": torch.randn(2, 3, 12, 12)},
                InputError,
                "expected inputs of the example's size, 3x12x12 each, received 3x8x8 in batch 0; resize them",
            ),
            (
                lambda: nn.Sequential(nn.GroupNorm(1, 3), nn.Flatten(), nn.Linear(432, 2)),
                {"data": torch.randn(16, 3, 8, 8)},
                InputError,
                "expected batches of inputs alone, as the model takes them, received one of (3, 8, 8) on which it "
                "fails: mat1 and mat2 shapes cannot be multiplied (16x192 and 432x2)",
            ),
            (
                lambda: nn.Sequential(nn.InstanceNorm2d(3)),
                {"data": [torch.randn(16, 3, 12, 12), torch.randn(3, 12, 12)]},
                InputError,
                "expected inputs with a batch, in which axis 1 of what 0 is given holds its 3 channels, received "
                "shape=(3, 12, 12) there",
            ),
            (
                Skipping,
                {"data": torch.randn(16, 3, 12, 12)},
                UnsupportedError,
                "expected inputs that reach every norm, received some that do not reach unused; give others, or leave "
                "such a layer as it is with exclude='unused'",
            ),
            (
                lambda: nn.Sequential(nn.LayerNorm([3, 12, 12])),
                {"data": torch.randn(16, 3, 12, 12)},
                UnsupportedError,
                refused(f"0 (LayerNorm): {OVER_POSITIONS}"),
            ),
            (
                lambda: nn.Sequential(WithActivation(1, 3)),
                {"data": torch.randn(16, 3, 12, 12)},
                UnsupportedError,
                refused(
                    "0 (WithActivation): WithActivation overrides forward, which a BatchNorm would lose: put a plain "
                    "norm and what it adds in its place"
                ),
            ),
            (
                lambda: nn.Sequential(nn.BatchNorm2d(3)),
                {"data": torch.randn(16, 3, 12, 12)},
                UnsupportedError,
                "expected a model with norms to make BatchNorms of, received 1 norm, all skipped (a BatchNorm "
                "already); BatchNorm(reestimate=True) measures the running statistics of BatchNorms anew",
            ),
            (
                lambda: nn.Sequential(nn.BatchNorm2d(3)),
                {"target": "gn", "data": torch.randn(16, 3, 12, 12)},
                UsageError,
                "expected data beside the target 'bn', whose BatchNorms are fitted to them, received data beside "
                "target='gn'; leave them out",
            ),
            (
                lambda: nn.Sequential(nn.GroupNorm(1, 3)),
                {"exclude": "bn*", "data": torch.randn(16, 3, 12, 12)},
                InputError,
                "expected a pattern that matches a norm, received 'bn*'; names begin 0",
            ),
        ],
    )
    def test_a_refused_model_is_untouched(self, build, options, error, message):
        """Whatever is refused is told in full, and the whole model is as it was."""
        model = trained_(build())
        before, types = fingerprint(model), [type(module) for module in model.modules()]
        with pytest.raises(error, match=exactly(message)):
            normswap.patch(model, **{"target": "bn", **options})

        assert fingerprint(model) == before
        assert [type(module) for module in model.modules()] == types

    def test_both_ways_at_once(self):
        """Rules that make BatchNorms and take others out ask for two patches."""
        rules = normswap.Rules((normswap.Rule(BatchNorm(), match="0"), normswap.Rule(SwitchNorm())))
        message = "expected layers that all become bn, or none that does, received bn, sn in one rules; patch twice"
        with pytest.raises(InputError, match=exactly(message)):
            normswap.plan(nn.Sequential(nn.GroupNorm(1, 3), nn.BatchNorm2d(3)), rules)


def zeroed(module):
    """Make a convolution return zeros."""
    if isinstance(module, nn.Conv2d):
        nn.init.zeros_(module.weight)
        nn.init.zeros_(module.bias)


class TestReestimate:
    def test_statistics_are_those_of_the_data(self, model, data):
        """In one pass each BatchNorm gets the mean and variance of what the measured ones before it hand on."""
        x = torch.cat(data)
        affine = [layer.weight.clone() for layer in (model.stem[1], model.bn)]
        before = fingerprint(model)
        report = normswap.patch(model, BatchNorm(reestimate=True), data=[x])
        seen = {}
        for name, layer in (("stem", model.stem[1]), ("bn", model.bn)):
            layer.register_forward_pre_hook(lambda m, i, name=name: seen.update({name: i[0]}))
        model(x)

        for name, layer, weight in zip(seen, (model.stem[1], model.bn), affine, strict=True):
            torch.testing.assert_close(layer.running_mean, seen[name].mean((0, 2, 3)), atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(layer.running_var, seen[name].var((0, 2, 3), correction=0), atol=1e-5, rtol=1e-4)
            assert torch.equal(layer.weight, weight)
        assert report.drift(x)[-1].rms > 0
        report.undo()
        assert fingerprint(model) == before

    def test_behind_a_norm_that_becomes_one(self, data):
        """A BatchNorm behind a converted norm is measured with that in place."""
        model = nn.Sequential(nn.GroupNorm(1, 3), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
        report = normswap.patch(model, BatchNorm(reestimate=True), data=data)
        x = model[:2](torch.cat(data))

        torch.testing.assert_close(model[2].running_mean, x.mean((0, 2, 3)), atol=1e-5, rtol=1e-4)
        assert [decision.note for decision in report.replaced] == ["", "running statistics measured anew"]

    def test_others_stay(self, data):
        """Unless it is asked for, a BatchNorm that is there keeps its statistics."""
        model = nn.Sequential(nn.GroupNorm(1, 3), nn.BatchNorm2d(3)).eval()
        report = normswap.patch(model, "bn", data=data)

        assert torch.equal(model[1].running_mean, torch.zeros(3))
        assert [decision.note for decision in report.skipped] == ["a BatchNorm already"]


def test_inputs_of_every_form_are_data(data):
    """An iterator, a list, one tensor and mappings give the same BatchNorms."""

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = net(nn.GroupNorm(2, 8))

        def forward(self, image):
            return self.body(image)

    made = []
    for form in (data, iter(data), [{"image": part} for part in data], [normswap.Inputs(part) for part in data]):
        model = Named().eval()
        normswap.patch(model, "bn", data=form)
        made.append(fingerprint(model))
    whole = Named().eval()
    normswap.patch(whole, "bn", data=torch.cat(data))

    assert len(set(made)) == 1
    np.testing.assert_allclose(whole.body[1].bias.detach(), model.body[1].bias.detach(), rtol=1e-5, atol=1e-6)


def test_a_recipe_replays(data):
    """On a fresh copy, with the same data, a report's recipe makes the same model bit for bit, also through JSON."""
    model = net(nn.GroupNorm(2, 8))
    report = normswap.patch(model, "bn", data=data)
    recipe = normswap.Recipe.from_json(report.recipe.to_json())
    twin = net(nn.GroupNorm(2, 8))

    assert normswap.plan(twin, recipe).recipe() == recipe
    normswap.patch(twin, recipe, data=data)
    assert fingerprint(twin) == fingerprint(model)


def test_a_copy_is_patched_where_it_is_asked_for(data):
    """``inplace=False`` leaves the model and patches a copy."""
    model = net(nn.GroupNorm(2, 8))
    report = normswap.patch(model, "bn", data=data, inplace=False)

    assert type(model[1]) is nn.GroupNorm
    assert type(report.model[1]) is nn.BatchNorm2d


def test_what_load_returned_goes_back_and_is_saved(tmp_path, data):
    """A model from a bundle that became BatchNorms is saved with all that the bundle knew."""
    build = lambda: net(nn.BatchNorm2d(8))  # noqa: E731
    normswap.save(normswap.patch(build(), "gn"), tmp_path / "gn")
    model = normswap.load(tmp_path / "gn", model=build())
    report = normswap.patch(model, "bn", data=data)
    normswap.save(report, tmp_path / "bn")
    loaded = normswap.load(tmp_path / "bn", model=build())

    assert fingerprint(loaded) == fingerprint(model)


@pytest.mark.parametrize(
    "build", [lambda: net(nn.GroupNorm(2, 8)), lambda: net(nn.LayerNorm(8), channels_last=True)], ids=["gn", "ln"]
)
def test_a_model_with_norms_of_its_own_is_saved_and_loaded(build, tmp_path, data):
    """A bundle of a model that had other norms builds BatchNorms in their place before it loads their values."""
    model = build()
    normswap.save(normswap.patch(model, "bn", data=data), tmp_path / "bn")
    loaded = normswap.load(tmp_path / "bn", model=build())

    assert fingerprint(loaded) == fingerprint(model)
    assert torch.equal(loaded(data[0]), model(data[0]))


def test_what_a_subclass_adds_stays(data):
    """An activation that a BatchNorm's class added runs on what the norm's, and again the BatchNorm's, output is."""
    normswap.register_batch_norm(WithReLU, clip)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), trained_(WithReLU(8))).eval()
    original = copy.deepcopy(model)
    normswap.patch(model, "brn")
    normswap.patch(model, "bn")
    assert type(model[1]) is nn.BatchNorm2d
    torch.testing.assert_close(model(data[0]), original(data[0]))

    normswap.patch(model, "gn")
    report = normswap.patch(model, "bn", data=data)
    assert report.drops[0].after == pytest.approx(report.drops[0].before, rel=1e-4)
    assert model(data[0]).min() == 0


class WithReLU(nn.BatchNorm2d):
    """A BatchNorm with a ReLU of its own."""

    def forward(self, x):
        """Normalize and clip."""
        return super().forward(x).relu()


def clip(module, y):
    """What it adds."""
    return y.relu()
