"""How long a patch takes and how much memory beside the model's it needs, by number of layers and by size of model."""

import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils import skip_init

import normswap

TARGETS = ("sn", "brn", "gn")
LAYERS = (10, 100, 1_000, 10_000)
MEGABYTES = (1, 10, 100, 1_000)
RUNS = 3
"""A figure is the best of so many: what else runs on the machine only adds."""


@dataclass(frozen=True)
class Row:
    """One patch: a model of ``layers`` BatchNorms and so many megabytes.

    ``read`` and ``seconds`` are CPU time: to look once at every module and parameter, and to patch. ``extra`` is the
    peak of memory in MiB above what the model took; ``copied`` how many bytes of weights that are no norm's are new.
    """

    target: str
    layers: int
    megabytes: float
    read: float
    seconds: float
    extra: float
    copied: int

    @property
    def per_layer(self) -> float:
        """Milliseconds a layer beyond reading the model."""
        return 1e3 * (self.seconds - self.read) / self.layers


def by_layers(counts: tuple[int, ...] = LAYERS) -> Iterator[Row]:
    """Yield a row for each target and number of layers, of 8 channels each."""
    for count in counts:
        for target in TARGETS:
            yield _best(target, count, 8)


def by_size(megabytes: tuple[int, ...] = MEGABYTES) -> Iterator[Row]:
    """Yield a row for each target and size of model, with ten layers."""
    for size in megabytes:
        for target in TARGETS:
            yield _best(target, 10, round((size * 2**20 / 4 / 10) ** 0.5))


def _best(target: str, layers: int, width: int) -> Row:
    _warm_up(target)  # imports what is needed, once
    # A process of its own for each run, forked from one whose heap has no room left over from the run before.
    with get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        rows = [pool.apply(_measure, (target, layers, width)) for _ in range(RUNS)]
    return min(rows, key=lambda row: row.seconds)


def _measure(target: str, layers: int, width: int) -> Row:
    torch.set_num_threads(1)
    _warm_up(target)
    model = nn.Sequential(
        *(
            nn.Sequential(skip_init(nn.Conv2d, width, width, 1, bias=False), nn.BatchNorm2d(width))
            for _ in range(layers)
        )
    )
    weights = {name: p.data_ptr() for name, p in model.named_parameters() if p.dim() > 1}
    start = time.process_time()
    size = sum(p.numel() * p.element_size() for module in model.modules() for p in module.parameters(recurse=False))
    read = time.process_time() - start
    gc.collect()
    before = _start_watching()
    start = time.process_time()
    report = normswap.patch(model, target)
    seconds = time.process_time() - start
    extra = _status("VmHWM") - before
    assert len(report.replaced) == layers
    moved = [p for name, p in model.named_parameters() if name in weights and p.data_ptr() != weights[name]]
    copied = sum(p.numel() * p.element_size() for p in moved)
    return Row(target, layers, size / 2**20, read, seconds, extra, copied)


def _warm_up(target: str) -> None:
    normswap.patch(nn.Sequential(nn.BatchNorm2d(4)), target)


def _start_watching() -> float:
    """Let the kernel count the peak of this process's memory from now on; return what it takes now, in MiB."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(field: str) -> float:
    """Return a figure of this process as Linux tells it, in MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024
