"""What holds of the layers for data of any shape, level and spread."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from normswap.layers import torch as layers

from .models import filled


@st.composite
def images(draw, smallest=1):
    """Float64 data (N, C, H, W), of which every value of a sample and channel shares a level and a spread."""
    n, c = draw(st.integers(1, 5)), draw(st.integers(1, 7))
    h, w = draw(st.integers(smallest, 9)), draw(st.integers(smallest, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    spread = 10 ** (torch.rand(n, c, 1, 1, generator=generator, dtype=torch.float64) * 4 - 2)
    level = torch.randn(n, c, 1, 1, generator=generator, dtype=torch.float64) * draw(st.sampled_from([0, 1, 1e4]))
    x = torch.randn(n, c, h, w, generator=generator, dtype=torch.float64) * spread + level
    return x.contiguous(memory_format=draw(st.sampled_from([torch.contiguous_format, torch.channels_last])))


def close(found, expected):
    """Whether two float64 results agree to what a mean of 1e4 leaves of their digits."""
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("cls", [layers.SwitchNorm2d, layers.BatchRenorm2d])
@given(x=images(smallest=2), data=st.data())
@settings(deadline=None, max_examples=30)
def test_permuting_the_batch_permutes_the_output(cls, x, data):
    """No sample is special, in training."""
    layer = filled(cls, x.shape[1], dtype=torch.float64).train()
    order = data.draw(st.permutations(range(len(x))))

    close(copy.deepcopy(layer)(x[order]), layer(x)[order])


@pytest.mark.parametrize("gate", [0, 1, 2])
@given(x=images(smallest=2))
@settings(deadline=None, max_examples=30)
def test_one_hot_gates_are_the_native_layers(gate, x):
    """A gate that takes all makes it InstanceNorm, LayerNorm over (C, H, W) or BatchNorm."""
    channels = x.shape[1]
    native = (nn.InstanceNorm2d(channels), nn.GroupNorm(1, channels), nn.BatchNorm2d(channels))[gate].double()
    layer = layers.SwitchNorm2d(channels, dtype=torch.float64)
    with torch.no_grad():
        for logits in (layer.mean_weight, layer.var_weight):
            logits.fill_(-800)
            logits[gate] = 0

    close(layer(x), native(x))


@given(x=images(smallest=2))
@settings(deadline=None, max_examples=30)
def test_batch_renorm_unclipped_is_its_inference_function(x):
    """With wide limits, training computes exactly what inference does: no sample sees another."""
    layer = filled(layers.BatchRenorm2d, x.shape[1], r_max=1e30, d_max=1e30, dtype=torch.float64)
    expected = copy.deepcopy(layer).eval()(x)
    found = layer.train()(x)

    close(found / (1 + expected.abs()), expected / (1 + expected.abs()))


@given(x=images())
@settings(deadline=None, max_examples=30)
def test_tiny_inputs_are_finite(x):
    """Batch 1, one channel and 1x1 maps give numbers, and gradients are numbers too."""
    layer = layers.SwitchNorm2d(x.shape[1], dtype=torch.float64)
    x.requires_grad_()
    layer(x).square().sum().backward()

    assert all(torch.isfinite(g).all() for g in (x.grad, *(p.grad for p in layer.parameters())))
