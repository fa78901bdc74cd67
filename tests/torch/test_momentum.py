"""The hook that keeps moving statistics steady at small batches, in PyTorch."""

import pytest
import torch
from torch import nn

import normswap
from normswap.errors import InputError
from normswap.finetune import Momentum
from normswap.layers.torch import SwitchNorm2d

from .loops import network
from .runs import SETTINGS, bundled, coloured, quick


@pytest.mark.parametrize("target", ["sn", "brn", "compat"])
def test_as_many_images_as_before(target):
    """Thirty-two batches of two images, all alike, move the statistics as one batch of 64 does.

    Where the momentum is the weight of the old value, as the published SN has it, too. BRN's batch weighs 0.03.
    """
    layer = SwitchNorm2d(8, compat="switchablenorms") if target == "compat" else network(target)[0].bn
    x = torch.randn(1, 8, 5, 5, generator=torch.Generator().manual_seed(0))
    before, momentum = layer.running_mean.clone(), layer.momentum
    weight = {"sn": momentum, "brn": 0.03, "compat": 1 - momentum}[target]
    hook = Momentum(layer, 2).open()
    for _ in range(32):
        layer.train()(x.expand(2, -1, -1, -1))
    expected = before + weight * (x.mean((0, 2, 3)) - before)
    torch.testing.assert_close(layer.running_mean, expected)
    hook.on_end()

    assert layer.momentum == momentum


def test_what_it_leaves_alone():
    """Larger batches keep the momentum, and averages over all batches have none; BatchNorms left in a model count."""
    model = nn.Sequential(nn.BatchNorm2d(3, momentum=None), nn.BatchNorm2d(3, momentum=0.5))
    Momentum(model, 100).open()
    assert model[1].momentum == 0.5
    Momentum(model, 32).open()
    assert (model[0].momentum, model[1].momentum) == (None, 1 - 0.5**0.5)
    with pytest.raises(InputError, match="^expected `batch_size` above 0, received batch_size=0$"):
        Momentum(model, 0)


def test_a_run_has_it(tmp_path):
    """Small batches move a run's statistics less than the momentum says, and its layers have their own in the end."""
    means = []
    for size in (4, 64):
        quick(bundled(tmp_path, "sn"), tmp_path / str(size), coloured(), SETTINGS.__class__(
            steps=2, batch_size=size, lr=1e-9))  # fmt: skip
        means.append(normswap.load(tmp_path / str(size))[1])
    start = normswap.load(tmp_path / "in-sn")[1]
    moved = [float((layer.running_mean - start.running_mean).abs().sum()) for layer in means]

    assert 0 < moved[0] < 0.3 * moved[1]
    assert [layer.momentum for layer in means] == [start.momentum] * 2
