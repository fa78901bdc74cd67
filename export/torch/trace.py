"""A PyTorch module as an ONNX graph, and as a reference to hold that graph against."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray
from torch import Tensor, nn

from ...convert.targets import BatchRenorm
from ...frameworks.example import Inputs
from ...frameworks.names import unique
from ...frameworks.torch import Probe, copied, input_names, quiet
from ...layers.torch.switch_norm import CLOSED
from ...patchers.torch.batch_norm import epsilon_of
from ...patchers.torch.sites import MARK
from ..dimensions import explained, wanted
from ..names import settle
from ..norms import STATISTICS
from ..traced import Traced
from .exporter import export_module
from .first_call import called
from .norms import SWITCH, StandIns

Array = NDArray[Any]


def trace(model: nn.Module, example: Inputs, *, opset: int, dynamic: bool = False) -> Traced:
    """Return ``model`` in eval mode as an ONNX graph; the arrays of ``example`` have the batch first.

    The batch is left open, with ``dynamic`` every dimension behind the channels too; what the model fixes has the size
    it has in the example, with a note.

    The model itself is left alone. Raises `UnsupportedError` if torch cannot export it.
    """
    with quiet():
        twin = copied(model).cpu().eval().requires_grad_(False)
    stand_ins = StandIns(twin)
    probe = Probe(twin, example, before=stand_ins.calls.clear)
    probe.eval()
    inputs = input_names(model, example)
    with stand_ins.looking():
        tensors = called(probe, example, inputs)
    stand_ins.put()
    shapes = [tuple(tensor.shape) for tensor in tensors]
    open_sizes = wanted(inputs, shapes, dynamic=dynamic)
    converted, fixed = export_module(probe, tensors, open_sizes, opset=opset, described=type(model).__name__)
    graph = converted.graph
    for initializer in list(graph.initializers.values()):
        own = str(initializer.name).removeprefix("model.")
        if own != initializer.name:
            initializer.name = unique(own, graph.initializers)
    split = len(probe.output_names)
    returned = list(graph.outputs)[split:]
    while len(graph.outputs) > split:
        graph.outputs.pop()
    for index, value in enumerate(graph.outputs):
        graph.outputs[index] = _copied(value)
    settle(graph, inputs, probe.output_names)
    sites = {name: str(_copied(value).name) for name, value in zip(probe.site_names, returned, strict=True)}
    norms = dict(zip(stand_ins.marks(graph), stand_ins.calls, strict=True))
    notes = explained(inputs, shapes, fixed)
    return Traced(converted, inputs, probe.output_names, sites, norms, notes)


def refusal(model: nn.Module) -> str | None:
    """Return why the model cannot be exported, whatever it is called with, or None: for its weights' dtype."""
    dtypes = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()}
    if any(p.is_meta for p in model.parameters()):
        return "expected float32 weights, received its weights are on the meta device: load them first"
    if others := sorted(dtypes - {"float32"}):
        return f"expected float32 weights, received weights of dtype {', '.join(others)}: convert with model.float()"
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


def _copied(value: ir.Value) -> ir.Value:
    """Return the value that ``value`` is a copy of."""
    node = value.producer()
    while node is not None and node.op_type == "Identity" and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    return value


def _rounded(gates: Tensor) -> list[float]:
    return [round(float(gate), 6) for gate in gates.detach()]
