"""How long onnxruntime takes for files, side by side."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from .runtime import TIMEOUT, answers, session

Latencies = dict[str, dict[int, tuple[float, float]]]
"""Median and least milliseconds of a run by file and batch size."""

BATCH_SIZES = (1, 8)
ROUNDS = 50
SECONDS = 2.0
"""Measuring a batch size ends after that many rounds, or that long."""


def latencies(
    files: Mapping[str, Path],
    sizes: Sequence[tuple[int, ...]],
    *,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    timeout: float = TIMEOUT,
) -> Latencies:
    """Return median and least milliseconds of a run on the CPU by file and batch size, or of the one it is fixed to.

    The files take turns, so that what else the machine does meets all of them. ``sizes`` are the shapes of their
    inputs without the batch; all take standard normal float32. Raises `InputError` if one takes more than ``timeout``
    seconds.
    """
    sessions = {name: session(path, spinning=False) for name, path in files.items()}
    rng = np.random.default_rng(0)
    found: Latencies = {name: {} for name in files}
    first = next(iter(sessions.values())).get_inputs()[0].shape[0]
    for batch in [first] if isinstance(first, int) else batch_sizes:
        arrays = [rng.standard_normal((batch, *size), np.float32) for size in sizes]
        feeds = {
            name: dict(zip((entry.name for entry in runner.get_inputs()), arrays, strict=True))
            for name, runner in sessions.items()
        }
        times: dict[str, list[float]] = {name: [] for name in files}
        for name, runner in sessions.items():
            answers(runner, None, feeds[name], timeout=timeout)
        end = time.perf_counter() + SECONDS * len(files)
        for _ in range(ROUNDS):
            for name, runner in sessions.items():
                times[name].append(_milliseconds(runner, feeds[name]))
            if time.perf_counter() > end:
                break
        for name, measured in times.items():
            found[name][batch] = (median(measured), min(measured))
    return found


def _milliseconds(runner: Any, feed: Mapping[str, Any]) -> float:
    start = time.perf_counter()
    runner.run(None, feed)
    return (time.perf_counter() - start) * 1e3
