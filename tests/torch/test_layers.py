"""What both layers promise in every rank besides their formulas, which `test_conformance` holds them to."""

import copy
import io
import pickle

import onnxruntime
import pytest
import torch
from torch import nn

from normswap.layers import torch as layers

from ..helpers import exactly
from .models import filled

SHAPES = {
    "1d rank 2": (1, (6, 5)),
    "1d rank 3": (1, (4, 5, 7)),
    "2d": (2, (4, 5, 3, 6)),
    "3d": (3, (3, 5, 2, 3, 4)),
}
BATCH_NORMS = {(2, 3): nn.BatchNorm1d, (4,): nn.BatchNorm2d, (5,): nn.BatchNorm3d}
CASES = [
    pytest.param(getattr(layers, f"{name}{dimensions}d"), shape, id=f"{name} {label}")
    for label, (dimensions, shape) in SHAPES.items()
    for name in ("SwitchNorm", "BatchRenorm")
]


@pytest.mark.parametrize(("cls", "shape"), CASES)
class TestLayer:
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

    @pytest.mark.parametrize("training", [True, False])
    def test_nothing_in_nothing_out(self, cls, shape, training):
        """Of no samples, and of samples without values, comes what a BatchNorm makes of them; no statistic moves."""
        layer = filled(cls, shape[1]).train(training)
        batch_norm = filled(BATCH_NORMS[layer.ranks], shape[1]).train(training)
        before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
        for empty in [(0, *shape[1:])] + [(*shape[:-1], 0)] * (len(shape) > 2):
            x = torch.randn(empty, requires_grad=True)
            y = layer(x)
            y.sum().backward()

            assert (y.shape, y.dtype) == (batch_norm(x).shape, x.dtype)
            assert x.grad.shape == empty
            assert all(not parameter.grad.any() for parameter in layer.parameters())
        assert layer.num_batches_tracked == batch_norm.num_batches_tracked
        before["num_batches_tracked"] = batch_norm.num_batches_tracked
        assert all(torch.equal(buffer, before[name]) for name, buffer in layer.named_buffers())
        assert layer(torch.zeros((0, *shape[1:]), dtype=torch.half)).dtype is torch.half

    def test_wrong_inputs(self, cls, shape):
        """Rank, channels and dtype are checked before anything is computed, and the error names the layer."""
        layer, ranks = cls(shape[1]), {2: "2 or 3", 3: "2 or 3", 4: "4", 5: "5"}[len(shape)]
        wrong = (shape[0], 9, *shape[2:])
        for x, error, message in (
            (torch.zeros([1] * 6), ValueError, f"expected input of rank {ranks}, received shape=(1, 1, 1, 1, 1, 1)"),
            (torch.zeros(wrong), ValueError, f"expected {shape[1]} channels, received shape={wrong}"),
            (
                torch.zeros(shape, dtype=torch.long),
                TypeError,
                "expected a floating-point input, received dtype=torch.int64; cast it first",
            ),
        ):
            layer.site = ""
            for name in (cls.__name__, "layer1.0.bn1"):
                with pytest.raises(error, match=exactly(f"{name}: {message}")):
                    layer(x)
                layer.site = "layer1.0.bn1"
        with pytest.raises(ValueError, match=r"^expected `momentum` from 0 to 1 or None, received momentum=2$"):
            cls(shape[1], momentum=2)

    def test_compiles_and_exports(self, cls, shape):
        """torch.compile takes the whole layer as one graph, torch.export as plain operations; both compute the same."""
        torch.compiler.reset()
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

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
    @pytest.mark.parametrize("training", [True, False])
    def test_torch_jit_trace(self, cls, shape, training):
        """A trace holds plain operations, with gradients, and at inference serves any batch and size of map."""
        layer, x = filled(cls, shape[1]).train(training), torch.randn(shape)
        with torch.no_grad():
            traced = torch.jit.trace(copy.deepcopy(layer), x, check_trace=False)
            layer(x)  # as tracing does
        for size in (shape, (shape[0] + 1, shape[1], *(2 * n for n in shape[2:]))):
            inputs = [torch.randn(size).requires_grad_() for _ in range(2)]
            inputs[1].data.copy_(inputs[0])
            outputs = [each(y) for each, y in zip((layer, traced), inputs, strict=True)]
            torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)
            for y in outputs:
                y.square().sum().backward()
            torch.testing.assert_close(*(y.grad for y in inputs), atol=1e-4, rtol=1e-4)
            if training:  # the number of values is a constant of such a trace
                break
        torch.testing.assert_close(dict(traced.named_buffers()), dict(layer.named_buffers()))
        assert not any(buffer.requires_grad for buffer in traced.buffers())

    @pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
    def test_the_older_onnx_exporter(self, cls, shape, tmp_path):
        """torch.onnx.export(dynamo=False), which traces, writes what the layer computes."""
        layer, x = filled(cls, shape[1]).eval(), torch.randn(shape)
        path, axes = str(tmp_path / "layer.onnx"), {"x": {0: "batch"}}
        torch.onnx.export(layer, (x,), path, dynamo=False, opset_version=17, input_names=["x"], dynamic_axes=axes)
        more = torch.randn(shape[0] + 1, *shape[1:])

        (found,) = onnxruntime.InferenceSession(path).run(None, {"x": more.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), layer(more), atol=1e-5, rtol=1e-5)

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
        with pytest.raises(RuntimeError, match=exactly(message)):
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
