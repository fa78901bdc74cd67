"""A PyTorch module as an ONNX graph, and as a reference to hold that graph against."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...convert.targets import BatchRenorm
from ...frameworks.example import Inputs
from ...frameworks.torch import Probe, copied, input_names, quiet
from ...layers.torch.switch_norm import CLOSED
from ...patchers.torch.batch_norm import epsilon_of
from ...patchers.torch.sites import MARK
from ..norms import STATISTICS
from ..traced import Traced
from .exporter import export_module
from .norms import SWITCH, StandIns

Array = NDArray[Any]


def trace(model: nn.Module, example: Inputs, *, opset: int, dynamic: bool = False) -> Traced:
    """Return ``model`` in eval mode as an ONNX graph; the arrays of ``example`` have the batch first.

    The batch is left open, with ``dynamic`` every dimension behind the channels too.

    The model itself is left alone. Raises `UnsupportedError` if torch cannot export it.
    """
    with quiet():
        twin = copied(model).cpu().eval().requires_grad_(False)
    stand_ins = StandIns(twin)
    probe = Probe(twin, example, before=stand_ins.calls.clear)
    probe.eval()
    tensors = tuple(_at_least_two(torch.as_tensor(array).cpu()) for array in example.arrays.values())
    with stand_ins.looking():
        probe(*tensors)  # for the names: what a module notes while it is traced is put back
    stand_ins.put()
    sizes = {rank: _open_sizes(rank) if dynamic else {} for rank in {tensor.dim() for tensor in tensors}}
    shapes = tuple({0: torch.export.Dim("batch"), **sizes[tensor.dim()]} for tensor in tensors)
    converted = export_module(probe, tensors, shapes, opset=opset, described=type(model).__name__)
    graph = converted.graph
    for value, name in zip(graph.inputs, input_names(model, example), strict=True):
        value.name = name
    for initializer in list(graph.initializers.values()):
        initializer.name = str(initializer.name).removeprefix("model.")
    outputs = list(graph.outputs)
    split = len(probe.output_names)
    for value, name in zip(outputs, probe.output_names, strict=False):
        value.name = name
    while len(graph.outputs) > split:
        graph.outputs.pop()
    sites = {name: _copied(value) for name, value in zip(probe.site_names, outputs[split:], strict=True)}
    return Traced(converted, sites, dict(zip(stand_ins.marks(graph), stand_ins.calls, strict=True)))


def dtype_problem(model: nn.Module) -> str | None:
    """Return why the model's dtype cannot be exported, or None."""
    dtypes = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()}
    if any(p.is_meta for p in model.parameters()):
        return "its weights are on the meta device: load them first"
    if others := sorted(dtypes - {"float32"}):
        return f"weights of dtype {', '.join(others)}: convert with model.float()"
    return None


def notes(model: nn.Module) -> list[str]:
    """Return what is to be known of a file made from ``model``."""
    return ["the model was in training mode: exported in inference mode"] if model.training else []


def norm_facts(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return kind, eps, groups and gates of each replaced layer, by name."""
    facts: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        if (kind := getattr(module, MARK, None)) is not None:
            facts[name] = {"kind": kind, "eps": epsilon_of(module)}
            if isinstance(module, nn.GroupNorm):
                facts[name]["groups"] = module.num_groups
            elif kind != BatchRenorm.kind:
                gates = module.gates()
                facts[name] |= dict(zip(("mean_gates", "var_gates"), (_rounded(g) for g in gates), strict=True))
    return facts


@contextmanager
def prune(model: nn.Module, threshold: float) -> Iterator[dict[str, list[str]]]:
    """Close every gate below ``threshold`` of the Switchable Normalizations while the context is open.

    The context is a dictionary of the gates closed, by layer. The others keep their shares of each other.
    """
    before: list[tuple[Tensor, Tensor]] = []
    dropped: dict[str, list[str]] = {}
    try:
        for name, module in model.named_modules():
            if isinstance(module, SWITCH):
                logits = module.mean_weight.detach(), module.var_weight.detach()
                for kind, weight, gates in zip(("mean", "variance"), logits, module.gates(), strict=True):
                    below = (gates < threshold) & (gates > 0)
                    if below.any():
                        before.append((weight, weight.clone()))
                        weight[below] = weight.max() + CLOSED * module.temperature
                        shut = (STATISTICS[index] for index in below.nonzero().flatten().tolist())
                        dropped.setdefault(name, []).extend(f"{kind} {statistic}" for statistic in shut)
        yield dropped
    finally:
        for weight, old in before:
            weight.copy_(old)


def _open_sizes(rank: int) -> dict[int, Any]:
    """Return a name for each dimension behind the channels."""
    names = ("height", "width") if rank == 4 else [f"size_{axis}" for axis in range(2, rank)]
    return {axis: torch.export.Dim(name) for axis, name in enumerate(names, 2)}


def _copied(value: ir.Value) -> str:
    """Return the name of the value that ``value`` is a copy of."""
    node = value.producer()
    while node is not None and node.op_type == "Identity" and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    return str(value.name)


def _rounded(gates: Tensor) -> list[float]:
    return [round(float(gate), 6) for gate in gates.detach()]


def _at_least_two(tensor: Tensor) -> Tensor:
    """Double a batch of one, which would be taken for a constant."""
    return tensor.repeat_interleave(2, dim=0) if len(tensor) == 1 else tensor
