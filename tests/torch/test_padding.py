"""Plans of models that are told of padding."""

import pytest
import torch
from torch import nn

import normswap


class Speech(nn.Module):
    """A convolution over frames, those behind the end set to zero."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv1d(4, 6, 3, padding=1), nn.BatchNorm1d(6), nn.Linear(6, 6)
        self.last = nn.BatchNorm1d(6)

    def forward(self, frames, lengths=None, padding_mask=None, kept=None):
        """Return a vector for each sequence."""
        y = self.bn(self.conv(frames))
        return self.last(self.head(y.mean(2)))


FRAMES = torch.randn(2, 4, 9)
NOTE = "{} tells of padding, which a sample's statistics count too: use brn, or pad nothing"


@pytest.mark.parametrize("target", ["sn", "gn"])
@pytest.mark.parametrize(
    ("example", "name"),
    [
        ((FRAMES, torch.tensor([9, 5])), "lengths"),
        ({"frames": FRAMES, "padding_mask": torch.ones(2, 9)}, "padding_mask"),
        (normswap.Inputs(FRAMES, kept=torch.ones(2, 9, dtype=torch.bool)), "kept"),
    ],
    ids=["lengths", "mask", "bool"],
)
def test_masks_and_lengths_are_noted(example, name, target):
    """A layer over frames is noted with the input that tells, one over vectors is not."""
    first, last = normswap.plan(Speech().eval(), target, example=example).decisions

    assert NOTE.format(name) in first.note.split("; ")
    assert "padding" not in last.note


@pytest.mark.parametrize(("target", "example"), [("brn", (FRAMES, torch.tensor([9, 5]))), ("sn", FRAMES)])
def test_what_padding_does_not_change_is_not_noted(target, example):
    """A BatchRenorm takes no statistics of a sample, and without such an input nothing tells of padding."""
    assert all("padding" not in d.note for d in normswap.plan(Speech().eval(), target, example=example).decisions)
