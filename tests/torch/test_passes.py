"""The passes over the data: compiled or not, in every memory layout, on every number of threads the same numbers."""

import copy
import multiprocessing
import subprocess
import sys

import numpy as np
import pytest
import torch

from normswap.layers import torch as layers
from normswap.layers.torch import cpu, passes

from .models import filled

LAYERS = [
    pytest.param(layers.SwitchNorm2d, id="SwitchNorm"),
    pytest.param(layers.BatchRenorm2d, id="BatchRenorm"),
]
LAYOUTS = [
    pytest.param(torch.contiguous_format, id="contiguous"),
    pytest.param(torch.channels_last, id="channels_last"),
]


@pytest.fixture
def two_threads():
    """Torch set to two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def uncompiled(monkeypatch):
    """The passes as torch operations, as without Numba and on accelerators."""
    monkeypatch.setattr(passes, "kernels", lambda: None)


def step(layer, x, seed=1):
    """Return output, gradients and state of one training step."""
    layer, x = copy.deepcopy(layer).train(), x.clone().requires_grad_()
    y = layer(x)
    torch.manual_seed(seed)
    y.backward(torch.randn(x.shape).to(x).contiguous(memory_format=torch.preserve_format))
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters()), *layer.buffers()]


def uneven(shape, dtype=torch.float32):
    """Return data whose level rises along each map, so that no part of it stands for the whole."""
    torch.manual_seed(0)
    return (torch.randn(shape) + torch.linspace(0, 300, shape[-1])).to(dtype)


@pytest.mark.parametrize("cls", LAYERS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 5, 9, 467), (2, 7, 1, 1), (2, 3, 5, 13), (1, 1, 64, 65)])
def test_moments_of_any_size(cls, layout, shape):
    """Longer than a strip, odd, a single value: a step in float32 is the step in float64."""
    layer, x = filled(cls, shape[1]), uneven(shape)
    found = step(layer, x.contiguous(memory_format=layout))
    expected = step(copy.deepcopy(layer).double(), x.double())
    for one, other in zip(found, expected, strict=True):
        scale = max(1.0, float(other.abs().max()))
        np.testing.assert_allclose(one.double() / scale, other / scale, atol=2e-6)


OPTIONS = [
    *(pytest.param(layers.SwitchNorm2d, {"batch_statistics": each}, id=each) for each in ("moving", "frozen", "none")),
    pytest.param(layers.SwitchNorm2d, {"affine": False, "momentum": None}, id="plain"),
    pytest.param(layers.SwitchNorm2d, {"temperature": 0}, id="hard"),
    pytest.param(layers.SwitchNorm2d, {"temperature": 0.3, "track_running_stats": False}, id="cold"),
    pytest.param(layers.BatchRenorm2d, {}, id="renorm"),
    pytest.param(layers.BatchRenorm2d, {"affine": False, "momentum": None}, id="renorm plain"),
    pytest.param(layers.BatchRenorm2d, {"momentum": 0.0}, id="renorm still"),
    pytest.param(layers.BatchRenorm2d, {"schedule": "pretrained", "schedule_steps": 2}, id="renorm schedule"),
]


@pytest.mark.parametrize(("cls", "options"), OPTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False])
def test_a_compiled_formula_is_the_same(cls, options, layout, training, monkeypatch):
    """Three steps by the compiled formula are three by the layer's own: outputs, gradients and state."""
    later = {name: options[name] for name in ("temperature", "track_running_stats") if name in options}
    layer = cls(6, **{name: value for name, value in options.items() if name not in later}).double().train(training)
    other, found = copy.deepcopy(layer), []
    x = uneven((4, 6, 11, 13), torch.float64).contiguous(memory_format=layout)
    for each, takes in ((layer, cpu.takes), (other, lambda *_: False)):
        monkeypatch.setattr(cpu, "takes", takes)
        torch.manual_seed(2)
        for parameter in each.parameters():
            torch.nn.init.normal_(parameter)
        for name, value in later.items():
            setattr(each, name, value)
        steps = []
        for number in range(3):
            leaf = (x * (1 + number)).requires_grad_()
            y = each(leaf)
            y.backward(torch.randn(x.shape, dtype=x.dtype).contiguous(memory_format=layout))
            with torch.no_grad():
                steps += [y.detach(), leaf.grad, each(x) if not training else y.detach()]
        found.append([*steps, *(p.grad for p in each.parameters()), *each.buffers()])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("cls", LAYERS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uncompiled_is_the_same(cls, layout, dtype, request):
    """Without Numba and on accelerators the passes are torch operations and give the same numbers."""
    layer, x = filled(cls, 6).to(dtype), uneven((4, 6, 11, 13), dtype).contiguous(memory_format=layout)
    compiled = step(layer, x)
    request.getfixturevalue("uncompiled")
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-11, "atol": 1e-11}
    for one, other in zip(step(layer, x), compiled, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.parametrize("cls", LAYERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_threads_share_the_work(cls, layout, two_threads):
    """Two threads compute bit for bit what one does."""
    layer, x = filled(cls, 8), uneven((4, 8, 64, 128)).contiguous(memory_format=layout)
    assert x.numel() >= 2 * passes.SHARE
    shared = step(layer, x)
    torch.set_num_threads(1)
    for one, other in zip(step(layer, x), shared, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gradient_of_stride_0(layout):
    """A gradient that lies in memory otherwise than the input is taken as it is."""
    layer, x = filled(layers.SwitchNorm2d, 6), uneven((4, 6, 5, 7)).contiguous(memory_format=layout).requires_grad_()
    layer(x).sum().backward()
    (expected,) = torch.autograd.grad((layer(x) * torch.ones(x.shape)).sum(), x)

    torch.testing.assert_close(x.grad, expected)


def test_any_other_layout():
    """A transposed view is neither contiguous nor channels-last, and normalizes as its contiguous copy."""
    layer, x = filled(layers.SwitchNorm2d, 6), uneven((4, 6, 5, 7)).transpose(2, 3)
    for one, other in zip(step(layer, x), step(layer, x.contiguous()), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch_statistics", ["moving", "frozen", "none"])
@pytest.mark.parametrize("affine", [True, False])
def test_inference_without_gradients(layout, batch_statistics, affine):
    """The one pass of inference gives what the general way gives."""
    layer = layers.SwitchNorm2d(6, batch_statistics=batch_statistics, affine=affine).eval()
    with torch.no_grad():
        for tensor in layer.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand(tensor.shape))
    x = uneven((4, 6, 11, 13)).contiguous(memory_format=layout)
    with torch.no_grad():
        inferred = layer(x)

    assert inferred.stride() == x.stride()
    torch.testing.assert_close(inferred, layer(x.clone().requires_grad_()).detach(), rtol=1e-5, atol=1e-5)


def test_infinities_pass_through():
    """An infinite value makes NaNs, as in BatchNorm, and no warning."""
    x = torch.randn(2, 3, 4, 4)
    x[0, 0, 0, 0] = float("inf")

    assert layers.SwitchNorm2d(3)(x)[0, 0].isnan().all()


def normalized_in_child(x):
    return layers.SwitchNorm2d(8)(x).detach().numpy()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")
def test_a_forked_child_has_its_own_threads(two_threads):
    """A data loader's worker, forked after the threads were started, does not wait for them for ever."""
    x = uneven((4, 8, 64, 128))
    expected = normalized_in_child(x)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        found = pool.apply_async(normalized_in_child, (x,)).get(timeout=60)

    np.testing.assert_array_equal(found, expected)


BARE = """
import sys


class Absent:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in sys.argv[1:]:
            raise ImportError(name)


sys.meta_path.insert(0, Absent())
import torch
from normswap.layers.torch import BatchRenorm2d, SwitchNorm2d

for layer in (SwitchNorm2d(3), BatchRenorm2d(3)):
    layer(torch.randn(2, 3, 4, 4, requires_grad=True)).sum().backward()
print(sorted({name.partition(".")[0] for name in sys.modules} & set(sys.argv[1:])))
"""


def test_layers_need_nothing_but_torch_and_numpy():
    """Without any other package, Numba and Triton included, the layers are imported and train."""
    others = ["accelerate", "click", "filelock", "numba", "pydantic", "psutil", "rich", "safetensors", "scipy"]
    command = [sys.executable, "-c", BARE, *others, "tomli_w", "triton"]
    done = subprocess.run(command, capture_output=True, text=True)

    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr
