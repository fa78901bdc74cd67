"""A PyTorch module as an ONNX graph, and as a reference to hold that graph against."""

import copy
import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..convert.targets import BatchRenorm
from ..errors import UnsupportedError
from ..layers.torch.switch_norm import SwitchNorm1d, SwitchNorm2d, SwitchNorm3d
from ..patchers.torch import MARK, inference
from .traced import Traced

Array = NDArray[Any]


def trace(model: nn.Module, arrays: Sequence[Array], *, opset: int) -> Traced:
    """Return ``model`` in eval mode as an ONNX graph; ``arrays`` are example inputs with the batch first.

    The model itself is left alone: one-hot Switchable Normalizations are collapsed to BatchNorm on a copy.
    Raises `UnsupportedError` if torch cannot export it.
    """
    with _quiet():
        copied = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    collapse(copied)
    probe = _Probe(copied)
    probe.eval()
    example = tuple(torch.from_numpy(_at_least_two(array)) for array in arrays)
    probe(*example)  # for the names: what a module notes while it is traced is put back
    dynamic = (tuple({0: torch.export.Dim("batch")} for _ in example),)
    try:
        with _quiet():
            program = torch.onnx.export(
                probe, example, dynamo=True, opset_version=opset, optimize=False, verbose=False,
                dynamic_shapes=dynamic,
            )  # fmt: skip
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise UnsupportedError(
            f"expected a model torch.onnx.export can export, received {type(model).__name__} on which it fails: "
            f"{reason[0] if reason else type(error).__name__}"
        ) from error
    assert program is not None
    graph = program.model.graph
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
    sites = {name: str(value.name) for name, value in zip(probe.site_names, outputs[split:], strict=True)}
    return Traced(program.model, sites)


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
    with _quiet():
        return copy.deepcopy(model).double()


def collapse(model: nn.Module) -> None:
    """Turn each Switchable Normalization whose gates are one-hot on the batch statistics into a BatchNorm."""
    classes: dict[type, type[nn.Module]] = {
        SwitchNorm1d: nn.BatchNorm1d,
        SwitchNorm2d: nn.BatchNorm2d,
        SwitchNorm3d: nn.BatchNorm3d,
    }
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, SwitchNorm1d | SwitchNorm2d | SwitchNorm3d) and _is_batch_norm(child):
                replacement = classes[type(child)](child.num_features, eps=child.eps).eval()
                for part in ("weight", "bias", "running_mean", "running_var"):
                    setattr(replacement, part, getattr(child, part))
                added = {key: value for key, value in vars(child).items() if key == "_modules" or "_hooks" in key}
                vars(replacement).update(added)  # such as the activation that a fused BatchNorm came with
                parent._modules[name] = replacement


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


class _Probe(nn.Module):
    """A model that also returns what each of its layers with weights computed."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
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

        def note(name: str) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                if torch.is_tensor(output):  # which an activation in place would change; a trace tells them apart
                    seen.append((name, output if torch.compiler.is_exporting() else output.clone()))

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


def _flatten(output: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(output, Tensor):
        yield prefix or "output", output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from _flatten(value, f"{prefix}_{key}" if prefix else str(key))
    elif isinstance(output, list | tuple):
        for index, value in enumerate(output):
            yield from _flatten(value, f"{prefix or 'output'}_{index}")


def _is_batch_norm(module: nn.Module) -> bool:
    if getattr(module, "batch_statistics", "none") == "none":
        return False
    gates = module.gates()  # type: ignore[operator]
    return all(gate.detach().tolist() == [0, 0, 1] for gate in gates)


def _rounded(gates: Tensor) -> list[float]:
    return [round(float(gate), 6) for gate in gates.detach()]


def _at_least_two(array: Array) -> Array:
    """Double a batch of one, which would be taken for a constant."""
    return np.repeat(array, 2, axis=0) if len(array) == 1 else array


@contextmanager
def _quiet() -> Iterator[None]:
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
