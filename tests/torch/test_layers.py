"""One conformance routine for both layers in every rank, and what each promises besides."""

import copy
import io
import pickle
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from normswap.layers import torch as layers

SHAPES = {
    "1d rank 2": (1, (6, 5)),
    "1d rank 3": (1, (4, 5, 7)),
    "2d": (2, (4, 5, 3, 6)),
    "3d": (3, (3, 5, 2, 3, 4)),
}
CASES = [
    pytest.param(getattr(layers, f"{name}{dimensions}d"), shape, id=f"{name} {label}")
    for label, (dimensions, shape) in SHAPES.items()
    for name in ("SwitchNorm", "BatchRenorm")
]


def filled(cls, channels, **options):
    """A layer whose parameters and running statistics are not the initial ones."""
    layer = cls(channels, **options)
    generator = torch.Generator().manual_seed(3)
    for tensor in (*layer.parameters(), *(b for n, b in layer.named_buffers() if n.startswith("running"))):
        tensor.data.uniform_(0.3, 1.5, generator=generator)
    return layer


def switch_norm(x, layer, training):
    """The formula in float64 NumPy, from section 3 of the paper."""
    x = x.detach().double().numpy()
    axes = tuple(range(2, x.ndim))
    mean_in, var_in = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
    rest = tuple(range(1, x.ndim))
    mean_ln, var_ln = x.mean(rest, keepdims=True), x.var(rest, keepdims=True)
    if not axes:
        mean_in, var_in = mean_ln, var_ln
    batch = (0, *axes)
    mean_bn, var_bn = x.mean(batch, keepdims=True), x.var(batch, keepdims=True)

    def vector(tensor):
        return tensor.detach().double().numpy().reshape(1, -1, *[1] * len(axes))

    if not training:
        mean_bn, var_bn = vector(layer.running_mean), vector(layer.running_var)
    w, v = (gate.detach().double().numpy() for gate in layer.gates())
    mean = w[0] * mean_in + w[1] * mean_ln + w[2] * mean_bn
    var = v[0] * var_in + v[1] * var_ln + v[2] * var_bn
    return vector(layer.weight) * (x - mean) / np.sqrt(var + layer.eps) + vector(layer.bias)


def batch_renorm(x, layer, training):
    """Algorithm 1 of the paper in float64 NumPy."""
    x = x.detach().double().numpy()
    batch = (0, *range(2, x.ndim))

    def vector(tensor):
        return tensor.detach().double().numpy().reshape(1, -1, *[1] * (x.ndim - 2))

    mean, sigma = vector(layer.running_mean), np.sqrt(vector(layer.running_var) + layer.eps)
    y = (x - mean) / sigma
    if training:
        batch_mean, batch_sigma = x.mean(batch, keepdims=True), np.sqrt(x.var(batch, keepdims=True) + layer.eps)
        r_max, d_max = float(layer.r_max), float(layer.d_max)
        r = np.clip(batch_sigma / sigma, 1 / r_max, r_max)
        d = np.clip((batch_mean - mean) / sigma, -d_max, d_max)
        y = (x - batch_mean) / batch_sigma * r + d
    return vector(layer.weight) * y + vector(layer.bias)


def reference(layer, x, training):
    formula = batch_renorm if isinstance(layer, layers.batch_renorm._BatchRenorm) else switch_norm
    return formula(x, layer, training)


@pytest.mark.parametrize(("cls", "shape"), CASES)
class TestConformance:
    @pytest.mark.parametrize("training", [True, False])
    def test_equals_the_formula(self, cls, shape, training):
        """The output is the paper's formula, in training and at inference."""
        layer = filled(cls, shape[1]).train(training)
        x = torch.randn(shape) * 2 + 3
        expected = reference(layer, x, training)

        np.testing.assert_allclose(layer(x).detach().numpy(), expected, atol=1e-5)

    @pytest.mark.parametrize("training", [True, False])
    def test_gradients(self, cls, shape, training):
        """The gradient of every input and parameter is that of the function."""
        layer = filled(cls, shape[1], dtype=torch.float64).train(training)
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        parameters = tuple(layer.parameters())

        def function(x, *values):
            return torch.func.functional_call(frozen(), dict(zip(names, values, strict=True)), (x,))

        def frozen():
            # r and d carry no gradient in the paper, so they are held where they are.
            clone = copy.deepcopy(layer)
            if hasattr(clone, "set_limits"):
                clone.set_limits(1.0, 0.0)
            return clone

        names = [name for name, _ in layer.named_parameters()]
        assert torch.autograd.gradcheck(function, (x, *parameters))

    def test_half_precision_takes_float32_statistics(self, cls, shape):
        """Activations around 600 do not overflow in float16, whose squares would."""
        layer = filled(cls, shape[1]).half().train()
        x = (torch.randn(shape) * 100 + 600).half()
        y = layer(x)

        assert y.dtype == torch.float16
        assert torch.isfinite(y).all()

    def test_the_mean_may_dwarf_the_deviation(self, cls, shape):
        """With mean/std = 1e4 the variance is still right: it is never a difference of large squares."""
        layer = filled(cls, shape[1], dtype=torch.float64).train()
        single = copy.deepcopy(layer).float()
        x = torch.randn(shape, dtype=torch.float64) + 1e4
        for each in (layer, single):
            each.running_mean.fill_(1e4)
        y = single(x.float()).double()

        assert torch.isfinite(y).all()
        rounding = 1e4 * torch.finfo(torch.float32).eps * 10
        np.testing.assert_allclose(y.detach(), layer(x.float().double()).detach(), atol=rounding)

    def test_constant_input_is_finite(self, cls, shape):
        """A constant input has no variance and no NaN comes of it."""
        layer = filled(cls, shape[1]).train()

        assert torch.isfinite(layer(torch.full(shape, 3.0))).all()

    def test_permuting_the_batch_permutes_the_output(self, cls, shape):
        """No sample is special."""
        layer = filled(cls, shape[1]).train()
        x, order = torch.randn(shape), torch.randperm(shape[0])

        torch.testing.assert_close(copy.deepcopy(layer)(x[order]), layer(x)[order], atol=1e-5, rtol=1e-4)

    def test_copies_and_saves(self, cls, shape):
        """deepcopy, pickle and state_dict carry everything."""
        layer = filled(cls, shape[1]).train()
        layer(torch.randn(shape))
        layer.eval()
        x = torch.randn(shape)
        fresh = cls(shape[1]).eval()
        fresh.load_state_dict(layer.state_dict())
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)

        for other in (
            copy.deepcopy(layer),
            pickle.loads(pickle.dumps(layer)),
            fresh,
            torch.load(buffer, weights_only=False),
        ):
            assert torch.equal(other(x), layer(x))

    def test_channels_last_and_meta(self, cls, shape):
        """The memory format of the input does not matter, and shapes can be had without data."""
        x = torch.randn(shape)
        if x.dim() == 4:
            layer = filled(cls, shape[1])
            torch.testing.assert_close(
                copy.deepcopy(layer)(x.to(memory_format=torch.channels_last)), layer(x), atol=1e-5, rtol=1e-5
            )
        assert cls(shape[1], device="meta").eval()(torch.empty(shape, device="meta")).shape == x.shape

    def test_cumulative_average(self, cls, shape):
        """momentum=None averages all batches alike."""
        layer = cls(shape[1], momentum=None).train()
        batches = [torch.randn(shape) + k for k in range(3)]
        for batch in batches:
            layer(batch)

        dims = [0, *range(2, len(shape))]
        expected = torch.stack([batch.mean(dims) for batch in batches]).mean(0)
        torch.testing.assert_close(layer.running_mean, expected, atol=1e-5, rtol=1e-4)
        assert layer.num_batches_tracked == 3

    def test_wrong_inputs(self, cls, shape):
        """Rank, channels and dtype are checked before anything is computed."""
        layer = cls(shape[1])
        with pytest.raises(ValueError, match=r"^expected input of rank .*, received shape=\(1, 1, 1, 1, 1, 1\)$"):
            layer(torch.zeros([1] * 6))
        wrong = (shape[0], 9, *shape[2:])
        with pytest.raises(ValueError, match=f"^expected {shape[1]} channels, received shape={re.escape(str(wrong))}$"):
            layer(torch.zeros(wrong))
        with pytest.raises(TypeError, match=r"^expected a floating-point input, received dtype=torch.int64$"):
            layer(torch.zeros(shape, dtype=torch.long))


class TestSwitchNorm:
    @pytest.mark.parametrize(
        ("gate", "native"),
        [
            (0, nn.InstanceNorm2d(5)),
            (1, nn.GroupNorm(1, 5)),
            (2, nn.BatchNorm2d(5)),
        ],
    )
    def test_one_hot_gates_are_the_native_layers(self, gate, native):
        """A gate that takes all makes it InstanceNorm, LayerNorm over (C, H, W) or BatchNorm."""
        layer = layers.SwitchNorm2d(5)
        with torch.no_grad():
            for weights in (layer.mean_weight, layer.var_weight):
                weights.fill_(-200)
                weights[gate] = 0
        x = torch.randn(4, 5, 3, 3) * 2 + 1

        torch.testing.assert_close(layer(x), native(x), atol=1e-5, rtol=1e-5)

    def test_frozen_statistics_keep_samples_apart(self):
        """With batch_statistics="frozen" a sample's output and every gradient are its own, in training too."""
        layer = filled(layers.SwitchNorm2d, 5, batch_statistics="frozen").train()
        before = layer.running_mean.clone()
        x = torch.randn(4, 5, 3, 3)

        together, alone = layer(x), torch.cat([layer(sample[None]) for sample in x])

        torch.testing.assert_close(together, alone)
        assert torch.equal(layer.running_mean, before)

    def test_no_batch_statistics(self):
        """With batch_statistics="none" there are two gates and no running statistics."""
        layer = layers.SwitchNorm2d(5, batch_statistics="none")

        assert [gate.tolist() for gate in layer.gates()] == [[0.5, 0.5]] * 2
        assert dict(layer.named_buffers()) == {}
        assert torch.isfinite(layer(torch.randn(1, 5, 1, 1))).all()

    @given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
    @settings(deadline=None, max_examples=30)
    def test_tiny_inputs_are_finite(self, n, c, size):
        """Batch 1, one channel and 1x1 maps give numbers, and gradients are numbers too."""
        layer = layers.SwitchNorm2d(c)
        x = torch.randn(n, c, size, size, requires_grad=True)
        layer(x).square().sum().backward()

        assert torch.isfinite(x.grad).all()
        assert all(torch.isfinite(p.grad).all() for p in layer.parameters())

    def test_wrong_arguments(self):
        """Constructor arguments are checked by name."""
        with pytest.raises(ValueError, match=r"^expected `num_features` of at least 1, received num_features=0$"):
            layers.SwitchNorm2d(0)
        with pytest.raises(ValueError, match=r"^expected `eps` above 0, received eps=0$"):
            layers.SwitchNorm2d(3, eps=0)
        message = "expected `batch_statistics` out of moving, frozen, none, received batch_statistics='off'"
        with pytest.raises(ValueError, match=f"^{message}$"):
            layers.SwitchNorm2d(3, batch_statistics="off")


class TestBatchRenorm:
    def test_unclipped_it_is_its_inference_function(self):
        """With wide limits, training computes exactly what inference does: no sample sees another."""
        layer = filled(layers.BatchRenorm2d, 5, r_max=1e6, d_max=1e6)
        x = torch.randn(4, 5, 3, 3)
        expected = copy.deepcopy(layer).eval()(x)

        torch.testing.assert_close(layer.train()(x), expected, atol=1e-5, rtol=1e-5)

    def test_closed_limits_are_batch_norm(self):
        """r_max=1, d_max=0 is BatchNorm, output and input gradient."""
        layer, native = filled(layers.BatchRenorm2d, 5, r_max=1, d_max=0), nn.BatchNorm2d(5)
        native.load_state_dict({k: v for k, v in layer.state_dict().items() if k not in ("r_max", "d_max")})
        x, y = (torch.linspace(-1, 2, 180).view(4, 5, 3, 3).sin().requires_grad_() for _ in range(2))
        weights = torch.randn(4, 5, 3, 3)
        (layer(x) * weights).sum().backward()
        (native(y) * weights).sum().backward()

        torch.testing.assert_close(x.grad, y.grad)

    def test_the_running_average_is_of_sigma(self):
        """As in the paper σ is averaged, eps inside, and running_var holds σ² - ε."""
        layer = layers.BatchRenorm2d(1, momentum=0.25, eps=0.5)
        x = torch.tensor([0.0, 2.0]).view(2, 1, 1, 1)
        layer(x)

        sigma = 0.75 * (1 + 0.5) ** 0.5 + 0.25 * (1 + 0.5) ** 0.5
        torch.testing.assert_close(layer.running_var, torch.tensor([sigma**2 - 0.5]))
        torch.testing.assert_close(layer.running_mean, torch.tensor([0.25]))

    def test_limits_are_saved(self):
        """A schedule's state comes back with the weights."""
        layer = layers.BatchRenorm2d(3)
        layer.set_limits(1.5, 0.25)
        other = layers.BatchRenorm2d(3)
        other.load_state_dict(layer.state_dict())

        assert (float(other.r_max), float(other.d_max)) == (1.5, 0.25)

    def test_a_single_value_has_no_variance(self):
        """Training on one value per channel is refused with the way out."""
        message = (
            "expected more than one value per channel in training, received shape=(1, 3, 1, 1); "
            "use a larger batch, or eval()"
        )
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            layers.BatchRenorm2d(3)(torch.zeros(1, 3, 1, 1))

    @pytest.mark.parametrize(
        ("limits", "message"),
        [
            ((0.5, 0), "expected `r_max` of at least 1, received r_max=0.5"),
            ((1, -1), "expected `d_max` of at least 0, received d_max=-1"),
        ],
    )
    def test_wrong_limits(self, limits, message):
        """Limits that would turn the correction round are refused."""
        with pytest.raises(ValueError, match=f"^{message}$"):
            layers.BatchRenorm2d(3).set_limits(*limits)
