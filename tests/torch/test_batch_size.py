"""The search for the largest batch that memory allows."""

import copy

import pytest
import torch
from torch import nn

import normswap
from normswap.errors import UnsupportedError
from normswap.finetune.run import batch_size
from normswap.finetune.run.batch_size import largest_batch
from normswap.finetune.run.torch import trainer
from normswap.finetune.run.training import Training

from .runs import coloured


@pytest.fixture(scope="module")
def data():
    return coloured()


class Failing:
    """An engine that has no memory for batches of ``size`` and more."""

    def __init__(self, size, error, processes=1):
        self.size, self.error, self.count = size, error, processes

    def processes(self):
        return 0, self.count

    def train(self, model, data, training, teacher=None):
        if training.batch_size >= self.size:
            raise self.error


def test_doubles_until_memory_runs_out(model, data):
    """The largest size that trains is found, and the model is as it was."""
    normswap.patch(model, "sn")
    before, sizes = copy.deepcopy(model.state_dict()), []

    class Engine:
        processes = staticmethod(trainer.processes)

        @staticmethod
        def train(model, data, training, teacher=None):
            sizes.append(training.batch_size)
            if training.batch_size > 16:
                raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
            trainer.train(model, data, training, teacher=teacher)

    assert largest_batch(Engine, model, data, Training()) == 16
    assert sizes == [1, 2, 4, 8, 16, 32]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_is_at_most_the_data(model, data):
    """No more images than there are."""
    normswap.patch(model, "gn")
    assert largest_batch(trainer, model, data, Training()) == 64


def test_tries_no_more_than_there_is(data, monkeypatch):
    """Neither images beyond the data, batches and readers that tell nothing, nor what memory has no room for.

    The process has held much before, which hides what the first sizes take.
    """
    tried = []

    class Engine(Failing):
        def train(self, model, data, training, teacher=None):
            tried.append((training.batch_size, training.accumulate, training.workers))

    monkeypatch.setattr(batch_size, "_peak", lambda: max([5_000, *(1_000 + 100 * size for size, *_ in tried)]))
    monkeypatch.setattr(batch_size, "_held", lambda: 1_000)
    monkeypatch.setattr(batch_size.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 12_000}))

    assert largest_batch(Engine(0, None), nn.Identity(), data, Training(accumulate=8, workers=4)) == 64
    assert tried == [(size, 2, 0) for size in (1, 2, 4, 8, 16, 32, 64)]
    tried.clear()
    assert largest_batch(Engine(0, None), nn.Identity(), range(1024), Training()) == 64
    assert len(tried) == 7


@pytest.mark.parametrize(
    "text",
    [
        "OOM when allocating tensor with shape[4,64]",
        "{{function_node __wrapped__AddV2}} failed to allocate memory [Op:AddV2]",
        "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1024 bytes",
        "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to allocate",
    ],
)
def test_whatever_kind_of_error_tells_of_memory(data, text):
    """TensorFlow's are no RuntimeError: the text decides; one that says something else is raised."""

    class ResourceExhaustedError(Exception):
        pass

    assert largest_batch(Failing(4, ResourceExhaustedError(text)), nn.Identity(), data, Training()) == 2
    error = ResourceExhaustedError("expected something else")
    with pytest.raises(ResourceExhaustedError) as raised:
        largest_batch(Failing(4, error), nn.Identity(), data, Training())
    assert raised.value is error


def test_refusals(data):
    """Memory that does not do for one image, and several processes, one of which could leave the others waiting."""
    message = "expected memory for a batch of one image, received less; train fewer layers"
    with pytest.raises(UnsupportedError, match=f"^{message}$"):
        largest_batch(Failing(1, MemoryError()), nn.Identity(), data, Training())
    message = (
        "expected one process to find the largest batch in, received 3; find it in one, and give batch_size 3 "
        "times that"
    )
    with pytest.raises(UnsupportedError, match=f"^{message}$"):
        largest_batch(Failing(1, MemoryError(), processes=3), nn.Identity(), data, Training())
