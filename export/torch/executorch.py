"""A PyTorch module to a file of ExecuTorch, by torch.export and ExecuTorch's own passes."""

import json
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import UnsupportedError
from ...frameworks.example import Inputs
from ...frameworks.torch import Probe, copied, input_names, quiet
from ...verification.runtimes.executorch import TOLD
from ...verification.runtimes.known import RUNTIMES
from ..dimensions import BATCH, explained, wanted
from ..failures import reason_of
from ..traced import Program
from .exporter import place
from .first_call import called
from .volumes import VOLUMES

MOST = 32
"""Samples that a file takes at once at most: ExecuTorch plans the memory for them; no fewer than `verify` runs."""


def convert(model: nn.Module, example: Inputs) -> Program:
    """Return ``model`` in eval mode as a file of ExecuTorch with the methods ``forward`` and `TOLD`.

    The batch is open from one sample to `MOST`, or the example's, where torch can export the model so.

    Raises `MissingDependencyError` without ExecuTorch, and `UnsupportedError` for what torch.export fails on and for
    operators that ExecuTorch lacks.
    """
    try:
        with quiet():
            from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
            from executorch.exir import to_edge_transform_and_lower
            from executorch.exir.passes.constant_prop_pass import constant_prop_pass
            from executorch.runtime import Runtime
    except ImportError as error:
        raise RUNTIMES["executorch"].missing("executorch", str(error)) from error
    with quiet():
        twin = copied(model).cpu().eval().requires_grad_(False)
    probe = Probe(twin, example)
    inputs = input_names(model, example)
    tensors = called(probe.eval(), example, inputs, kind="ExecuTorch")
    shapes = [tuple(tensor.shape) for tensor in tensors]
    firsts = wanted(inputs, shapes)
    batches = [index for (index, _), name in firsts.items() if name == BATCH]
    with quiet():
        try:
            program = _exported(_Outputs(probe), tensors, batches)
        except Exception:
            try:
                program, batches = _exported(_Outputs(probe), tensors, []), []
            except Exception as error:
                raise UnsupportedError(
                    f"expected a model torch.export can export, received {type(model).__name__} on which it fails: "
                    f"{reason_of(error).rstrip('.')}{place(error, probe)}; write that in another way"
                ) from error
        told = {
            "inputs": _values(inputs, tensors, batches),
            "outputs": _values(probe.output_names, _results(program)),
            "most": max(MOST, *(shapes[index][0] for index in batches)) if batches else 0,
        }
        try:
            lowered = to_edge_transform_and_lower(
                constant_prop_pass(program),
                partitioner=[XnnpackPartitioner()],
                constant_methods={TOLD: json.dumps(told)},
            ).to_executorch()
        except Exception as error:
            raise UnsupportedError(
                f"expected a model that ExecuTorch can hold, received {type(model).__name__} on which its passes fail: "
                f"{reason_of(error)}"
            ) from error
        plan = next(plan for plan in lowered.executorch_program.execution_plan if plan.name == "forward")
        known = Runtime.get().operator_registry.operator_names
    needed = {f"{operator.name}.{operator.overload}".removesuffix(".") for operator in plan.operators}
    if lacking := sorted(needed - known):
        raise UnsupportedError(
            f"expected a model that ExecuTorch can hold, received operators that it lacks: {', '.join(lacking)}"
        )
    fixed = [place for place in firsts if place[0] not in batches]
    taken: dict[str, list[int | str | None]] = {
        name: [BATCH if index in batches and axis == 0 else size for axis, size in enumerate(shape)]
        for index, (name, shape) in enumerate(zip(inputs, shapes, strict=True))
    }
    return Program(bytes(lowered.buffer), taken, len(plan.chains[0].instructions), explained(inputs, shapes, fixed))


class _Outputs(nn.Module):
    """A model that takes the arrays of an example one by one, and returns its outputs alone."""

    def __init__(self, probe: Probe) -> None:
        super().__init__()
        self.probe = probe
        self.count = len(probe.output_names)

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        found: list[Tensor] = self.probe(*inputs)
        return found[: self.count]


def _exported(module: nn.Module, tensors: Sequence[Tensor], batches: Sequence[int]) -> torch.export.ExportedProgram:
    """Return ``module`` as torch exports it, its ``batches`` open.

    Those are traced with as many samples as there may be: torch compares their number with some of its own, at which it
    chooses another kernel, and it would be bounded by those if it were below.
    """
    most = max([MOST, *(len(tensors[index]) for index in batches)])
    batch = torch.export.Dim(BATCH, min=1, max=most)
    traced = [
        tensor[torch.arange(most) % len(tensor)] if index in batches else tensor for index, tensor in enumerate(tensors)
    ]
    open_sizes = tuple({0: batch} if index in batches else {} for index in range(len(tensors)))
    program = torch.export.export(module, tuple(traced), dynamic_shapes=(open_sizes,))
    aten = torch.ops.aten
    decomposed: torch.export.ExportedProgram = program.run_decompositions({
        **VOLUMES, aten.group_norm.default: _group_norm, aten.instance_norm.default: _instance_norm
    })  # fmt: skip
    return decomposed


def _results(program: torch.export.ExportedProgram) -> list[Tensor]:
    """Return what stands for the outputs of a program, with their types and sizes."""
    (output,) = (node for node in program.graph.nodes if node.op == "output")
    results: Any = output.args[0]
    return [node.meta["val"] for node in results]


def _values(names: Sequence[str], tensors: Sequence[Tensor], batches: Sequence[int] = ()) -> list[Any]:
    """Return name, type and shape of tensors, as the protocol of runtimes has them."""
    return [
        (
            name,
            str(tensor.dtype).removeprefix("torch."),
            [
                size if isinstance(size, int) and not (axis == 0 and index in batches) else -1
                for axis, size in enumerate(tensor.shape)
            ],
        )
        for index, (name, tensor) in enumerate(zip(names, tensors, strict=True))
    ]


def _group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    """Return GroupNorm by means axis by axis, of deviations: ExecuTorch's own loses digits in its sums of a group."""

    def mean(values: Tensor) -> Tensor:
        for _ in range(x.ndim - 2):
            values = values.mean(-1)
        of_groups = values.reshape(-1, groups, x.shape[1] // groups).mean(2, keepdim=True)
        return of_groups.expand(-1, -1, x.shape[1] // groups).reshape(-1, x.shape[1], *each)

    each = [1] * (x.ndim - 2)
    deviation = x - mean(x)
    scale = torch.rsqrt(mean(deviation * deviation) + eps)
    scale = scale if weight is None else scale * weight.reshape(-1, *each)
    y = deviation * scale
    return y if bias is None else y + bias.reshape(-1, *each)


def _instance_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor:
    """Return InstanceNorm as GroupNorm, or by its running statistics as BatchNorm."""
    if use_input_stats:
        return _group_norm(x, x.shape[1], weight, bias, eps)
    return F.batch_norm(x, mean, variance, weight, bias, eps=eps)
