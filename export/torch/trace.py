"""A PyTorch module as an ONNX graph, and as a reference to hold that graph against."""

import copy
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...convert.targets import BatchRenorm
from ...errors import UnsupportedError
from ...layers.torch.switch_norm import CLOSED
from ...patchers.torch.sites import MARK, inference
from ..norms import STATISTICS
from ..traced import Traced
from .norms import SWITCH, StandIns

Array = NDArray[Any]


def trace(model: nn.Module, arrays: Sequence[Array], *, opset: int, dynamic: bool = False) -> Traced:
    """Return ``model`` in eval mode as an ONNX graph; ``arrays`` are example inputs with the batch first.

    The batch is left open, with ``dynamic`` every dimension behind the channels too.

    The model itself is left alone. Raises `UnsupportedError` if torch cannot export it.
    """
    with quiet():
        copied = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    stand_ins = StandIns(copied)
    probe = _Probe(copied, before=stand_ins.calls.clear)
    probe.eval()
    example = tuple(torch.from_numpy(_at_least_two(array)) for array in arrays)
    with stand_ins.watching():
        probe(*example)  # for the names: what a module notes while it is traced is put back
    stand_ins.put()
    sizes = {rank: _open_sizes(rank) if dynamic else {} for rank in {tensor.dim() for tensor in example}}
    shapes = tuple({0: torch.export.Dim("batch"), **sizes[tensor.dim()]} for tensor in example)
    converted = export_module(probe, example, shapes, opset=opset, described=type(model).__name__)
    graph = converted.graph
    for value, name in zip(graph.inputs, input_names(model, len(arrays)), strict=True):
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


def export_module(
    module: nn.Module, example: tuple[Tensor, ...], shapes: tuple[Any, ...], *, opset: int, described: str
) -> ir.Model:
    """Return ``module`` as torch's exporter writes it, its open sizes named by ``shapes``.

    Raises `UnsupportedError`, which calls the model ``described``, where the exporter fails.
    """
    try:
        with quiet():
            program = torch.onnx.export(
                module, example, dynamo=True, opset_version=opset, optimize=False, verbose=False,
                dynamic_shapes=(shapes,),
            )  # fmt: skip
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise UnsupportedError(
            f"expected a model torch.onnx.export can export, received {described} on which it fails: "
            f"{reason[0] if reason else type(error).__name__}"
        ) from error
    assert program is not None
    _drop_zero_biases(program.model.graph)
    return program.model


def _drop_zero_biases(graph: ir.Graph) -> None:
    """Leave out the bias that torch writes for a convolution without one.

    It expands a 0, in 3d to a matrix, which no runtime takes for a bias.
    """
    for node in graph:
        if node.op_type == "Conv" and len(node.inputs) == 3 and _is_expanded_zero(node.inputs[2]):
            node.resize_inputs(2)


def _is_expanded_zero(value: ir.Value | None) -> bool:
    node = None if value is None else value.producer()
    if node is None or node.op_type != "Expand":
        return False
    while node is not None and node.op_type in ("Expand", "CastLike", "Cast", "Identity"):
        value = node.inputs[0]
        node = None if value is None else value.producer()
    constant = None if value is None else ir.convenience.get_const_tensor(value)
    return constant is not None and not constant.numpy().any()


def run(model: nn.Module, arrays: Sequence[Array]) -> tuple[dict[str, Array], dict[str, Array]]:
    """Return the outputs of ``model`` in eval mode, and those of its layers with weights, in call order."""
    probe = _Probe(model)
    device = next((parameter.device for parameter in model.parameters()), None)
    with inference(probe):
        values = [value.cpu().numpy() for value in probe(*(torch.from_numpy(array).to(device) for array in arrays))]
    split = len(probe.output_names)
    outputs = dict(zip(probe.output_names, values[:split], strict=True))
    return outputs, dict(zip(probe.site_names, values[split:], strict=True))


def in_double(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` that computes in float64."""
    with quiet():
        return copy.deepcopy(model).double()


def input_names(model: nn.Module, count: int) -> list[str]:
    """Return the names of the first ``count`` arguments of the model's forward."""
    names: list[str] = []
    for parameter in inspect.signature(model.forward).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}_{index}" for index in range(count - len(names))]
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(parameter.name)
    return names[:count]


def input_shapes(model: nn.Module) -> list[tuple[int, ...]] | None:
    """Return what the model says of its input shapes, which for a torch module is nothing (see `sources`)."""
    return None


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
            facts[name] = {"kind": kind, "eps": module.eps}
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


class _Probe(nn.Module):
    """A model that also returns what each of its layers with weights computed."""

    def __init__(self, model: nn.Module, before: Callable[[], None] | None = None) -> None:
        super().__init__()
        self.model = model
        self._before = before
        self.output_names: list[str] = []
        self.site_names: list[str] = []
        self._layers = {
            name: module
            for name, module in model.named_modules()
            if name and any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False)))
        }

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        """Return the model's outputs and then the layers' in call order."""
        seen: list[tuple[str, Tensor]] = []
        if self._before is not None:
            self._before()

        def note(name: str) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                if torch.is_tensor(output):  # which an activation in place would change
                    seen.append((name, output.clone()))

            return hook

        # First of all hooks, so that a norm's output is what it computed, not what a hook made of it.
        handles = [layer.register_forward_hook(note(name), prepend=True) for name, layer in self._layers.items()]
        try:
            outputs = dict(_flatten(self.model(*inputs), ""))
        finally:
            for handle in handles:
                handle.remove()
        calls: dict[str, int] = {}
        site_names = []
        for name, _ in seen:
            calls[name] = calls.get(name, 0) + 1
            site_names.append(name if calls[name] == 1 else f"{name}#{calls[name]}")
        self.output_names, self.site_names = list(outputs), site_names
        return [*outputs.values(), *(output for _, output in seen)]


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


def _flatten(output: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(output, Tensor):
        yield prefix or "output", output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from _flatten(value, f"{prefix}_{key}" if prefix else str(key))
    elif isinstance(output, list | tuple):
        for index, value in enumerate(output):
            yield from _flatten(value, f"{prefix or 'output'}_{index}")


def _rounded(gates: Tensor) -> list[float]:
    return [round(float(gate), 6) for gate in gates.detach()]


def _at_least_two(array: Array) -> Array:
    """Double a batch of one, which would be taken for a constant."""
    return np.repeat(array, 2, axis=0) if len(array) == 1 else array


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what torch says of its own internals while copying and exporting."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
