"""Weights that no norm's replacement can be computed from, or that say nothing: refused or told, each by name."""

import pytest
import torch
from torch import nn

import normswap
from normswap.errors import InputError, NormswapWarning

from ..helpers import exactly


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 4)).eval()


HEAD = "expected weights that are finite and variances of at least 0, received {} that are not:\n"


def test_all_are_listed():
    """Not the first alone, and not those of norms alone; the model is as it was."""
    model = net()
    with torch.no_grad():
        model[0].weight[0, 0, 0] = torch.nan
        model[2].bias[1] = -torch.inf
        model[1].running_var[:2] = -1
        model[1].running_mean[3] = torch.inf
    message = HEAD.format(4) + (
        "  0.weight: 3 of 108 not finite\n  2.bias: 1 of 4 not finite\n  1.running_mean: 1 of 4 not finite\n"
        "  1.running_var: 2 of 4 below 0"
    )
    for target in ("gn", "sn", "brn", "bn"):
        with pytest.raises(InputError, match=exactly(message)):
            normswap.patch(model, target)

    assert isinstance(model[1], nn.BatchNorm2d)


def test_ten_are_listed():
    """And how many more there are."""
    model = nn.Sequential(*[nn.Conv2d(3, 3, 1, bias=False) for _ in range(12)], nn.BatchNorm2d(3))
    for layer in model[:12]:
        nn.init.constant_(layer.weight, torch.nan)
    lines = [f"  {number}.weight: 9 of 9 not finite\n" for number in range(10)]
    with pytest.raises(InputError, match=exactly(HEAD.format(12) + "".join(lines) + "  and 2 more")):
        normswap.patch(model, "gn")


def test_masks_are_no_weights():
    """A buffer may well be infinite, and a parameter of integers is not asked; what holds no values is passed over."""
    model = net()
    model.register_buffer("mask", torch.full((2, 2), -torch.inf))
    model.register_parameter("table", nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False))
    model.append(nn.LazyLinear(2))
    normswap.patch(model, "gn")

    assert isinstance(model[1], nn.GroupNorm)


@pytest.mark.parametrize("target", ["gn", "sn", "brn"])
def test_channels_that_never_varied(target):
    """A running variance of 0 is carried over, and told by the layer and by the plan."""
    model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(3), nn.BatchNorm2d(5))
    model[0].running_var[1] = 0
    model[2].running_var[1:4] = 0
    message = (
        "expected running variances above 0, received 0 for channels of 2 layers, which hold nothing or were never "
        "trained:\n  0: 1 of 4\n  2: 3 of 5"
    )
    with pytest.warns(NormswapWarning, match=exactly(message)):
        report = normswap.patch(model, target)

    notes = [decision.note for decision in report.plan.decisions]
    assert "running variances of 1 channel are 0" in notes[0]
    assert "running variances" not in notes[1]
    assert "running variances of 3 channels are 0" in notes[2]
