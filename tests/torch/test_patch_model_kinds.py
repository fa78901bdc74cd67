"""Models that are wrapped, compiled, traced, quantized or normalize without a layer."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize, prune

import normswap
from normswap.errors import UnsupportedError

from ..helpers import exactly, refusal
from .models import TARGETS, Functional, Unregistered, fingerprint, quantization_aware, trained_


class StandardizedConv(nn.Conv2d):
    """A convolution that standardizes its weights by batch_norm, as timm's does."""

    def forward(self, x):
        """Standardize, then convolve."""
        weight = F.batch_norm(self.weight.reshape(1, len(self.weight), -1), None, None, training=True, momentum=0.0)
        return F.conv2d(x, weight.reshape_as(self.weight))


class Twice(nn.Module):
    """A parametrization."""

    def forward(self, x):
        """Double."""
        return 2 * x


def test_quantization_aware_modules_are_left_whole():
    """The BatchNorm inside a fused QAT convolution is no layer of its own: it stays, with the reason."""
    model = quantization_aware()
    report = normswap.patch(model, "gn")

    assert [d.site.name for d in report.replaced] == ["1"]
    assert [(d.site.name, d.note) for d in report.skipped] == [("0.bn", "part of a quantization-aware module")]


def test_quantization_aware_modules_are_refused_by_name():
    """Asked for it by name, the patch says what to do instead."""
    reason = "part of a quantization-aware module: patch the model before it is prepared for quantization"
    with pytest.raises(UnsupportedError, match=exactly(refusal(f"0.bn (BatchNorm2d): {reason}"))):
        normswap.patch(quantization_aware(), "gn", include=["0.*"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("make", [torch.jit.script, lambda m: torch.jit.trace(m, torch.ones(1, 3, 4, 4))])
def test_torchscript_is_refused(make):
    """TorchScript has no Python to patch, as the model or in it."""
    whole = make(nn.BatchNorm2d(3).eval())
    message = (
        "expected a module with Python code, received TorchScript (BatchNorm2d); patch the module it was made from"
    )
    with pytest.raises(UnsupportedError, match=exactly(message)):
        normswap.patch(whole, "gn")
    part = nn.Sequential(nn.BatchNorm2d(3), make(nn.Sequential(nn.BatchNorm2d(3)).eval()))
    reason = "TorchScript has no Python code to change: patch the module it was made from"
    with pytest.raises(UnsupportedError, match=exactly(refusal(f"1.0 (BatchNorm2d): {reason}"))):
        normswap.patch(part, "gn")

    assert type(part[0]) is nn.BatchNorm2d


def test_a_traced_graph_is_not_passed_over(model, images):
    """Whether a graph calls BatchNorm modules or batch_norm itself, all of them are replaced."""
    for graph in (torch.fx.symbolic_trace(model), torch.export.export(model, (images,)).module()):
        report = normswap.patch(graph, "gn")
        expected = normswap.patch(copy.deepcopy(model), "gn").model

        assert [decision.site.name for decision in report.replaced] == ["stem.1", "bn"]
        torch.testing.assert_close(report.model(images), expected(images))


@pytest.mark.parametrize("target", TARGETS)
def test_a_compiled_model_is_patched_below(model, images, target):
    """The model below torch.compile is patched, under its own names, and the compiled one computes what it does."""
    expected = normswap.patch(copy.deepcopy(model), target, example=images).model(images)
    compiled = torch.compile(model, backend="eager")
    before = compiled(images)
    report = normswap.patch(compiled, target, example=images)

    assert report.model is compiled
    assert [decision.site.name for decision in report.replaced] == ["stem.1", "bn"]
    torch.testing.assert_close(compiled(images), expected)
    report.undo()
    assert torch.equal(compiled(images), before)


def test_wrapped_models_are_refused(model, tmp_path):
    """A wrapper has taken the parameters into its books: the model is to be patched before, wherever it is."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        message = "expected an unwrapped model, received a DistributedDataParallel; patch the model and then wrap it"
        with pytest.raises(UnsupportedError, match=exactly(message)):
            normswap.patch(wrapped, "gn")
    finally:
        dist.destroy_process_group()
    message = "expected an unwrapped model, received a DataParallel in 0; patch the model and then wrap it"
    with pytest.raises(UnsupportedError, match=exactly(message)):
        normswap.patch(nn.Sequential(nn.DataParallel(model)), "gn")


def test_sharded_models_are_refused(model):
    """FSDP, which changes a module's class or wraps it, is told by either name."""
    for name in ("FullyShardedDataParallel", "FSDPModule"):
        sharded = copy.deepcopy(model)
        sharded.stem.__class__ = type("FSDPSequential", (type(name, (), {}), nn.Sequential), {})
        message = f"expected an unwrapped model, received a {name} in stem; patch the model and then wrap it"
        with pytest.raises(UnsupportedError, match=exactly(message)):
            normswap.patch(sharded, "gn")


@pytest.mark.parametrize("target", TARGETS)
def test_a_parametrization_becomes_its_value(images, target):
    """The replacement has what the parametrization computed as its own; undo brings the parametrization back."""
    model = trained_(nn.Sequential(nn.BatchNorm2d(3)))
    plain = copy.deepcopy(model)
    with torch.no_grad():
        plain[0].weight.mul_(2)
    parametrize.register_parametrization(model[0], "weight", Twice())
    before, output = fingerprint(model), model(images)
    report = normswap.patch(model, target)

    torch.testing.assert_close(model(images), normswap.patch(plain, target).model(images))
    assert set(model.state_dict()) == set(plain.state_dict())
    assert model[0].weight.requires_grad
    report.undo()
    assert fingerprint(model) == before
    assert torch.equal(model(images), output)


def test_a_pruned_weight_is_refused():
    """A weight that a hook computes before each call has to be made permanent first."""
    model = nn.Sequential(nn.BatchNorm2d(4))
    prune.l1_unstructured(model[0], "weight", 0.5)
    reason = "its weight or bias is computed by a hook: make it permanent first, as torch.nn.utils.prune.remove does"
    with pytest.raises(UnsupportedError, match=exactly(refusal(f"0 (BatchNorm2d): {reason}"))):
        normswap.patch(model, "gn")
    prune.remove(model[0], "weight")

    assert len(normswap.patch(model, "gn").replaced) == 1


def test_weight_standardization_is_no_batch_norm(images):
    """A batch_norm without running statistics, on weights, is not reported."""
    model = nn.Sequential(StandardizedConv(3, 4, 3), nn.BatchNorm2d(4))

    assert [d.site.name for d in normswap.plan(model, "gn", example=images).decisions] == ["1"]


@pytest.mark.parametrize("cls", [Functional, Unregistered])
def test_a_functional_batch_norm_is_found_by_a_dry_run(images, cls):
    """A batch_norm that no layer of the model calls is named with the module that calls it; excluded, it stays."""
    model = nn.Sequential(nn.BatchNorm2d(3), cls()).eval()
    reason = "called in a forward without a layer of the model: make it a BatchNorm submodule"
    with pytest.raises(UnsupportedError, match=exactly(refusal(f"1.forward (batch_norm): {reason}"))):
        normswap.patch(model, "gn", example=images)
    report = normswap.patch(model, "gn", example=images, exclude=["1.forward"])

    assert [d.site.name for d in report.replaced] == ["0"]
    assert [(d.site.name, d.site.channels, d.note) for d in report.skipped] == [("1.forward", 3, "excluded")]
