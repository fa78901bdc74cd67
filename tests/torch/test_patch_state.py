"""Whatever belongs to a layer besides its class stays, and so does what is saved of it."""

import copy
import pickle
import re

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import normswap
from normswap import BatchRenorm, GroupNorm, SwitchNorm
from normswap.errors import InputError, NormswapWarning
from normswap.finetune import GateSchedule, RenormLimits
from normswap.patchers.torch.batch_norm import epsilon_of
from normswap.sources.torch.state_dict import load_state_dict

from .models import TARGETS, Residual, trained_


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_stay(target, dtype):
    """Parameters and statistics keep their dtype."""
    model = nn.Sequential(nn.BatchNorm2d(4)).to(dtype)
    normswap.patch(model, target)
    floating = [t for t in model.state_dict().values() if t.is_floating_point() and t.dim()]

    assert {t.dtype for t in floating} == {dtype}
    assert model.eval()(torch.randn(2, 4, 5, 5, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("target", TARGETS)
def test_a_model_on_the_meta_device_carries_over_when_loaded(target):
    """A model without values is patched to one without; a BatchNorm's weights loaded later are carried over then."""
    values = trained_(Residual())
    with torch.device("meta"):
        model = Residual().eval()
    model.stem.requires_grad_(False)
    normswap.patch(model, target)
    assert {t.device.type for t in model.state_dict().values()} == {"meta"}
    assert [p.requires_grad for p in model.stem[1].parameters()] == [False] * len(list(model.stem[1].parameters()))

    model.load_state_dict(copy.deepcopy(values.state_dict()), assign=True)
    x = torch.randn(2, 3, 12, 12)
    expected = normswap.patch(values, target).model
    torch.testing.assert_close(model(x), expected(x))
    torch.testing.assert_close(model.train()(x), expected.train()(x))


def test_a_layer_without_tensors_follows_the_model():
    """Where a BatchNorm holds nothing that tells, the replacement is of the model's device and dtype."""
    norm = nn.BatchNorm2d(4, affine=False, track_running_stats=False)
    model = nn.Sequential(nn.Conv2d(3, 4, 1, dtype=torch.float64), norm)
    with pytest.warns(NormswapWarning, match="received 1 without"):
        normswap.patch(model, "sn", include="1")

    assert {t.dtype for t in model.state_dict().values() if t.is_floating_point() and t.dim()} == {torch.float64}


@pytest.mark.parametrize("target", TARGETS)
def test_channels_last_gives_the_same_numbers(model, images, target):
    """A channels_last input gives the same numbers."""
    normswap.patch(model, target)
    x = images.to(memory_format=torch.channels_last)

    torch.testing.assert_close(model(x), model(images), atol=1e-5, rtol=1e-4)
    assert model.stem[1](model.stem[0](x)).is_contiguous(memory_format=torch.channels_last)


def test_training_flags_stay(model):
    """Each layer stays in the mode it was in, also after a dry run."""
    model.train()
    model.bn.eval()
    normswap.patch(model, "sn", example=torch.randn(2, 3, 8, 8))

    assert [m.training for m in (model, model.stem[1], model.bn)] == [True, True, False]


@pytest.mark.parametrize("target", TARGETS)
def test_frozen_parameters_stay_frozen(model, target):
    """requires_grad is each parameter's own; what a frozen layer gains is frozen with it."""
    model.stem.requires_grad_(False)
    model.bn.bias.requires_grad_(False)
    normswap.patch(model, target)

    assert not any(parameter.requires_grad for parameter in model.stem[1].parameters())
    assert model.bn.weight.requires_grad
    assert not model.bn.bias.requires_grad
    if target == "sn":
        assert model.bn.mean_weight.requires_grad


@pytest.mark.parametrize("target", TARGETS)
def test_hooks_fire_once(model, images, target):
    """A hook on the BatchNorm is a hook on its replacement, and undo does not lose one added since."""
    calls = []

    def noting(name):
        return lambda *_: calls.append(name)

    model.bn.register_forward_hook(noting("forward"))
    model.bn.register_full_backward_hook(noting("backward"))
    model.bn.register_state_dict_post_hook(noting("state"))
    report = normswap.patch(model, target)
    model.bn.register_forward_pre_hook(noting("pre"))
    calls.clear()
    model(images).sum().backward()
    model.state_dict()
    report.undo()
    model(images).sum().backward()
    model.state_dict()

    assert calls == ["pre", "forward", "backward", "state"] * 2


@pytest.mark.parametrize("target", TARGETS)
def test_an_optimizer_made_before_still_trains(model, images, target):
    """The scale and shift are the same Parameter objects, so an optimizer's step moves them."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    normswap.patch(model, target)
    before = model.bn.weight.detach().clone()
    model.train()(images).square().sum().backward()
    optimizer.step()

    assert not torch.equal(model.bn.weight, before)


@pytest.mark.parametrize(("target", "tied"), [("gn", False), ("sn", False), ("brn", True)])
def test_tied_parameters_are_untied_where_they_must_differ(target, tied):
    """A weight shared by two BatchNorms cannot take two values, so each gets its own; BRN keeps the tie."""
    first, second = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    second.weight = first.weight
    model = trained_(nn.Sequential(first, second))
    second, before = copy.deepcopy(model)[1], model[0].weight.detach().clone()
    report = normswap.patch(model, target)

    assert (model[0].weight is model[1].weight) is tied
    alone = normswap.patch(nn.Sequential(second), target).model
    torch.testing.assert_close(model[1].weight, alone[0].weight)
    report.undo()
    assert model[0].weight is model[1].weight
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("target", [*TARGETS, SwitchNorm("even", "none"), GroupNorm(groups=2)])
@pytest.mark.parametrize("dropped", [(), ("num_batches_tracked",)])
def test_an_old_checkpoint_loads_into_the_patched_model(model, images, target, dropped):
    """A BatchNorm's state is carried over while it is loaded, as the patch would have."""
    saved = {k: v for k, v in model.state_dict().items() if not k.endswith(dropped or ("nothing",))}
    other = trained_(Residual(), seed=7)
    expected = normswap.patch(copy.deepcopy(model), target).model(images)
    normswap.patch(other, target)

    for each in (copy.deepcopy(other), other):
        result = each.load_state_dict(copy.deepcopy(saved))
        assert (result.missing_keys, result.unexpected_keys) == ([], [])
        assert torch.equal(each(images), expected)


@pytest.mark.parametrize("target", TARGETS)
def test_a_patched_checkpoint_loads_as_it_is(model, images, target):
    """A replacement's own state is not taken for a BatchNorm's."""
    normswap.patch(model, target)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    other = normswap.patch(trained_(Residual(), seed=7), target).model
    other.load_state_dict(model.state_dict())

    assert torch.equal(other(images), model(images))


@pytest.mark.parametrize(
    ("target", "named"), [("sn", "bn.mean_weight"), ("brn", "bn.r_max"), ("gn", "bn.running_mean")]
)
def test_a_patched_checkpoint_does_not_load_into_batch_norms(model, target, named):
    """The model before the patch refuses it by the names of what is missing or too much."""
    fresh = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match=re.escape(named)):
        fresh.load_state_dict(normswap.patch(model, target).model.state_dict())


@pytest.mark.parametrize("target", TARGETS)
def test_the_loader_says_what_such_a_checkpoint_is(model, target):
    """Where the weights of a patched model are given for the model before it, the message ends in the way out."""
    fresh = copy.deepcopy(model)
    patched = normswap.patch(model, target).model.state_dict()
    with pytest.raises(InputError) as caught:
        load_state_dict(fresh, patched, "weights.pt")

    last = (
        "  they look like a patched network's: load them into the patched model (normswap.load_weights), "
        "or give the bundle"
    )
    assert str(caught.value).splitlines()[-1] == last
    assert str(caught.value).startswith("expected weights that fit the model, received weights.pt:\n  ")


@pytest.mark.parametrize("target", [*TARGETS, BatchRenorm(2, 1)])
def test_training_resumes_bit_equal(model, images, target):
    """All state is in the state dict: two steps are one step, a save, a load, and another."""

    def step(network):
        optimizer = torch.optim.SGD(network.parameters(), 0.1)
        network.train()(images).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        return network

    fresh = copy.deepcopy(model)
    normswap.patch(model, target)
    saved = copy.deepcopy(step(model).state_dict())
    resumed = normswap.patch(fresh, target).model
    resumed.load_state_dict(saved)

    for (name, a), b in zip(step(model).state_dict().items(), step(resumed).state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("target", TARGETS)
def test_eps_is_carried(target):
    """An eps far from the default is the replacement's too; BRN equals the BatchNorm at inference."""
    model = trained_(nn.Sequential(nn.BatchNorm2d(4, eps=0.1)))
    x = torch.randn(2, 4, 5, 5)
    expected = model(x)
    normswap.patch(model, target)

    assert epsilon_of(model[0]) == 0.1
    if target == "brn":
        torch.testing.assert_close(model(x), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("target", TARGETS)
def test_copies_and_graphs_compute_the_same(model, images, target, tmp_path):
    """deepcopy, pickle, torch.save, torch.export and fx.symbolic_trace of the patched model compute the same."""
    normswap.patch(model, target)
    expected = model(images)
    torch.save(model, tmp_path / "model.pt")
    saved = torch.load(tmp_path / "model.pt", weights_only=False)

    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), saved):
        assert torch.equal(other(images), expected)
        assert len(normswap.plan(other, target).having("done")) == 2
    torch.testing.assert_close(torch.export.export(model, (images,)).module()(images), expected)
    traced = torch.fx.symbolic_trace(model)
    assert torch.equal(traced(images), expected)
    assert {"stem.1", "bn"} <= {node.target for node in traced.graph.nodes if node.op == "call_module"}


@pytest.mark.parametrize("target", ["sn", "brn"])
def test_a_tracer_of_ones_own_meets_the_replacements(model, target):
    """A tracer that overrides call_module, as torchvision's feature extraction does, meets the replaced layers."""
    met = []

    class Tracer(torch.fx.Tracer):
        def call_module(self, module, forward, args, kwargs):
            met.append(self.path_of_module(module))
            return super().call_module(module, forward, args, kwargs)

    normswap.patch(model, target)
    Tracer().trace(model)

    assert met == ["stem", "stem.0", "stem.1", "stem.2", "conv", "bn", "head"]
    with pytest.raises(torch.fx.proxy.TraceError):  # as torch's own BatchNorm traced by itself
        torch.fx.symbolic_trace(model.bn)


def test_attributes_people_set_are_kept(model):
    """An attribute set on a BatchNorm is there after the patch and after undo."""
    model.bn.tag = "backbone"
    report = normswap.patch(model, "gn")
    assert model.bn.tag == "backbone"
    report.undo()

    assert model.bn.tag == "backbone"


@pytest.mark.parametrize("target", ["sn", "brn"])
@pytest.mark.parametrize(
    "changes",
    [
        {"track_running_stats": False},
        {"momentum": 0.0},
        {"momentum": 1},
        {"momentum": 1.5},
        {"momentum": None, "num_batches_tracked": None},
        {"momentum": torch.tensor(0.25)},
        {"affine": False},
    ],
    ids=str,
)
def test_what_was_set_after_construction_counts(target, changes):
    """Running statistics move as those of the BatchNorm do, by what its attributes say now."""
    model = trained_(nn.Sequential(nn.BatchNorm2d(4)))
    for name, value in changes.items():
        setattr(model[0], name, value)
    original, x = copy.deepcopy(model), torch.randn(6, 4, 5, 5)
    normswap.patch(model, target)
    if target == "brn":
        torch.testing.assert_close(model(x), original(x))
    for each in (model, original):
        each.train()(x)

    torch.testing.assert_close(model[0].running_mean, original[0].running_mean)
    if target == "sn":  # biased, and of a BatchRenorm an average of deviations
        wanted = original[0].running_var
        moved = torch.var(x, (0, 2, 3), unbiased=True) - torch.var(x, (0, 2, 3), unbiased=False)
        weight = float(model[0].momentum) if model[0].track_running_stats else 0.0
        torch.testing.assert_close(model[0].running_var, wanted - weight * moved)
    if "num_batches_tracked" not in changes:
        assert model[0].num_batches_tracked == original[0].num_batches_tracked


@pytest.mark.parametrize("target", ["sn", "brn"])
def test_a_replacement_obeys_track_running_stats(model, images, target):
    """Set to False on a replaced layer it keeps the running statistics where they are, as on a BatchNorm."""
    normswap.patch(model, target)
    before = copy.deepcopy(model.state_dict())
    for module in model.modules():
        if hasattr(module, "track_running_stats"):
            module.track_running_stats = False
    model.train()(images)

    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("eps", [0.0, 0.1, torch.tensor(0.1)])
def test_any_epsilon_that_a_batch_norm_takes_is_taken(target, eps):
    """An ε of 0, and one that was set later, is the replacement's."""
    model = trained_(nn.Sequential(nn.BatchNorm2d(4)))
    model[0].eps = eps
    original, x = copy.deepcopy(model), torch.randn(2, 4, 5, 5)
    normswap.patch(model, target)

    assert epsilon_of(model[0]) == float(eps)
    assert model(x).isfinite().all()
    if target == "brn":
        torch.testing.assert_close(model(x), original(x))


@pytest.mark.parametrize("target", ["sn", "brn"])
def test_a_momentum_of_zero_moves_no_bit(target):
    """A BatchNorm frozen by its momentum stays so to the last bit."""
    model = trained_(nn.Sequential(nn.BatchNorm2d(64, momentum=0.0)))
    before = copy.deepcopy(model.state_dict())
    normswap.patch(model, target).model.train()(torch.randn(4, 64, 5, 5))

    assert all(torch.equal(model[0]._buffers[name], before[f"0.{name}"]) for name in ("running_mean", "running_var"))


def averaged(model):
    """PyTorch's average, which has seen nothing before."""
    copied = AveragedModel(model)
    return copied, lambda: copied.update_parameters(model)


def averaged_with_buffers(model):
    """PyTorch's average, that of the buffers too."""
    copied = AveragedModel(model, use_buffers=True)
    return copied, lambda: copied.update_parameters(model)


def state_averaged(model, decay=0.0):
    """An average over the values of the state dict in their order, as timm's ModelEma takes it."""
    copied = copy.deepcopy(model)

    def update():
        for ours, theirs in zip(copied.state_dict().values(), model.state_dict().values(), strict=True):
            ours.copy_(decay * ours + (1.0 - decay) * theirs)

    return copied, update


def loaded(model):
    """A copy that is given the state dict."""
    copied = copy.deepcopy(model)
    return copied, lambda: copied.load_state_dict(model.state_dict())


@pytest.mark.parametrize("copying", [averaged, averaged_with_buffers, state_averaged, loaded])
@pytest.mark.parametrize(
    ("target", "hook"),
    [
        ("sn", lambda model: GateSchedule(model, 4, temperature=(1.0, 0.02))),
        ("brn", lambda model: RenormLimits(model, 4)),
    ],
)
def test_copies_agree_with_a_model_under_a_hook(model, images, target, hook, copying):
    """A copy made before a schedule began computes, brought up to date, what the model does."""
    normswap.patch(model, target)
    for name, parameter in model.named_parameters():
        if name.endswith(("mean_weight", "var_weight")):
            parameter.data = torch.tensor([0.0, 0.1, 0.2])
    copied, update = copying(model)
    with hook(model) as schedule:
        schedule.on_step(2)
        update()
        for each in (model, copied):
            each.train()

        torch.testing.assert_close(copied(images), model(images))


def test_copies_have_the_temperature(model, images):
    """deepcopy and pickle take it along, and a state dict from before it was one of its entries leaves it alone."""
    normswap.patch(model, "sn")
    model.bn.temperature = 0.1
    expected = model(images)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(images), expected)
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("temperature")}
    model.load_state_dict(state, strict=True)

    torch.testing.assert_close(model(images), expected)
