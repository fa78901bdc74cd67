"""The hook that lets a part of a PyTorch model learn."""

import copy
import re

import pytest
import torch
from torch import nn

from normswap.errors import InputError
from normswap.finetune import Freeze

from .loops import by_hand, network


def moved(model, before):
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def test_the_last_blocks():
    """Blocks before the last keep weights and statistics, though the loop puts the model in train mode each step."""
    model, _ = network("sn")
    before = copy.deepcopy(model.state_dict())
    by_hand(model, [Freeze(model, "last:1")])

    assert moved(model, before) == {"head.weight", "head.bias"}
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_modes():
    """Until the end frozen blocks are in eval mode, then in the model's, but for what was in eval mode by itself."""
    model, _ = network("sn")
    hook = Freeze(model, "last:1")
    model.train()
    model.stem[1].eval()
    hook.on_step(0)
    assert {name for name, module in model.named_modules() if not module.training} == {"stem.0", "stem.1", "conv", "bn"}
    hook.on_end()

    assert [name for name, module in model.named_modules() if not module.training] == ["stem.1"]


def test_norms():
    """Norms alone learn; what the user froze does not, and stays frozen."""
    model, _ = network("gn")
    model.bn.bias.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    by_hand(model, [Freeze(model, "norm")])

    assert moved(model, before) == {"stem.1.weight", "stem.1.bias", "bn.weight"}
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == ["bn.bias"]


def test_norms_of_every_kind():
    """Norms that the model has besides learn too."""
    model = nn.Sequential(nn.Linear(4, 4), nn.RMSNorm(4), nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.BatchNorm1d(4))
    Freeze(model, "norm").open()

    assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {"1", "2", "3", "4"}


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("first:2", "expected `train` to be all, norm or last:N, received train='first:2'"),
        ("last:99", "expected last:N with N up to the model's 5 blocks, received train='last:99'"),
    ],
)
def test_refusals(train, message):
    """Another text, and more blocks than there are, change nothing."""
    model, _ = network("gn")
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        Freeze(model, train)

    assert all(parameter.requires_grad for parameter in model.parameters())
