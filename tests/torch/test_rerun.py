"""Activation checkpointing, which runs a forward again within the backward pass."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from normswap.layers.torch import BatchRenorm2d, SwitchNorm2d

from ..helpers import exactly

REENTRANT = pytest.mark.parametrize("reentrant", [False, True])


class Net(nn.Module):
    """A block around a norm, checkpointed if ``reentrant`` is not None, called so many times in one forward."""

    def __init__(self, norm, reentrant=None, times=1):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 3, 1), norm, nn.Tanh(), nn.Conv2d(3, 3, 1))
        self.reentrant, self.times = reentrant, times

    def forward(self, x):
        """Return the block of the block of ``x``."""
        for _ in range(self.times):
            x = self.block(x) if self.reentrant is None else checkpoint(self.block, x, use_reentrant=self.reentrant)
        return x


def norms():
    """Norms whose running statistics are unlike the batch's, and limits that cut."""
    scheduled = BatchRenorm2d(3, schedule="pretrained", schedule_steps=4)
    scheduled.step.fill_(2)
    averaging = BatchRenorm2d(3, momentum=None)
    return {"sn": SwitchNorm2d(3), "brn": BatchRenorm2d(3), "scheduled": scheduled, "averaging": averaging}


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(4, 3, 5, 5, generator=generator) * (2 + seed) + seed).requires_grad_()


def same(model, expected):
    """Assert that two networks have the same gradients and buffers."""
    for found, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, atol=1e-5, rtol=1e-5)
    wanted = dict(expected.named_buffers())
    assert all(torch.equal(buffer, wanted[name]) for name, buffer in model.named_buffers())


@pytest.mark.parametrize("norm", ["sn", "brn", "scheduled"])
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("form", ["a checkpoint compiled", "compiled code checkpointed", "the older checkpoint of it"])
def test_compiled_code_run_again_sees_what_it_saw(norm, times, form):
    """The gradient is that of the one forward whether a compiler or autograd runs the compiled code once more."""
    torch.compiler.reset()
    plain = Net(norms()[norm], times=times)
    net = copy.deepcopy(plain)
    net.reentrant = form == "the older checkpoint of it"
    x, again = batch(1), batch(1)
    if form == "a checkpoint compiled":
        found = torch.compile(net, backend="aot_eager")(again)
    else:
        net.block = torch.compile(net.block, backend="aot_eager")
        found = net(again)

    expected = plain(x)
    for y in (found, expected):
        y.pow(2).sum().backward()

    torch.testing.assert_close(again.grad, x.grad, atol=1e-4, rtol=1e-4)
    for one, other in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-4, rtol=1e-4)


@REENTRANT
@pytest.mark.parametrize("norm", ["sn", "brn", "scheduled", "averaging"])
@pytest.mark.parametrize("times", [1, 3])
def test_the_gradient_is_that_of_the_one_forward(norm, reentrant, times):
    """With checkpoints the gradient is the same, statistics move once, and steps are counted once."""
    plain = Net(norms()[norm], times=times)
    kept = copy.deepcopy(plain)
    kept.reentrant = reentrant
    for seed in range(3):
        for model in (plain, kept):
            model(batch(seed)).square().sum().backward()

        same(kept, plain)


@REENTRANT
def test_batches_in_flight_are_told_apart(reentrant):
    """Several forwards before the first backward, in any order, each see what they saw."""
    plain = Net(norms()["brn"])
    kept = copy.deepcopy(plain)
    kept.reentrant = reentrant
    for model in (plain, kept):
        losses = [model(batch(seed)).square().sum() for seed in range(4)]
        for index in (1, 3, 0, 2):
            losses[index].backward()

    same(kept, plain)


def test_a_graph_that_is_kept_is_run_again_twice():
    """A second backward pass through a checkpoint gives the gradient of the first."""
    plain = Net(norms()["brn"])
    kept = copy.deepcopy(plain)
    kept.reentrant = False
    for model in (plain, kept):
        loss = model(batch(0)).square().sum()
        loss.backward(retain_graph=True)
        model(batch(1))
        loss.backward()

    same(kept, plain)


@REENTRANT
def test_under_distributed_data_parallel(reentrant, tmp_path):
    """A wrapper that sends buffers around before each forward changes nothing of that."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        plain = Net(norms()["scheduled"])
        kept = copy.deepcopy(plain)
        kept.reentrant = reentrant
        wrapped = DistributedDataParallel(kept)
        for seed in range(2):
            for model in (plain, wrapped):
                model(batch(seed)).square().sum().backward()

        same(kept, plain)
    finally:
        dist.destroy_process_group()


def test_a_pass_that_repeats_none_is_refused():
    """A second run on another input would get a statistic of a call that it is not, so it is refused by name."""
    layer, calls = BatchRenorm2d(4).train(), []
    layer.site = "stem.1"

    def changing(x):
        calls.append(x)
        return layer(x + 10 * len(calls))

    y = checkpoint(changing, torch.randn(3, 4, 5, 5, requires_grad=True), use_reentrant=False)
    message = (
        "stem.1: expected a forward pass within a backward pass to repeat one of the last 128 of this layer, received "
        "another input; checkpoint fewer calls at a time, or leave this layer out of the checkpoint"
    )
    with pytest.raises(RuntimeError, match=exactly(message)):
        y.sum().backward()
