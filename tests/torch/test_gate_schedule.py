"""The hook that holds the gates of a PyTorch model and lets them harden."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normswap.errors import InputError
from normswap.finetune import GateSchedule
from normswap.layers.torch import SwitchNorm2d

from ..helpers import exactly
from .loops import LR, batches, network, optimizer_of

LOOPS = ["plain", "bf16", "accumulating", "compiled", "distributed"]


@pytest.fixture
def group(tmp_path):
    """A process group of one."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("loop", LOOPS)
def test_holds_the_gates_and_lets_them_go_without_a_leap(loop, request):
    """Gates stay bit for bit as long as they are held, all else learns; their first step is one along a gradient.

    Momentum gathered while they were held would make that step several times as long.
    """
    model, _ = network("sn")
    hook, optimizer, run = GateSchedule(model, 6, freeze=4), optimizer_of(model), model
    if loop == "compiled":
        torch.compiler.reset()
        run = torch.compile(model, backend="eager")
    elif loop == "distributed":
        request.getfixturevalue("group")
        run = nn.parallel.DistributedDataParallel(model)
    gates = model.bn.mean_weight
    before, convolution = gates.detach().clone(), model.conv.weight.detach().clone()
    model.train()
    for step in range(5):
        hook.on_step(step)
        optimizer.zero_grad()
        for x, y in batches(2 if loop == "accumulating" else 1):
            with torch.autocast("cpu", torch.bfloat16) if loop == "bf16" else nullcontext():
                F.cross_entropy(run(x), y).backward()
        if step == 4:
            assert gates.grad.abs().max() > 0
            before = before - LR * gates.grad
        optimizer.step()
        torch.testing.assert_close(gates.detach(), before, rtol=0, atol=0 if step < 4 else 1e-8)

    assert not torch.equal(model.conv.weight, convolution)


def test_adam_starts_afresh():
    """The first step after a long freeze has the length of a first one, the rate, with weight decay too."""
    model, _ = network("sn")
    hook, gates = GateSchedule(model, 100, freeze=50), model.bn.mean_weight
    optimizer = torch.optim.AdamW([gates], lr=1e-3)
    x, y = batches(1)[0]
    before = gates.detach().clone()
    for step in range(51):
        assert torch.equal(gates, before)
        hook.on_step(step)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    assert 0.9e-3 < (gates - before).abs().max() < 1.1e-3


def test_temperature():
    """It falls geometrically from the first free step to the last one of the run, and stays there."""
    model, _ = network("sn")
    hook = GateSchedule(model, 6, freeze=1 / 3, temperature=(2.0, 0.25))
    found = []
    for step in range(8):
        hook.on_step(step)
        found.append(float(model.bn.temperature))

    np.testing.assert_allclose(found, [2, 2, 2, 1, 0.5, 0.25, 0.25, 0.25], rtol=1e-6)


@pytest.mark.parametrize("before", [0.5, 0])
def test_begins_with_the_gates_there_are(before):
    """A temperature that a layer had before, 0 too, stays in its gates; going on with a step changes no logits."""
    model, _ = network("sn")
    layer = model.bn
    layer.mean_weight.data, layer.temperature = torch.tensor([0.0, 0.1, 0.2]), before
    expected = layer.gates()[0].detach()
    hook = GateSchedule(model, 4, temperature=(2.0, 0.5))
    torch.testing.assert_close(layer.gates()[0], expected)
    for _ in range(2):
        hook.on_step(0)
        torch.testing.assert_close((2 * layer.gates()[0].log()).softmax(0), expected)
    kept = layer.mean_weight.detach().clone()
    GateSchedule(model, 4, temperature=(2.0, 0.5)).on_step(3)

    assert torch.equal(layer.mean_weight, kept)
    assert layer.temperature == 0.5


def test_steps_held_are_an_integer():
    """One of NumPy's counts steps too, where a float is a share of them."""
    layer = SwitchNorm2d(3)
    held = []
    for freeze in (np.int64(1), np.float64(0.5)):
        hook = GateSchedule(layer, 4, freeze=freeze)
        for step in range(4):
            hook.on_step(step)
            layer.zero_grad()
            layer(torch.randn(2, 3, 4, 4)).square().sum().backward()
            held.append(layer.mean_weight.grad is None)

    assert held == [True, False, False, False, True, True, False, False]


@pytest.mark.parametrize("harden", [False, True])
def test_leaves_a_plain_layer(harden, images):
    """The end keeps the gates, or gives all to the largest, at temperature 1, with no key and no hook more."""
    model, _ = network("sn")
    keys = list(model.state_dict())
    hook = GateSchedule(model, 10, freeze=2, temperature=(1.0, 0.1), harden=harden)
    model.bn.mean_weight.data = torch.tensor([0.0, 0.1, 0.2])
    hook.on_step(9)
    gates, expected = model.bn.gates()[0], model.eval()(images)
    hook.on_end()

    torch.testing.assert_close(gates, torch.tensor([0.0, 1.0, 2.0]).softmax(0))
    torch.testing.assert_close(model.bn.gates()[0], torch.tensor([0.0, 0, 1]) if harden else gates)
    if not harden:
        torch.testing.assert_close(model(images), expected)
    assert model.bn.temperature == 1.0
    assert list(model.state_dict()) == keys
    assert not model.bn.mean_weight._backward_hooks


def test_gradients_at_a_temperature_held_in_a_tensor():
    """The eager layer's own backward agrees with autograd through the compiled layer's plain operations."""
    torch.compiler.reset()
    layer = SwitchNorm2d(4, dtype=torch.float64)
    layer.mean_weight.data = torch.tensor([0.3, 0.1, 0.2], dtype=torch.float64)
    GateSchedule(layer, 2, temperature=(0.5, 0.2)).on_step(1)
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    found = []
    for run in (layer, torch.compile(layer, backend="eager")):
        (run(x) * x.cos()).sum().backward()
        found.append([p.grad for p in layer.parameters()])
        layer.zero_grad()

    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freeze": 1.5}, "expected `freeze` within the 4 steps, received freeze=1.5"),
        ({"freeze": 5}, "expected `freeze` within the 4 steps, received freeze=5"),
        ({"temperature": (1.0, 0.0)}, "expected `temperature` above 0, received temperature=(1.0, 0.0)"),
    ],
)
def test_refusals(options, message):
    """Values out of range are refused."""
    with pytest.raises(InputError, match=exactly(message)):
        GateSchedule(SwitchNorm2d(3), 4, **options)
