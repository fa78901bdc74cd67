"""The layers under those who watch what they compute: the same answer, or a refusal that names a way that works."""

import contextlib
import copy

import pytest
import torch
import torch.autograd.forward_ad as fwad
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from normswap.errors import UnsupportedError
from normswap.layers.torch import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d, SwitchNorm1d, SwitchNorm2d

from ..helpers import exactly

LAYERS = [
    (lambda: SwitchNorm2d(4), (3, 4, 5, 5)),
    (lambda: SwitchNorm2d(4, batch_statistics="frozen"), (3, 4, 5, 5)),
    (lambda: SwitchNorm2d(4, compat="switchablenorms"), (3, 4, 5, 5)),
    (lambda: SwitchNorm1d(4), (6, 4)),
    (lambda: BatchRenorm2d(4), (3, 4, 5, 5)),
]
IDS = ["sn", "sn frozen", "sn compat", "sn of vectors", "brn"]
RENORMS = (BatchRenorm1d, BatchRenorm2d, BatchRenorm3d)


@pytest.fixture(params=LAYERS, ids=IDS)
def made(request):
    """A layer with statistics and parameters unlike their starts, and an input."""
    build, shape = request.param
    torch.manual_seed(0)
    layer = build()
    with torch.no_grad():
        for tensor in (*layer.parameters(), *layer.buffers()):
            if tensor.is_floating_point() and tensor.dim():
                tensor.copy_(torch.rand_like(tensor) + 0.5)
    return layer, torch.randn(shape) * 2 + 1


@pytest.fixture(params=[True, False], ids=["training", "inference"])
def training(request):
    """Whether the layer is in train mode."""
    return request.param


class Noting(TorchDispatchMode):
    """Somebody's own mode: takes down every operation."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


class Wrapped(Tensor):
    """Somebody's own tensor, whose class does the dispatching; it holds its values in another tensor."""

    @staticmethod
    def __new__(cls, inner):
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        def bare(x):
            return x.inner if isinstance(x, Wrapped) else x

        found = function(*torch.utils._pytree.tree_map(bare, args), **torch.utils._pytree.tree_map(bare, kwargs or {}))
        return torch.utils._pytree.tree_map(lambda y: cls(y) if isinstance(y, Tensor) else y, found)


class Labelled(Tensor):
    """Somebody's own tensor that only carries a label, as torchvision's do."""


def expected(layer, x, *, training):
    """What a copy of the layer returns by itself, and its state afterwards."""
    twin = copy.deepcopy(layer).train(training)
    with torch.no_grad():
        return twin(x), twin.state_dict()


def agree(layer, found, wanted):
    output, state = wanted
    torch.testing.assert_close(found, output, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(dict(layer.state_dict()), dict(state), atol=2e-5, rtol=2e-5)


def test_torch_jit_script(made):
    """Scripting is refused at once by every layer of ours, within a model too."""
    layer, _ = made
    layer.site = "stem.1"
    message = (
        f"stem.1: expected a model to trace, received torch.jit.script, which does not take {type(layer).__name__}; "
        "use torch.jit.trace, torch.export or torch.compile"
    )
    with pytest.raises(UnsupportedError, match=exactly(message)):
        torch.jit.script(nn.Sequential(nn.Identity(), layer))


@pytest.mark.parametrize("mode", ["real", "symbolic"])
def test_make_fx(made, training, mode):
    """The graph of `make_fx` computes what the layer does, on other values too."""
    layer, x = made
    layer.train(training)
    other = x.flip(0) * 0.5 - 1
    before = {name: value.clone() for name, value in layer.state_dict().items()}

    def run(state, x):
        return torch.func.functional_call(layer, state, (x,))

    graph = make_fx(run, tracing_mode=mode)(dict(layer.state_dict()), x)
    layer.load_state_dict(before)
    output, _ = expected(layer, other, training=training)

    torch.testing.assert_close(graph(before, other), output, atol=2e-5, rtol=2e-5)


def test_fake_tensors(made, training):
    """Tensors without values go through a layer without values, and at inference through one that has them."""
    layer, x = made
    layer.train(training)
    mode = torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        assert layer(mode.from_tensor(x)).shape == x.shape
    if not training:
        assert layer(mode.from_tensor(x)).shape == x.shape


def test_on_the_meta_device(made, training):
    """So does one of the meta device."""
    layer, x = made
    layer.train(training)

    assert layer.to("meta")(x.to("meta")).shape == x.shape


@pytest.mark.parametrize("mode", [Noting, lambda: FlopCounterMode(display=False)], ids=["own", "flops"])
@pytest.mark.parametrize("gradients", [True, False])
def test_modes_of_the_dispatcher(made, training, mode, gradients):
    """A mode of anybody's own sees operations, and the answer is the same."""
    layer, x = made
    wanted = expected(layer, x, training=training)
    layer.train(training)
    with torch.set_grad_enabled(gradients), mode() as watching:
        found = layer(x)

    agree(layer, found.detach(), wanted)
    if isinstance(watching, Noting):
        assert len(watching.seen) > 1 or isinstance(layer, RENORMS)


@pytest.mark.parametrize("cls", [Wrapped, lambda x: x.as_subclass(Labelled)], ids=["dispatching", "labelled"])
@pytest.mark.parametrize("gradients", [True, False])
def test_tensors_of_other_classes(made, training, cls, gradients):
    """A tensor of anybody's own class goes through, and keeps its class."""
    layer, x = made
    wanted = expected(layer, x, training=training)
    layer.train(training)
    for parameter in layer.parameters():
        parameter.requires_grad_(gradients)
    if cls is Wrapped and training:  # whose statistics would become such tensors
        return
    found = layer(cls(x))

    assert isinstance(found, Wrapped if cls is Wrapped else Labelled)
    agree(layer, (found.inner if cls is Wrapped else found.as_subclass(Tensor)).detach(), wanted)


def test_a_default_device_elsewhere(made, training):
    """What a layer makes for itself is where its input is, not where the default is."""
    layer, x = made
    wanted = expected(layer, x, training=training)
    layer.train(training)
    with torch.no_grad(), torch.device("meta"):
        found = layer(x)

    agree(layer, found, wanted)


def jacobian(function, x):
    """The Jacobian of a function of a flat input, by differences."""
    step = 1e-6
    flat = x.reshape(-1)
    rows = [(function(flat + step * e) - function(flat - step * e)) / (2 * step) for e in torch.eye(flat.numel()).to(x)]
    return torch.stack(rows, 1)


def of_flat(layer, shape):
    """The layer at inference as a function of a flat input, whose first values alone count."""
    return lambda flat: layer(flat.reshape(shape)).reshape(-1)[:3]


@pytest.fixture
def smooth(made):
    """A layer in float64 at inference and an input, small enough for differences."""
    layer, x = made
    return layer.double().eval(), x.double()[:, :, :2] if x.dim() > 2 else x.double()


@pytest.mark.parametrize("transform", [torch.func.jacrev, torch.func.jacfwd], ids=["jacrev", "jacfwd"])
def test_torch_func(smooth, transform):
    """Derivatives of either direction are those of the function."""
    layer, x = smooth
    function = of_flat(layer, x.shape)

    torch.testing.assert_close(transform(function)(x.reshape(-1)), jacobian(function, x), atol=1e-5, rtol=1e-4)


def test_second_derivatives_of_torch_func(smooth):
    """`torch.func.hessian` is that of the function."""
    layer, x = smooth

    def function(flat):
        return layer(flat.reshape(x.shape)).square().sum()

    found = torch.func.hessian(function)(x.reshape(-1))
    wanted = jacobian(torch.func.grad(function), x)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("way", ["jacobian", "forward", "vjp", "jvp", "dual"])
def test_torch_autograd_functional(smooth, way):
    """So are those of `torch.autograd.functional` and of dual numbers, or a message names what works."""
    layer, x = smooth
    flat, function = x.reshape(-1), of_flat(layer, x.shape)
    wanted, vector = jacobian(function, x), torch.linspace(-1, 1, x.numel()).double()
    functional = torch.autograd.functional
    if way == "jacobian":
        found = functional.jacobian(function, flat)
    elif way == "forward":
        found = functional.jacobian(function, flat, vectorize=True, strategy="forward-mode")
    elif way == "vjp":
        found, wanted = functional.vjp(function, flat, torch.ones(3).double())[1], wanted.sum(0)
    elif way == "dual":
        with fwad.dual_level():
            found = fwad.unpack_dual(function(fwad.make_dual(flat, vector))).tangent
        wanted = wanted @ vector
    else:
        with _may_refuse(layer, "create_graph"):
            found = functional.jvp(function, flat, vector)[1]
            torch.testing.assert_close(found, wanted @ vector, atol=1e-5, rtol=1e-4)
        return

    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


MESSAGES = {
    "create_graph": "expected create_graph=False, received create_graph=True: this layer's backward is not "
    "differentiable itself; use torch.func, or torch.compile, which differentiate its plain operations",
    "is_grads_batched": "expected is_grads_batched=False, received is_grads_batched=True, which "
    "torch.autograd.functional sets with vectorize=True: this layer's backward takes one gradient at a time; use "
    "torch.func, or vectorize=False",
}


@contextlib.contextmanager
def _may_refuse(layer, argument):
    """Expect the refusal of a SwitchNorm; BatchRenorm at inference is torch's own BatchNorm, which has all of it."""
    if isinstance(layer, RENORMS):
        yield
        return
    with pytest.raises(RuntimeError, match=exactly(MESSAGES[argument])):
        yield


@pytest.mark.parametrize(
    ("argument", "run"),
    [
        ("create_graph", lambda f, x: torch.autograd.functional.hessian(lambda x: f(x).square().sum(), x)),
        ("create_graph", lambda f, x: torch.autograd.functional.hvp(lambda x: f(x).square().sum(), x, x)),
        ("is_grads_batched", lambda f, x: torch.autograd.functional.jacobian(f, x, vectorize=True)),
    ],
    ids=["hessian", "hvp", "vectorize"],
)
def test_derivatives_that_are_refused(smooth, argument, run):
    """What the backward pass cannot do is refused by a message that names what can."""
    layer, x = smooth
    with _may_refuse(layer, argument):
        run(of_flat(layer, x.shape), x.reshape(-1))


@pytest.mark.parametrize("backend", ["eager", "aot_eager_decomp_partition"])
def test_torch_compile(made, training, backend):
    """A compiled layer computes what the layer does, and so do its gradients, in a backward made anew in part, too."""
    layer, x = made
    wanted = expected(layer, x, training=training)
    plain, x = copy.deepcopy(layer).train(training), x.requires_grad_()
    torch.compiler.reset()
    found = torch.compile(layer.train(training), backend=backend, fullgraph=True)(x)

    agree(layer, found.detach(), wanted)
    weights = torch.randn_like(x)
    (gradient,) = torch.autograd.grad((found * weights).sum(), x)
    (same,) = torch.autograd.grad((plain(x) * weights).sum(), x)
    torch.testing.assert_close(gradient, same, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("strict", [True, False])
def test_torch_export(made, strict):
    """An exported layer computes what the layer does at inference."""
    layer, x = made
    output, _ = expected(layer, x, training=False)
    program = torch.export.export(layer.eval(), (x,), strict=strict)

    torch.testing.assert_close(program.module()(x).detach(), output, atol=2e-5, rtol=2e-5)


def gradients(layer, x, run):
    """Return the gradients of the parameters and of the input through ``run(layer, x)``."""
    layer, x = copy.deepcopy(layer).train(), x.detach().clone().requires_grad_()
    (run(layer, x) * torch.linspace(-1, 1, x.numel()).reshape(x.shape)).sum().backward()
    return [x.grad, *(parameter.grad for parameter in layer.parameters())]


@pytest.mark.parametrize(
    "around",
    [
        torch.autograd.graph.save_on_cpu,
        lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy().copy(), torch.from_numpy),
    ],
    ids=["on the CPU", "packed"],
)
def test_saved_tensors(made, around):
    """Hooks that put saved tensors away and bring them back change no gradient."""
    layer, x = made

    def run(layer, x):
        with around():
            return layer(x)

    found, wanted = gradients(layer, x, run), gradients(layer, x, lambda layer, x: layer(x))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_without_running_statistics(reentrant):
    """The gradients of a checkpointed layer that keeps no statistics are those of the layer."""
    torch.manual_seed(0)
    layer, x = SwitchNorm2d(4, batch_statistics="frozen"), torch.randn(3, 4, 5, 5)
    found = gradients(layer, x, lambda layer, x: checkpoint(layer, x, use_reentrant=reentrant))

    torch.testing.assert_close(found, gradients(layer, x, lambda layer, x: layer(x)))
