"""The largest batch a training step has memory for."""

import resource
import sys
from dataclasses import replace
from typing import Any

import psutil

from ...data.dataset import Data
from ...errors import UnsupportedError, named
from ...frameworks.detect import get_framework
from .contract import Trainer
from .training import Training

LARGEST = 1024
"""What is not exceeded however much memory there is: more seldom trains faster, and learns less a pass."""

_TELLING = 2  # batches to a step, of which the second finds the gradients of the first in memory
_SHARE = 0.8  # of the memory that is free, since a step's needs differ a little from the last one's
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024
_OUT_OF_MEMORY = ("out of memory", "can't allocate", "cannot allocate", "oom when allocating", "failed to allocate")


def largest_batch(trainer: Trainer, model: Any, data: Data, training: Training, teacher: Any = None) -> int:
    """Return the largest power of two of images a step can take, at most `LARGEST` and the whole data.

    Sizes are tried with one step each, of no more batches than tell what further ones take, doubling until memory runs
    out, or on a CPU until twice what the last one took would be more than was free before. The model is left as it was.

    Raises `UnsupportedError` if memory does not do for one image, and in several processes: one that ran out of memory
    would leave the others waiting.
    """
    world = trainer.processes()[1]
    if world > 1:
        raise UnsupportedError(
            f"expected one process to find the largest batch in, received {world}; find it in one, and give "
            f"{named('batch_size')} {world} times that"
        )
    tried = replace(training, steps=1, accumulate=min(training.accumulate, _TELLING), workers=0)
    restore, start = get_framework(model).snapshot(model), _held()
    found, size = 0, 1
    try:
        while size <= min(LARGEST, max(len(data), 1)):
            before = _peak()
            try:
                trainer.train(model, data, replace(tried, batch_size=size), teacher=teacher)
            except Exception as error:  # each framework has a kind of its own, and tells it by its text
                if isinstance(error, MemoryError) or any(part in str(error).lower() for part in _OUT_OF_MEMORY):
                    break
                raise
            found, size = size, 2 * size
            room = psutil.virtual_memory().available + _held() - start
            if _peak() > before and 2 * (_peak() - start) > _SHARE * room:  # else the peak is not of this step
                break
    finally:
        restore()
    if not found:
        raise UnsupportedError("expected memory for a batch of one image, received less; train fewer layers")
    return found


def _held() -> int:
    """Return the memory the process holds, in bytes."""
    return int(psutil.Process().memory_info().rss)


def _peak() -> int:
    """Return the most memory the process has held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT
