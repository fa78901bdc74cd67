"""The plan's `folds`: what an export does with each norm, or that it is not known."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import normswap

from .models import trained_


class Net(nn.Module):
    """A norm of whatever ``way`` makes of the network and its input."""

    def __init__(self, way, norm):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(6, 8)
        self.shift = nn.Parameter(torch.linspace(1, 2, 8).view(8, 1, 1))
        self.way, self.norm = way, norm

    def forward(self, x):
        return self.way(self, x)


MAP, SEQUENCE = (2, 3, 6, 6), (2, 5, 6)
WAYS = {
    "a layer": (lambda m, x: m.norm(m.conv(x)), MAP, True),
    "a function": (lambda m, x: m.norm(F.conv2d(x, m.conv.weight)), MAP, True),
    "a product": (lambda m, x: m.norm((x @ m.linear.weight.T).transpose(1, 2)), SEQUENCE, True),
    "flattened": (lambda m, x: m.norm(m.linear(x).flatten(0, 1)), SEQUENCE, True),
    "reshaped": (lambda m, x: m.norm(m.conv(x).reshape(len(x), 8, -1)), MAP, True),
    "squeezed": (lambda m, x: m.norm(m.conv(x)[:, :, None].squeeze(2)), MAP, True),
    "scaled": (lambda m, x: m.norm(m.conv(x) * 2 / m.shift + m.shift), MAP, True),
    "in place": (lambda m, x: m.norm(m.conv(x).add_(1.0)), MAP, True),
    "twice": (lambda m, x: m.norm(m.conv(x)) + m.norm(m.conv(x * 2)), MAP, True),
    "an activation": (lambda m, x: m.norm(m.conv(x).relu()), MAP, False),
    "read elsewhere": (lambda m, x: (lambda y: m.norm(y) + y)(m.conv(x)), MAP, False),
    "returned": (lambda m, x: (lambda y: (m.norm(y), y))(m.conv(x)), MAP, False),
    "weights of the input": (lambda m, x: m.norm(F.conv2d(x, m.conv.weight * x.mean())), MAP, False),
    "a divisor": (lambda m, x: m.norm(m.shift / m.conv(x)), MAP, False),
    "pooled": (lambda m, x: m.norm(F.avg_pool2d(m.conv(x), 2)), MAP, False),
    "turned": (lambda m, x: m.norm(m.conv(x).flip(3)), MAP, None),
    "by place": (lambda m, x: m.norm(m.conv(x) + torch.arange(6.0)), MAP, None),
}


@pytest.mark.parametrize("name", WAYS)
def test_the_plan_says_what_the_export_does(name, tmp_path):
    """With an example the column is true, of functions and what lies between, or says that it is not known."""
    way, shape, expected = WAYS[name]
    flat = name in ("a product", "flattened", "reshaped")
    model, x = trained_(Net(way, nn.BatchNorm1d(8) if flat else nn.BatchNorm2d(8))), torch.randn(shape)
    (decision,) = normswap.plan(model, "brn", example=x).decisions
    assert decision.folds is expected
    assert decision.to_dict()["folds"] is expected

    normswap.patch(model, "brn", example=x)
    report = normswap.to_onnx(model, tmp_path / "m.onnx", example=x, check=False)
    if expected is not None:
        assert bool(report.folded) is expected
        assert bool(report.kept) is not expected


@pytest.mark.parametrize(("target", "shown"), [("brn", "?"), ("gn", "no"), ("sn", "no")])
def test_without_an_example(target, shown):
    """Nothing is said of what nothing tells, but a norm by a sample's statistics never folds."""
    plan = normswap.plan(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), target)

    header, _, row = plan.table().splitlines()[1:4]
    assert row[header.index("folds") :].split()[0] == shown
    legend = "folds ?: it does behind a linear layer that it alone reads, which an example may show"
    assert (legend in plan.table()) is (shown == "?")
