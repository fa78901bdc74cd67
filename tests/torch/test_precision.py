"""Narrow dtypes, autocast, memory formats and the smallest shapes: what a layer computes where others fail."""

import copy

import pytest
import torch
from torch import nn

from normswap.layers import torch as layers

from .models import filled

MAPS = [layers.SwitchNorm2d, layers.BatchRenorm2d]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("cls", MAPS)
def test_channels_last_stays(cls, training):
    """The output and the input's gradient lie in memory as the input does, and so for contiguous input."""
    for memory_format in (torch.channels_last, torch.contiguous_format):
        layer = filled(cls, 5).train(training)
        x = torch.randn(4, 5, 3, 6).to(memory_format=memory_format).requires_grad_()
        y = layer(x)
        (y * y.detach()).sum().backward()

        assert y.stride() == x.stride()
        assert x.grad.stride() == x.stride()


@pytest.mark.parametrize("cls", [layers.SwitchNorm3d, layers.BatchRenorm3d])
def test_channels_last_3d_stays(cls):
    """The same holds for volumes."""
    x = torch.randn(2, 5, 3, 4, 6).to(memory_format=torch.channels_last_3d)

    assert filled(cls, 5).train()(x).stride() == x.stride()


class TestAutocast:
    @staticmethod
    def network():
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), layers.SwitchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), layers.BatchRenorm2d(8)
        )

    def test_a_network_trains(self):
        """Under bfloat16 autocast a network learns; norms hand on bfloat16 and keep statistics in float32."""
        network, seen = self.network(), []
        for index in (1, 4):
            network[index].register_forward_hook(lambda m, args, y: seen.append((args[0].dtype, y.dtype)))
        optimizer = torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9)
        x = torch.randn(8, 3, 8, 8)
        target = torch.randn(8, 8, 4, 4)
        losses = []
        for _ in range(30):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = network(x)
            loss = (y.float() - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())

        assert losses[-1] < 0.8 * losses[0]
        assert set(seen) == {(torch.bfloat16, torch.bfloat16)}
        buffers = [b for b in network.buffers() if b.is_floating_point()]
        assert {b.dtype for b in buffers} == {torch.float32}
        assert all(torch.isfinite(b).all() for b in buffers)
        assert {p.grad.dtype for p in network.parameters()} == {torch.float32}

    @pytest.mark.parametrize("training", [True, False])
    def test_differs_by_rounding_alone(self, training):
        """With autocast the network computes what it does without, to bfloat16's 8 digits."""
        network, x = self.network().train(training), torch.randn(8, 3, 8, 8)
        expected = copy.deepcopy(network)(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = network(x)

        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.float(), expected, atol=0.1, rtol=0.05)
