"""The verifier on files with a known fault, all of which it catches, and on correct ones, none of which it fails."""

import copy

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

import normswap
from normswap.errors import MissingDependencyError
from normswap.verification.verdict import INEXACT, TOLERANCE

from .models import Residual, trained_


def export(model, path, images):
    """Write a file of ``model`` without proving it."""
    normswap.to_onnx(model, path, example=images, check=False)
    return path


def norms(model):
    return [module for module in model.modules() if "Norm" in type(module).__name__]


def eps(value):
    """Set every layer's epsilon."""

    def change(model):
        for norm in norms(model):
            norm.eps = value

    return change


def running_var(model):
    norms(model)[0].running_var.mul_(0.99)


def gates_swapped(model):
    for norm in norms(model):
        norm.mean_weight.data, norm.var_weight.data = norm.var_weight.data, norm.mean_weight.data


def rounded(model):
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()


def one_nan(model):
    model.conv.weight.data[0, 0, 0, 0] = torch.nan


@pytest.fixture
def patched(model, images):
    """A network with Switchable Normalization of uneven gates."""
    patched = normswap.patch(model, "sn", example=images, equalize=False).model
    for number, norm in enumerate(norms(patched)):
        norm.mean_weight.data += torch.tensor([0.5, -0.5, 1.0]) * (number + 1)
    return patched


@pytest.mark.parametrize(
    ("fault", "layer"),
    [
        (eps(1e-3), "stem.1"),
        (eps(0.0), "stem.1"),
        (running_var, "stem.1"),
        (gates_swapped, "stem.1"),
        (rounded, "stem.0"),
        (one_nan, "conv"),
    ],
)
def test_each_fault_of_an_exporter_fails(patched, images, tmp_path, fault, layer):
    """Each way an exporter goes wrong fails, and the first layer that shows it is named."""
    wrong = copy.deepcopy(patched)
    with torch.no_grad():
        fault(wrong)
    verdict = normswap.verify(patched, export(wrong, tmp_path / "m.onnx", images))

    assert not verdict
    assert verdict.first_diverging == layer


def test_large_and_small_inputs_pass(patched, images, tmp_path):
    """A correct file passes on real inputs ten and a hundred times as large."""
    path = export(patched, tmp_path / "m.onnx", images)
    data = [(images * factor).numpy() for factor in (10, 100)]

    verdict = normswap.verify(patched, path, data=data)

    assert verdict
    assert [check.inputs for check in verdict.checks][-4:] == ["data"] * 4


def test_outputs_near_zero_pass(images, tmp_path):
    """Neither outputs that are all tiny nor a few among large ones fail a correct file."""
    for weights in (torch.full((5,), 1e-9), torch.tensor([1.0, 1e-9, 1.0, -1e-9, 0.0])):
        model = trained_(Residual())
        model.head.weight.data *= weights[:, None]
        model.head.bias.data *= weights
        assert normswap.verify(model, export(model, tmp_path / f"{weights[0]}.onnx", images))


def instance_norm(path, *, centred):
    """Write an instance normalization, its variance centred or as E[x²] - E[x]²."""
    axes = helper.make_tensor("axes", TensorProto.INT64, [2], [2, 3])
    tiny = helper.make_tensor("eps", TensorProto.FLOAT, [], [1e-5])
    mean = ("ReduceMean", ["x", "axes"], ["mean"])
    first = [
        mean,
        ("Sub", ["x", "mean"], ["d"]),
        ("Mul", ["d", "d"], ["d2"]),
        ("ReduceMean", ["d2", "axes"], ["var"]),
    ]
    other = [
        mean,
        ("Sub", ["x", "mean"], ["d"]),
        ("Mul", ["x", "x"], ["x2"]),
        ("ReduceMean", ["x2", "axes"], ["square"]),
        ("Mul", ["mean", "mean"], ["mean2"]),
        ("Sub", ["square", "mean2"], ["raw"]),
        ("Relu", ["raw"], ["var"]),
    ]
    last = [("Add", ["var", "eps"], ["v"]), ("Sqrt", ["v"], ["std"]), ("Div", ["d", "std"], ["output"])]
    shapes = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3, 12, 12]) for name in ("x", "output")]
    nodes = [helper.make_node(*node) for node in [*(first if centred else other), *last]]
    graph = helper.make_graph(nodes, "g", shapes[:1], shapes[1:], [axes, tiny])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    return path


class InstanceNorm(nn.Module):
    """Instance normalization of an input called ``x``."""

    def forward(self, x):
        """Return each map with mean 0 and variance 1."""
        return nn.functional.instance_norm(x)


def test_an_ill_conditioned_input_passes_until_all_is_lost(tmp_path):
    """Far from zero the model itself is inexact: a file as inexact passes, one that loses everything fails."""
    far = [np.random.default_rng(0).normal(1e4, 1, (2, 3, 12, 12)).astype(np.float32)]
    right, wrong = (instance_norm(tmp_path / f"{centred}.onnx", centred=centred) for centred in (True, False))

    verdict = normswap.verify(InstanceNorm(), right, data=far)
    assert verdict
    assert max(check.own or 0 for check in verdict.checks if check.inputs == "data") > INEXACT
    assert verdict.max_rel > TOLERANCE

    assert normswap.verify(InstanceNorm(), wrong)  # close to zero there is nothing to lose
    verdict = normswap.verify(InstanceNorm(), wrong, data=far)
    assert {check.inputs for check in verdict.checks if not check.passed} == {"data"}


class Dropping(nn.Module):
    """A model with dropout left on."""

    def forward(self, x):
        """Return ``x`` with another half of it gone each time."""
        return nn.functional.dropout(x, training=True)


def test_a_model_random_at_inference_is_told_so(tmp_path):
    """A model that is random is told so, and the export is not blamed."""
    verdict = normswap.verify(Dropping(), instance_norm(tmp_path / "m.onnx", centred=True))

    assert verdict.checks == ()
    (problem,) = verdict.problems
    assert problem.startswith("the model computes something else each time: output differs by ")
    assert problem.endswith(
        " of its scale between two runs on one input; take out what is random at inference, such as dropout left on"
    )


class Exponential(nn.Module):
    """A model that overflows on large inputs."""

    def __init__(self, shift=0.0):
        super().__init__()
        self.shift = shift

    def forward(self, x):
        """Return e^(x + shift)."""
        return torch.exp(x + self.shift)


def exponential(path, shift=0.0):
    value = helper.make_tensor("shift", TensorProto.FLOAT, [], [shift])
    shapes = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 8]) for name in ("x", "output")]
    nodes = [helper.make_node("Add", ["x", "shift"], ["moved"]), helper.make_node("Exp", ["moved"], ["output"])]
    graph = helper.make_graph(nodes, "g", shapes[:1], shapes[1:], [value])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    return path


def test_a_model_that_overflows_is_no_reference(tmp_path):
    """Where the model itself overflows on scaled inputs those are left out; on plain ones it is no reference."""
    path = exponential(tmp_path / "m.onnx")
    verdict = normswap.verify(Exponential(), path)
    assert verdict
    assert verdict.notes == ("inputs x100 left out: the model itself is not finite there",)

    assert normswap.verify(Exponential(100.0), path).problems == (
        "the model's own output is not finite; give an `example`, if those drawn are not what it takes",
    )

    verdict = normswap.verify(Exponential(), exponential(tmp_path / "m.onnx", 100.0))
    assert not verdict
    assert verdict.first_infinite == "output of Exp"


def test_external_data_is_compared_too(patched, images, tmp_path):
    """A file with its weights beside it passes, and fails when they are another model's."""
    path = export(patched, tmp_path / "m.onnx", images)
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="m.onnx.data", size_threshold=256)
    assert (tmp_path / "m.onnx.data").stat().st_size > 1000
    assert normswap.verify(patched, path)

    data = np.fromfile(tmp_path / "m.onnx.data", np.float32)
    (data * 1.01).astype(np.float32).tofile(tmp_path / "m.onnx.data")
    assert normswap.verify(patched, path).first_diverging == "stem.0"


def test_a_missing_provider_is_an_error(patched, images, tmp_path):
    """A provider that is not there is an error, not a verdict."""
    path = export(patched, tmp_path / "m.onnx", images)
    assert normswap.verify(patched, path, providers=["auto"])
    with pytest.raises(MissingDependencyError):
        normswap.verify(patched, path, providers=["cpu", "dml"])


def test_auto_leaves_out_what_does_not_start(patched, images, tmp_path, monkeypatch):
    """A provider that is listed but does not start is an error where it was named, and a note under ``auto``."""
    import onnxruntime

    path = export(patched, tmp_path / "m.onnx", images)
    listed = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: listed)
    with pytest.warns(UserWarning, match="'CUDAExecutionProvider' is not in available"):
        verdict = normswap.verify(patched, path, providers=["auto"])
    assert verdict
    assert {check.provider for check in verdict.checks} == {"cpu"}
    assert verdict.notes == (
        "cuda left out: expected an onnxruntime with CUDAExecutionProvider for provider='cuda', received one that runs "
        "on CPUExecutionProvider in its place: pip install onnxruntime-gpu",
    )

    with (
        pytest.warns(UserWarning, match="'CUDAExecutionProvider' is not in available"),
        pytest.raises(MissingDependencyError, match="received one that runs on CPUExecutionProvider in its place"),
    ):
        normswap.verify(patched, path, providers=["auto", "cuda"])
