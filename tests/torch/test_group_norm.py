"""A GroupNorm that `patch` put in: it survives torch's crash, and is otherwise the plain module."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

import normswap

SURVIVAL = """
import torch
from torch import nn
import normswap

cls, shape = {{4: nn.BatchNorm2d, 5: nn.BatchNorm3d}}[{rank}], {shape}
norm = nn.Sequential(cls(4))
normswap.patch(norm, "gn")
norm[0].requires_grad_(False)
for name in {trainable}:
    getattr(norm[0], name).requires_grad_()
found = []
x = torch.randn(shape)
for memory in (torch.contiguous_format, {memory}):
    norm.zero_grad()
    norm(x.to(memory_format=memory)).square().sum().backward()
    found.append([p.grad.clone() for p in norm.parameters() if p.requires_grad])
torch.testing.assert_close(*found)
print("survived")
"""


@pytest.fixture
def norm():
    """A GroupNorm in the place of a BatchNorm."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    normswap.patch(model, "gn")
    return model[1]


@pytest.mark.parametrize("trainable", [("weight", "bias"), ("weight",), ("bias",)])
@pytest.mark.parametrize(
    ("shape", "memory"),
    [((2, 4, 6, 6), "torch.channels_last"), ((2, 4, 3, 6, 6), "torch.channels_last_3d")],
)
def test_an_input_without_gradient_does_not_crash(shape, memory, trainable):
    """A channels_last input that needs no gradient gives γ and β the gradients of the contiguous one."""
    script = SURVIVAL.format(rank=len(shape), shape=shape, memory=memory, trainable=trainable)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)

    assert (result.returncode, result.stdout) == (0, "survived\n"), result.stderr


def test_it_is_the_plain_module(norm):
    """Type, state dict and output are those of nn.GroupNorm, by keyword too: tools that go by these see no other."""
    plain = nn.GroupNorm(1, 4)
    plain.load_state_dict(norm.state_dict())
    x = torch.randn(2, 4, 5, 5)

    assert type(norm) is nn.GroupNorm
    for each in (norm, copy.deepcopy(norm), pickle.loads(pickle.dumps(norm)), torch.jit.script(norm)):
        assert torch.equal(each(x), plain(x))
    assert torch.equal(norm(input=x), plain(x))


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_it_exports_and_compiles(norm, memory):
    """torch.export sees a group_norm for any batch, and torch.compile one graph."""
    norm.requires_grad_(False)
    x = torch.randn(2, 4, 5, 5).to(memory_format=memory)
    program = torch.export.export(norm, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    larger = torch.randn(3, 4, 5, 5).to(memory_format=memory)

    assert torch.ops.aten.group_norm.default in [node.target for node in program.graph.nodes]
    torch.testing.assert_close(program.module()(larger), norm(larger))
    torch.testing.assert_close(torch.compile(norm, backend="aot_eager", fullgraph=True)(x), norm(x))


def test_the_guard_stays_out_of_the_way(norm):
    """An input that needs a gradient keeps its memory format, and undo takes the guard with it."""
    x = torch.randn(2, 4, 5, 5).to(memory_format=torch.channels_last)

    assert norm(x.requires_grad_()).is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        assert norm(x.detach()).is_contiguous(memory_format=torch.channels_last)
    model = nn.Sequential(nn.BatchNorm2d(4))
    normswap.patch(model, "gn").undo()
    assert not model[0]._forward_pre_hooks
