"""BatchNorms that are more, or less, than a BatchNorm."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import normswap
from normswap.convert.targets import as_target
from normswap.errors import NormswapWarning, UnsupportedError
from normswap.layers.torch import SwitchNorm1d, SwitchNorm2d, SwitchNorm3d
from normswap.patchers.torch import subclasses as registry
from normswap.patchers.torch.batch_norm import epsilon_of

from ..helpers import exactly, refusal
from .models import TARGETS, FrozenBatchNorm2d, WithActivation, batch_norms, trained_


class BatchNormAct2d(nn.BatchNorm2d):
    """A BatchNorm with dropout and an activation in it, built and named as timm's is."""

    __module__ = "timm.layers.norm_act"

    def __init__(self, channels):
        super().__init__(channels)
        self.drop = nn.Dropout(0.5)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x):
        """Normalize, drop and activate."""
        return self.act(self.drop(super().forward(x)))


@pytest.fixture
def fused():
    """A network with one fused BatchNorm and one plain."""
    return trained_(nn.Sequential(nn.Conv2d(3, 8, 3), BatchNormAct2d(8), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4)))


@pytest.mark.parametrize("target", TARGETS)
def test_batch_norm_act_keeps_activation_and_drop(fused, images, target):
    """The replacement's output is act(drop(norm(x))), in training and inference, for hooks, copies and undo too."""
    original, keys = copy.deepcopy(fused), set(fused.state_dict())
    norm, seen = fused[1], []
    norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    report = normswap.patch(fused, target)
    x = fused[0](images)

    assert fused[1] is norm
    assert batch_norms(fused) == []
    expected = F.silu(type(norm).forward(norm, x))
    torch.testing.assert_close(norm(x), expected)
    torch.testing.assert_close(seen[-1], expected)
    if target == "brn":
        torch.testing.assert_close(fused(images), original(images))
    assert keys - set(fused.state_dict()) <= {f"{i}.{n}" for i in (1, 3) for n in unused_statistics(target)}

    norm.drop.train()
    assert (norm(x) == 0).float().mean() == pytest.approx(0.5, abs=0.05)
    norm.drop.eval()
    del norm._forward_hooks[next(reversed(norm._forward_hooks))]  # a function made in a test cannot be pickled
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert torch.equal(twin(images), fused(images))
    report.undo()
    assert type(fused[1]) is BatchNormAct2d
    assert torch.equal(fused(images), original(images))


def unused_statistics(target):
    """The names a replacement has no use for."""
    return {"running_mean", "running_var", "num_batches_tracked"} if target in ("gn", "ln", "in") else set()


@pytest.mark.parametrize(("target", "folded"), [("brn", {"1": "Conv", "3": "Conv"}), ("sn", {}), ("gn", {})])
def test_a_fused_activation_is_exported(fused, images, tmp_path, target, folded):
    """The ONNX file of a patched model is proved, and a BatchRenorm before an activation is folded."""
    normswap.patch(fused, target)
    report = normswap.to_onnx(fused, tmp_path / "model.onnx", example=images)

    assert report.verdict
    assert report.folded == folded


def test_one_hot_gates_before_an_activation_are_folded(fused, images, tmp_path):
    """A SwitchNorm that is a BatchNorm is exported as one, its activation kept."""
    normswap.patch(fused, normswap.SwitchNorm("exact"))
    report = normswap.to_onnx(fused, tmp_path / "model.onnx", example=images)

    assert report.verdict
    assert report.folded == {"1": "Conv", "3": "Conv"}


def test_calibration_looks_before_the_activation(fused, images):
    """Scale and shift are solved for what the norm computes, not for what is left of it after the activation."""
    original = copy.deepcopy(fused)
    normswap.patch(fused, "gn")
    normswap.calibrate(fused, original, [torch.randn(64, 3, 12, 12)])
    plain = nn.BatchNorm2d(8).eval()
    plain.load_state_dict(original[1].state_dict())
    wanted, found = plain(original[0](images)), nn.GroupNorm.forward(fused[1], fused[0](images))

    assert (found - wanted).square().mean() < 0.02 * wanted.var((0, 2, 3)).mean()


def relu_after(module, y):
    """What `WithActivation` adds."""
    return y.relu()


def test_an_overridden_forward_is_refused():
    """A subclass that computes more would lose it, so it is named, with the way out."""
    message = refusal(
        "0 (WithActivation): WithActivation overrides forward, which a replacement would lose: "
        "say what it adds with normswap.register_batch_norm"
    )
    with pytest.raises(UnsupportedError, match=exactly(message)):
        normswap.patch(nn.Sequential(WithActivation(3)), "gn")


@pytest.mark.parametrize("by", [WithActivation, f"{WithActivation.__module__}.WithActivation"])
def test_a_registered_subclass_keeps_what_it_adds(monkeypatch, images, by):
    """Registered by class or by name, a subclass is replaced and its addition lives on; its subclasses too."""

    class Renamed(WithActivation):
        pass

    monkeypatch.setattr(registry, "_AFTER", dict(registry._AFTER))
    normswap.register_batch_norm(by, relu_after)
    model = trained_(nn.Sequential(WithActivation(3), Renamed(3)))
    expected = model(images)
    normswap.patch(model, "brn")

    assert torch.equal(model(images), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(images), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3,), "expected a class or its qualified name, received cls=3"),
        ((WithActivation, "relu"), "expected a function of module and tensor, received after='relu'"),
    ],
)
def test_only_classes_and_functions_are_registered(arguments, message):
    """What cannot work later is refused at once."""
    with pytest.raises(TypeError, match=exactly(message)):
        normswap.register_batch_norm(*arguments)


def test_a_subclass_that_computes_the_same_is_patched(images):
    """A subclass without a forward of its own is a BatchNorm; its children and attributes stay."""

    class Renamed(nn.BatchNorm2d):
        def __init__(self, channels):
            super().__init__(channels)
            self.stage = 3
            self.extra = nn.Linear(2, 2)
            self.register_buffer("scratch", torch.ones(1), persistent=False)

    model = nn.Sequential(Renamed(3))
    normswap.patch(model, "gn")

    assert type(model[0]) is nn.GroupNorm
    assert (model[0].stage, model[0].scratch) == (3, 1)
    assert list(model.state_dict()) == ["0.weight", "0.bias", "0.extra.weight", "0.extra.bias"]


@pytest.mark.parametrize("base", [nn.BatchNorm2d, BatchNormAct2d])
def test_a_subclass_that_overrides_train_is_refused(base):
    """A BatchNorm that stays in eval mode by itself would not any more, whatever else is known of it."""

    class Still(base):
        def train(self, mode=True):
            return super().train(False)

    message = refusal(
        "0 (Still): Still overrides train, which a replacement would lose: "
        "say what it adds with normswap.register_batch_norm"
    )
    with pytest.raises(UnsupportedError, match=exactly(message)):
        normswap.patch(nn.Sequential(Still(3)), "gn")


@pytest.mark.parametrize("target", TARGETS)
def test_sync_batch_norm_keeps_its_process_group(tmp_path, target):
    """An example tells its rank, its process group is kept for the batch statistics, and it trains on the CPU."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        group = dist.new_group([0])
        model = trained_(nn.Sequential(nn.SyncBatchNorm(4, process_group=group)))
        x = torch.randn(2, 4, 3, 3)
        expected = model(x)
        report = normswap.patch(model, target, example=x)

        assert torch.isfinite(model.train()(x)).all()
        if target in ("sn", "brn"):
            assert type(model[0]).__name__.endswith("2d")
            assert (model[0].sync, model[0].process_group) == (True, group)
        if target == "brn":
            report.undo()
            assert model[0].process_group is group
    finally:
        dist.destroy_process_group()
    assert torch.isfinite(expected).all()


def test_sync_batch_norm_without_an_example_asks_for_its_rank():
    """GroupNorm takes any rank as well; for the others the rank is asked for."""
    reason = "a SyncBatchNorm takes any number of dimensions: give an example input to see how many there are"
    with pytest.raises(UnsupportedError, match=exactly(refusal(f"0 (SyncBatchNorm): {reason}"))):
        normswap.patch(nn.Sequential(nn.SyncBatchNorm(4)), "sn")

    assert normswap.patch(nn.Sequential(nn.SyncBatchNorm(4)), "gn").replaced[0].action == "replace"


class AnyRank(nn.modules.batchnorm._BatchNorm):
    """One class for several numbers of dimensions, as speech libraries have it."""

    def _check_input_dim(self, x):
        if not 2 <= x.dim() <= 4:
            raise ValueError(f"expected 2 to 4 dimensions, got {x.dim()}")


@pytest.mark.parametrize("norm", [AnyRank, nn.SyncBatchNorm])
@pytest.mark.parametrize("target", ["sn", "brn", "gn"])
@pytest.mark.parametrize("shape", [(2, 4), (2, 4, 6), (2, 4, 5, 6)])
def test_a_class_of_any_rank_comes_back_from_its_bundle_without_an_example(norm, target, shape, tmp_path):
    """The bundle's recipe tells the rank that an example told the patch."""
    x = torch.randn(shape)
    report = normswap.patch(trained_(nn.Sequential(norm(4))).eval(), target, example=x)
    expected = report.model(x)
    normswap.save(report, tmp_path / "bundle")
    model = normswap.load(tmp_path / "bundle", model=nn.Sequential(norm(4)))
    again = normswap.patch(nn.Sequential(norm(4)), report.recipe)

    assert type(model[0]) is type(again.model[0]) is type(report.model[0])
    assert torch.equal(model(x), expected)


def test_each_rank_becomes_the_layer_of_its_rank():
    """Each rank of BatchNorm becomes the layer of its rank."""
    model = nn.ModuleList([nn.BatchNorm1d(4), nn.BatchNorm2d(4), nn.BatchNorm3d(4)])
    normswap.patch(model, "sn")

    assert [type(m) for m in model] == [SwitchNorm1d, SwitchNorm2d, SwitchNorm3d]


def test_frozen_batch_norm_is_left_alone_and_reported(images):
    """A frozen backbone has no batch statistics to get rid of: by default it stays, with the reason."""
    model = trained_(nn.Sequential(FrozenBatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    report = normswap.patch(model, "gn")

    assert type(model[0]) is FrozenBatchNorm2d
    assert [(d.site.name, d.note) for d in report.skipped] == [
        ("0", "frozen: a constant scale and shift, which no batch can disturb")
    ]


@pytest.mark.parametrize("target", TARGETS)
def test_frozen_batch_norm_is_replaced_if_included(images, target):
    """Named by a pattern it is replaced, by a layer whose parameters do not learn, and comes back as it was."""
    model = nn.Sequential(FrozenBatchNorm2d(3)).eval()
    fresh, before, keys = copy.deepcopy(model), model(images), list(model.state_dict())
    report = normswap.patch(model, target, include=["0"])
    again = normswap.patch(fresh, report.recipe).model

    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(again(images), model(images))
    if target == "brn":
        torch.testing.assert_close(model(images), before)
    report.undo()
    assert torch.equal(model(images), before)
    assert list(model.state_dict()) == keys


class DetrFrozenBatchNorm2d(nn.Module):
    """A frozen BatchNorm with its ε in the forward, as transformers' are."""

    def __init__(self, channels):
        super().__init__()
        for name, value in (("weight", 1.5), ("bias", 0.5), ("running_mean", 0.3), ("running_var", 1e-5)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x):
        """Scale and shift."""
        weight, bias, mean, var = (buffer.reshape(1, -1, 1, 1) for buffer in self.buffers())
        return (x - mean) * (weight * (var + 1e-5).rsqrt()) + bias


@pytest.mark.parametrize("target", TARGETS)
def test_a_frozen_batch_norm_that_tells_no_epsilon_has_the_default(images, target):
    """What has no attribute ``eps`` has PyTorch's 1e-5 in its forward."""
    model = nn.Sequential(DetrFrozenBatchNorm2d(3)).eval()
    before = model(images)
    report = normswap.patch(model, target, include="*", example=images)

    assert epsilon_of(model[0]) == 1e-5
    if target == "brn":
        torch.testing.assert_close(model(images), before)
    report.drift(images)
    report.undo()
    assert torch.equal(model(images), before)


def test_frozen_alone_names_the_way_to_replace_them():
    """Where all are skipped as frozen, the refusal says how to have them replaced."""
    message = (
        "expected a model with BatchNorm layers to replace, received 1 BatchNorm, all skipped (frozen: a constant "
        "scale and shift, which no batch can disturb); name what is to be replaced all the same with include='NAME'"
    )
    with pytest.raises(UnsupportedError, match=exactly(message)):
        normswap.patch(nn.Sequential(DetrFrozenBatchNorm2d(3)), "gn")


def test_lazy_batch_norm_needs_a_forward_pass():
    """An uninitialised BatchNorm needs one forward pass, its own or that of the plan."""
    message = refusal("0 (LazyBatchNorm2d): not initialised yet: run one forward pass first, or give an example input")
    with pytest.raises(UnsupportedError, match=exactly(message)):
        normswap.patch(nn.Sequential(nn.LazyBatchNorm2d()), "gn")
    model = nn.Sequential(nn.LazyBatchNorm2d())
    model(torch.randn(2, 3, 4, 4))

    assert len(normswap.patch(model, "gn").replaced) == 1
    assert len(normswap.patch(nn.Sequential(nn.LazyBatchNorm2d()), "gn", example=torch.ones(2, 3, 4, 4)).replaced) == 1


def test_other_norms_are_left_alone():
    """InstanceNorm, GroupNorm and LayerNorm are no sites."""
    model = nn.Sequential(
        nn.InstanceNorm2d(4, track_running_stats=True), nn.GroupNorm(2, 4), nn.LayerNorm(4), nn.BatchNorm2d(4)
    )

    assert [d.site.name for d in normswap.patch(model, "gn").replaced] == ["3"]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("options", [{"affine": False}, {"bias": False}])
def test_missing_parameters_are_created_where_needed(images, target, options):
    """What needs a scale and shift to keep the function gets one that learns; a BatchRenorm needs none."""
    model = trained_(nn.Sequential(nn.BatchNorm2d(3, **options)))
    full = trained_(nn.Sequential(nn.BatchNorm2d(3)))
    with torch.no_grad():
        full[0].load_state_dict({**full[0].state_dict(), **model[0].state_dict()})
        if "affine" in options:
            full[0].weight.fill_(1)
        full[0].bias.zero_()
    names = {name for name, _ in model[0].named_parameters()}
    normswap.patch(model, target)

    torch.testing.assert_close(model(images), normswap.patch(full, target).model(images))
    if target == "brn":
        assert {name for name, _ in model[0].named_parameters()} == names
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("target", ["sn", "gn", "brn"])
def test_without_running_statistics_gamma_and_beta_are_copied(target):
    """There is nothing to match: it is refused, or where it is named copied, which a warning and the plan say."""
    model = nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False))
    torch.nn.init.uniform_(model[0].weight)
    weight = model[0].weight.detach().clone()
    message = (
        "expected BatchNorms that can be replaced, received 1 that cannot:\n"
        "  0 (BatchNorm2d): it keeps no running statistics to carry over\n"
        "leave such a layer as it is with exclude='NAME', have it keep them (track_running_stats=True) and run the "
        "model on images in training mode first, or copy gamma and beta by include='*' and train the model"
    )
    for refused in (target, normswap.Rules((normswap.Rule(as_target(target)),))):
        with pytest.raises(UnsupportedError, match=exactly(message)):
            normswap.patch(model, refused)
    warning = (
        "expected BatchNorms with running statistics, received 1 without, whose gamma and beta are copied; train the "
        "model before it is used:\n  0"
    )
    recipe = normswap.plan(model, target, include="0").recipe()
    with pytest.warns(NormswapWarning, match=exactly(warning)):
        normswap.patch(model, recipe, inplace=False)
    with pytest.warns(NormswapWarning, match=exactly(warning)):
        report = normswap.patch(model, target, include="0")

    assert torch.equal(model[0].weight, weight)
    assert report.replaced[0].note.startswith("no running statistics: gamma and beta are copied")


@pytest.mark.parametrize("target", ["sn", "brn"])
def test_a_cumulative_average_stays_one(target):
    """momentum=None goes on averaging all batches alike, from the count that was there."""
    model = nn.Sequential(nn.BatchNorm2d(2, momentum=None))
    batches = torch.randn(4, 3, 2, 5, 5, generator=torch.Generator().manual_seed(0))
    for batch in batches[:3]:
        model(batch)
    normswap.patch(model, target)
    model(batches[3])

    assert model[0].num_batches_tracked == 4
    torch.testing.assert_close(model[0].running_mean, batches.mean((0, 1, 3, 4)))
