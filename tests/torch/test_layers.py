"""One conformance routine for both layers in every rank, and what each promises besides."""

import copy
import io
import pickle
import re

import numpy as np
import pytest
import torch

from normswap.layers import torch as layers

from .conftest import filled

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
        empty = (0, *shape[1:])
        with pytest.raises(ValueError, match=f"^expected at least one value, received shape={re.escape(str(empty))}$"):
            layer(torch.zeros(empty))
        with pytest.raises(ValueError, match=r"^expected `momentum` from 0 to 1 or None, received momentum=2$"):
            cls(shape[1], momentum=2)

    def test_compiles_and_exports(self, cls, shape):
        """torch.compile takes the whole layer as one graph, torch.export as plain operations; both compute the same."""
        layer, x = filled(cls, shape[1], momentum=None), torch.randn(shape)
        compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
        plain = copy.deepcopy(layer)
        exported = torch.export.export(copy.deepcopy(layer), (x,)).module()
        expected = layer(x)

        torch.testing.assert_close(compiled(x), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(exported(x), expected, atol=1e-5, rtol=1e-5)
        gradients = []
        for each in (compiled, plain):
            leaf = x.clone().requires_grad_()
            each(leaf).square().sum().backward()
            gradients.append(leaf.grad)
        torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)

    def test_function_transforms(self, cls, shape):
        """At inference torch.func gives per-sample gradients; training, which updates buffers, it refuses."""
        layer = filled(cls, shape[1]).eval()
        x = torch.randn(shape)

        def loss(parameters, sample):
            return torch.func.functional_call(layer, parameters, (sample[None],)).square().sum()

        parameters = {name: p.detach() for name, p in layer.named_parameters()}
        found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
        for index, sample in enumerate(x):
            layer.zero_grad()
            layer(sample[None]).square().sum().backward()
            for name, p in layer.named_parameters():
                torch.testing.assert_close(found[name][index], p.grad, atol=1e-3, rtol=1e-3)
        layer.train()
        with pytest.raises((RuntimeError, ValueError), match=r"in-place operation|more than one value per channel"):
            torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)

    def test_second_derivatives_are_refused(self, cls, shape):
        """Asking for a graph of the backward is an error, never a silently missing term."""
        layer = filled(cls, shape[1]).train()
        x = torch.randn(shape, requires_grad=True)
        message = (
            "expected create_graph=False, received create_graph=True: this layer's backward is not differentiable "
            "itself; use torch.func, or torch.compile, which differentiate its plain operations"
        )
        with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
            torch.autograd.grad(layer(x).sum(), x, create_graph=True)

    def test_keeps_the_input_alone(self, cls, shape):
        """Nothing of the input's size is kept for backward but the input itself."""
        if len(shape) == 2:
            return  # all of the layer's arrays have the size of (N, C)
        layer, x = filled(cls, shape[1]).train(), torch.randn(8, shape[1], *shape[2:]).requires_grad_()
        kept = {}

        def pack(tensor):
            kept[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            layer(x)

        assert [size for size in kept.values() if size >= x.numel()] in ([x.numel()], [])

    def test_zero_init(self, cls, shape):
        """zero_init starts γ at 0: a residual branch that ends in it begins closed."""
        layer = cls(shape[1], zero_init=True)

        assert torch.count_nonzero(layer(torch.randn(shape))) == 0
