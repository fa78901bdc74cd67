"""Whether every timm architecture with BatchNorm can be patched to every target, and computes something finite after.

Each is built with random weights and running statistics, patched to sn, brn and gn in turn, run, and restored. It has a
problem where a BatchNorm is left that the plan did not explain, an output is not finite, BatchRenorm computes anything
else than the model did, or so does the model after undo.
"""

import json
import math
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import peers
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

import normswap

TARGETS = ("sn", "brn", "gn")
SIDES = (64, 96, 128, 160, 192, 224, 256, 288, 384, 448)
"""Sides of the images to try, from the least: most convolutional networks take any, others their own alone."""


@dataclass
class Row:
    """What was found for one architecture.

    ``side`` is that of the image it was run on, the least it takes. ``replaced`` says by target how many BatchNorms
    were, ``skipped`` which were not and why. ``seconds`` is CPU time for all of it. ``problems`` is empty where all is
    well.
    """

    name: str
    parameters: int = 0
    batch_norms: int = 0
    side: int | None = None
    replaced: dict[str, int] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0


def sweep(names: Iterable[str], results: Path) -> Iterator[Row]:
    """Yield a row for each architecture, from ``results`` (JSON lines) where it is there, and add it there if not."""
    done = {}
    if results.exists():
        done = {row["name"]: Row(**row) for row in map(json.loads, results.read_text().splitlines())}
    with results.open("a") as lines:
        for name in names:
            if name not in done:
                done[name] = examine(name)
                lines.write(json.dumps(asdict(done[name])) + "\n")
                lines.flush()
            yield done[name]


def architectures(pattern: str = "*", limit: int | None = None) -> list[str]:
    """Return the names of timm's architectures that match a glob, or ``limit`` of them evenly spread."""
    peers.make_importable()
    import timm

    names = list(timm.list_models(pattern))
    return names if limit is None else names[:: math.ceil(len(names) / limit)]


def examine(name: str) -> Row:
    """Build one architecture and try every target on it."""
    peers.make_importable()
    import timm

    row, start = Row(name), time.process_time()
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    try:
        with _QuickFill():
            model = timm.create_model(name, pretrained=False).eval()
        row.parameters = sum(p.numel() for p in model.parameters())
        found = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        row.batch_norms = len(found)
        if found:
            for module in found:
                if module.running_mean is not None:
                    module.running_mean.uniform_(-0.2, 0.2)
                    module.running_var.uniform_(0.5, 1.5)
            _examine(model, row)
    except Exception as error:
        row.problems.append(f"{type(error).__name__}: {error}"[:500])
    row.seconds = round(time.process_time() - start, 3)
    return row


@torch.no_grad()
def _examine(model: nn.Module, row: Row) -> None:
    x, before = _run_at_least_size(model)
    row.side = x.shape[-1]
    if not torch.isfinite(before).all():
        row.problems.append("the model as built is not finite")
    for target in TARGETS:
        report = normswap.patch(model, target, example=x)
        row.replaced[target] = len(report.replaced)
        row.skipped += sorted(f"{target}: {d.site.name}: {d.note}" for d in report.skipped)
        explained = {decision.site.name for decision in report.skipped if decision.note}
        left = [name for name, module in model.named_modules() if "BatchNorm" in type(module).__name__]
        if unexplained := sorted(set(left) - explained):
            row.problems.append(f"{target}: left without a reason: {', '.join(unexplained)}")
        after = _first(model(x))
        if not torch.isfinite(after).all():
            row.problems.append(f"{target}: not finite")
        if target == "brn" and not torch.equal(after, before):
            row.problems.append(f"brn: differs by {(after - before).abs().max():.1e}")
        report.undo()
    if not torch.equal(_first(model(x)), before):
        row.problems.append("undo: computes something else")


def _run_at_least_size(model: Any) -> tuple[Tensor, Tensor]:
    """Return the least image that ``model`` takes, and its output."""
    channels, *own = model.pretrained_cfg["input_size"]
    for side in sorted({*SIDES, *own}):
        x = torch.randn(1, channels, side, side)
        try:
            return x, _first(model(x))
        except (RuntimeError, AssertionError, ValueError, IndexError) as error:
            problem = error
    raise problem


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else _first(output[0])


class _QuickFill(TorchFunctionMode):
    """Fill big tensors with a block of random numbers over and over, which is many times quicker than anew."""

    BLOCK = 1 << 16

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in (Tensor.normal_, Tensor.uniform_) and args[0].numel() > self.BLOCK and args[0].is_contiguous():
            flat = args[0].detach().view(-1)
            block = function(torch.empty(self.BLOCK), *args[1:], **kwargs)
            for part in flat.split(self.BLOCK):
                part.copy_(block[: part.numel()])
            return args[0]
        return function(*args, **kwargs)
