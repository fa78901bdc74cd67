"""The GPU's kernels on the CPU, under Triton's interpreter; `test_triton` runs these tests in a process of their own.

``TRITON_INTERPRET=1 python -m pytest tests/torch/interpreted.py``: Triton reads the variable when it is imported.
"""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from normswap.layers.limits import limits_at
from normswap.layers.torch import (
    BatchRenorm1d,
    BatchRenorm2d,
    BatchRenorm3d,
    SwitchNorm1d,
    SwitchNorm2d,
    SwitchNorm3d,
    gpu,
)

from ..conformance import CASES, check
from ..helpers import exactly
from .models import filled
from .test_conformance import computed
from .test_watchers import MESSAGES

FORWARD = {"sn": ["moments", "switch_forward", "affine"], "brn": ["moments", "renorm_forward", "affine"]}
BACKWARD = {"sn": ["products", "switch_backward", "combine"], "brn": ["products", "renorm_backward", "combine"]}
LAYOUTS = [
    pytest.param(torch.contiguous_format, id="contiguous"),
    pytest.param(torch.channels_last, id="channels_last"),
]


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """The names of the kernels launched so far; tensors of the CPU go to them."""
    gpu._ready(torch.device("cpu"))
    names, launch = [], gpu._launch

    def noted(kernel, *arguments):
        names.append(kernel.fn.__name__)
        launch(kernel, *arguments)

    monkeypatch.setattr(gpu, "_devices", {"cpu"})
    monkeypatch.setattr(gpu, "_launch", noted)
    return names


def step(layer, x, dy):
    """Output, gradients and state of one step."""
    x = x.detach().requires_grad_()
    y = layer(x)
    y.backward(dy)
    return {
        "y": y.detach(),
        "d x": x.grad,
        **{n: p.grad for n, p in layer.named_parameters()},
        **dict(layer.named_buffers()),
    }


def agrees(layer, x, dy=None, tolerance=1e-5):
    """Assert that a step by the kernels is that of the plain operations in float64, where no kernel is."""
    torch.manual_seed(1)
    dy = torch.randn_like(x) if dy is None else dy
    exact = {n: v.double() for n, v in step(copy.deepcopy(layer).double(), x.double(), dy.double()).items()}
    found = step(layer, x, dy)
    assert found["y"].shape == found["d x"].shape == x.shape
    assert found["y"].dtype == found["d x"].dtype == x.dtype
    for name, value in found.items():
        of_data = name in ("y", "d x")
        limit = max(tolerance, 2 * torch.finfo(value.dtype).eps if of_data and x.dtype != torch.float32 else 0)
        if not of_data and value.dtype not in (torch.float32, torch.int64):
            limit = torch.finfo(value.dtype).eps
        scale = max(1.0, float(exact[name].abs().max()))
        torch.testing.assert_close(
            value.double() / scale, exact[name] / scale, atol=limit, rtol=0, msg=lambda m, name=name: f"{name}: {m}"
        )


def uneven(*shape):
    """Data whose level rises along each map, so that no part of it stands for the whole."""
    torch.manual_seed(0)
    return torch.randn(shape) + torch.linspace(0, 30, shape[-1])


KERNELS = [case for case in CASES if case.kind == "sn" or case.training]
"""Batch Renormalization at inference is torch's own BatchNorm."""


@pytest.mark.parametrize("case", KERNELS, ids=str)
def test_conforms(case, launches):
    """Outputs, running statistics and gradients are the formula's in float64, to 1e-5, by three launches each way."""
    check(case, computed(case))

    assert launches == FORWARD[case.kind] + BACKWARD[case.kind]


SIZES = {
    "parts of a row": (2, 3, 50, 91),
    "several rows in a tile": (3, 70, 7, 7),
    "one sample": (1, 5, 33, 65),
    "one value": (2, 1, 1, 1),
    "1x1 maps": (3, 67, 1, 1),
    "more samples than a tile": (130, 2, 1, 3),
    "more channels than a tile": (2, 1100, 1, 2),
}


@pytest.mark.parametrize("cls", [SwitchNorm2d, BatchRenorm2d])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES)
def test_any_size_and_layout(cls, layout, size):
    """Rows that are cut, rows that share a tile, tiles that are not full: the step in float64."""
    x = uneven(*SIZES[size])
    agrees(filled(cls, x.shape[1]), x.contiguous(memory_format=layout))


@pytest.mark.parametrize("cls", [SwitchNorm2d, BatchRenorm2d])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(cls, layout, dtype):
    """Statistics are float32 or wider: only what is written is rounded, with parameters of either precision."""
    x = uneven(2, 6, 50, 61).to(dtype).contiguous(memory_format=layout)
    agrees(filled(cls, 6), x)
    agrees(filled(cls, 6).to(dtype), x)


@pytest.mark.parametrize(
    ("cls", "shape"),
    [
        (SwitchNorm1d, (9, 5)), (SwitchNorm1d, (3, 5, 11)), (SwitchNorm3d, (2, 3, 3, 4, 5)),
        (BatchRenorm1d, (9, 5)), (BatchRenorm1d, (3, 5, 11)), (BatchRenorm3d, (2, 3, 3, 4, 5)),
    ],
)  # fmt: skip
def test_other_ranks(cls, shape):
    """Vectors, sequences and volumes, these channels-last too."""
    agrees(filled(cls, shape[1]), uneven(*shape))
    agrees(filled(cls, shape[1]), uneven(*shape).movedim(1, -1).contiguous().movedim(-1, 1))


OPTIONS = [
    {"batch_statistics": "frozen"}, {"batch_statistics": "none"}, {"affine": False}, {"momentum": None},
    {"momentum": 0.0}, {"momentum": 1.0}, {"eps": 0.0}, {"compat": "switchablenorms"},
    {"compat": "switchablenorms", "momentum": None}, {"compat": "switchablenorms", "batch_statistics": "none"},
]  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_of_switch_norm(options, training):
    """Every form, of maps and of vectors."""
    agrees(filled(SwitchNorm2d, 4, **options).train(training), uneven(3, 4, 46, 50))
    agrees(filled(SwitchNorm1d, 4, **options).train(training), uneven(7, 4))


@pytest.mark.parametrize("temperature", [0.0, 0.3, 5.0])
@pytest.mark.parametrize("batch_statistics", ["moving", "none"])
def test_temperature(temperature, batch_statistics):
    """It divides the logits, and 0 takes the largest gate alone, of equal ones the first."""
    layer = filled(SwitchNorm2d, 4, batch_statistics=batch_statistics)
    layer.temperature = temperature
    agrees(copy.deepcopy(layer), uneven(3, 4, 5, 6))
    with torch.no_grad():
        layer.mean_weight.fill_(0.5)
    agrees(layer, uneven(3, 4, 5, 6))


def test_closed_gates():
    """A gate that was closed for good is exactly 0, and so is its gradient."""
    layer = filled(SwitchNorm2d, 4)
    layer.harden()
    agrees(layer, uneven(3, 4, 5, 6))

    assert torch.equal(layer.mean_weight.grad, torch.zeros(3))


@pytest.mark.parametrize(
    "options",
    [
        {"affine": False}, {"momentum": None}, {"momentum": 0.0}, {"momentum": 1.0}, {"r_max": 1.0, "d_max": 0.0},
        {"schedule": "pretrained", "schedule_steps": 5}, {"schedule": "paper"}, {"schedule": "sigmoid"}, {"eps": 1e-2},
    ],
    ids=str,
)  # fmt: skip
def test_options_of_batch_renorm(options):
    """Limits and schedules, two steps of each: the second sees what the first moved."""
    layer = filled(BatchRenorm2d, 4, **options)
    agrees(layer, uneven(3, 4, 46, 50))
    layer.zero_grad()
    agrees(layer, uneven(3, 4, 5, 6) * 2)


SCHEDULES = [
    {"schedule": "pretrained", "schedule_steps": 9},
    {"schedule": "paper"},
    {"schedule": "paper", "schedule_steps": 900},
    {"schedule": "sigmoid", "t_delta": 0.3},
    {"schedule": "sigmoid", "d_max": 0.0},
]


@pytest.mark.parametrize("options", SCHEDULES, ids=str)
@pytest.mark.parametrize("now", [0, 5, 300, 20_000])
def test_schedules(options, now, launches):
    """At any step the limits are the schedule's, and the step is counted, in the three launches."""
    layer = filled(BatchRenorm2d, 4, **options)
    layer.step.fill_(now)
    limits = limits_at(
        torch, torch.tensor(now), options["schedule"], *layer._limits, layer.schedule_steps, layer.t_delta
    )
    agrees(layer, uneven(3, 4, 5, 6))

    assert layer.step == now + 1
    torch.testing.assert_close(torch.stack([layer.r_max, layer.d_max]), torch.stack(limits), rtol=1e-6, atol=1e-7)
    assert launches == FORWARD["brn"] + BACKWARD["brn"]


def test_frozen_tracking():
    """With the attribute ``track_running_stats`` False nothing moves or counts."""
    for cls in (SwitchNorm2d, BatchRenorm2d):
        layer = filled(cls, 4)
        layer.track_running_stats = False
        before = copy.deepcopy(layer.state_dict())
        agrees(layer, uneven(3, 4, 5, 6))
        torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("cls", [SwitchNorm2d, BatchRenorm2d])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_any_layout(cls, layout):
    """A gradient of stride 0 or of the other layout, and an input of neither layout."""
    x = uneven(3, 6, 5, 7).contiguous(memory_format=layout)
    agrees(filled(cls, 6), x, torch.ones(()).expand(x.shape))
    agrees(filled(cls, 6), x, torch.randn(3, 5, 7, 6).movedim(3, 1))
    agrees(filled(cls, 6), x, torch.randn(x.shape))
    agrees(filled(cls, 6), x.transpose(2, 3))


@pytest.mark.parametrize("kind", ["sn", "brn"])
def test_what_needs_no_gradient_gets_none(kind, launches):
    """Behind a frozen layer, and with frozen parameters, the other gradients are what they were."""
    cls = {"sn": SwitchNorm2d, "brn": BatchRenorm2d}[kind]
    layer, x, dy = filled(cls, 4), uneven(3, 4, 5, 6), torch.randn(3, 4, 5, 6)
    whole = step(copy.deepcopy(layer), x, dy)
    launches.clear()
    copied = copy.deepcopy(layer)
    copied(x).backward(dy)
    for name, parameter in copied.named_parameters():
        assert torch.equal(parameter.grad, whole[name])
    assert len(launches) == 6 if kind == "sn" else 5
    copied = copy.deepcopy(layer)
    for parameter in copied.parameters():
        parameter.requires_grad_(False)
    x = x.clone().requires_grad_()
    copied(x).backward(dy)
    assert torch.equal(x.grad, whole["d x"])


@pytest.mark.parametrize("cls", [SwitchNorm2d, BatchRenorm2d])
def test_another_default_dtype(cls):
    """What a layer makes for itself has the dtype it needs, whatever torch's default is."""
    layer, x, dy = filled(cls, 3), uneven(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    expected = step(copy.deepcopy(layer), x, dy)
    torch.set_default_dtype(torch.float64)
    try:
        found = step(layer, x, dy)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("cls", [SwitchNorm2d, BatchRenorm2d])
def test_inference_mode(cls):
    """A layer made within it trains its statistics there too."""
    with torch.inference_mode():
        layer, x = cls(3), uneven(2, 3, 4, 5)
        y = layer(x)
    twin = cls(3)
    with torch.no_grad():
        torch.testing.assert_close(y, twin(uneven(2, 3, 4, 5)), rtol=0, atol=0)
    assert torch.equal(layer.running_mean, twin.running_mean)


@pytest.mark.parametrize("cls", [SwitchNorm2d, BatchRenorm2d])
def test_moving_statistics_counts_as_writing_in_place(cls):
    """Autograd notices, as it does of any operation, that running statistics saved for a backward pass have moved."""
    layer = cls(3)
    before = layer.running_mean._version
    layer(uneven(2, 3, 4, 5))

    assert layer.running_mean._version > before


def test_infinities_pass_through():
    """An infinite value makes NaNs of what it has a share in, and of nothing else."""
    x = torch.randn(2, 3, 4, 4)
    x[0, 0, 0, 0] = float("inf")

    assert SwitchNorm2d(3, batch_statistics="frozen")(x).isnan().all((1, 2, 3)).tolist() == [True, False]
    assert BatchRenorm2d(3)(x).isnan().all((2, 3)).any(0).tolist() == [True, False, False]


class TestCounting:
    """How many launches a call is."""

    @pytest.mark.parametrize("statistics", ["moving", "frozen", "none"])
    def test_inference(self, statistics, launches):
        """Three, and nothing is kept."""
        with torch.no_grad():
            y = SwitchNorm2d(4, batch_statistics=statistics).eval()(uneven(3, 4, 5, 6))

        assert launches == FORWARD["sn"]
        assert not y.requires_grad

    def test_a_call_that_may_be_run_again(self, launches):
        """One more for BatchRenorm, whose statistics are looked up by the batch's mean."""
        with torch.no_grad():
            BatchRenorm2d(4)(uneven(3, 4, 5, 6))

        assert launches == ["moments", "renorm_forward", "renorm_forward", "affine"]

    @pytest.mark.parametrize("cls", [SwitchNorm2d, BatchRenorm2d])
    def test_nothing_of_the_size_of_the_input_is_kept_but_the_input(self, cls):
        """What a step leaves for its backward pass is the input itself, parameters, and arrays of (N, C)."""
        x = uneven(2, 3, 46, 50).requires_grad_()
        y = filled(cls, 3)(x)

        assert y.grad_fn.saved_tensors[0] is x
        held = [t for t in [*y.grad_fn.saved_tensors[1:], *y.grad_fn.small] if t is not None]
        assert held
        assert max(t.numel() for t in held) <= 2 * 2 * 3


class TestLeftToTorch:
    """What no kernel sees."""

    @pytest.fixture
    def plain(self, launches):
        """The function that asserts that a call launches nothing."""

        def call(layer, x):
            launches.clear()
            y = layer(x)
            assert launches == []
            return y

        return call

    def test_doubles(self, plain):
        """float64, of the data or of the layer."""
        plain(SwitchNorm2d(3).double(), uneven(2, 3, 4, 4).double())
        plain(SwitchNorm2d(3).double(), uneven(2, 3, 4, 4))

    def test_strided(self, plain):
        """Parameters or statistics that do not lie value by value, and data whose sign is only noted."""
        layer, x = filled(SwitchNorm2d, 3), uneven(2, 3, 4, 4)
        expected = layer(x).detach()
        layer.weight = torch.nn.Parameter(layer.weight.detach().repeat_interleave(2)[::2])
        torch.testing.assert_close(plain(layer, x).detach(), expected)
        negative = torch.complex(x, -x).conj().imag
        assert negative.is_neg()
        torch.testing.assert_close(plain(filled(SwitchNorm2d, 3), negative).detach(), expected)

    def test_nothing(self, plain):
        """No samples: the result is empty, and no statistic moves."""
        layer = SwitchNorm2d(3)
        assert plain(layer, torch.zeros(0, 3, 4, 4)).shape == (0, 3, 4, 4)
        assert torch.equal(layer.running_mean, torch.zeros(3))

    def test_tables_of_millions(self, plain, monkeypatch):
        """More rows than the small kernels are made for."""
        monkeypatch.setattr(gpu, "LARGEST", 6)
        assert plain(SwitchNorm2d(3), uneven(3, 3, 2, 2)).shape == (3, 3, 2, 2)

    def test_watched(self, plain):
        """Calls that a mode of the dispatcher, a compiler or a transform of functions is to see."""
        with FlopCounterMode(display=False):
            plain(SwitchNorm2d(3), uneven(2, 3, 4, 4))
        x = uneven(2, 3, 4, 4)
        plain(torch.func.grad(lambda x: SwitchNorm2d(3)(x).square().sum()), x)
        plain(torch.compile(BatchRenorm2d(3), backend="eager"), x)

    @pytest.mark.parametrize(("argument", "form"), [("create_graph", {}), ("is_grads_batched", {"vectorize": True})])
    def test_second_derivatives_are_refused(self, argument, form):
        """Or batches of gradients, with the words of all other ways."""
        layer, functional = SwitchNorm2d(2).eval(), torch.autograd.functional
        run = functional.jacobian if form else functional.hessian
        with pytest.raises(RuntimeError, match=exactly(MESSAGES[argument])):
            run(lambda x: layer(x) if form else layer(x).square().sum(), uneven(1, 2, 1, 2), **form)


def test_a_compiler_that_fails_leaves_all_to_torch(monkeypatch, launches):
    """Where Triton finds no C compiler, or whatever it needs, a layer works, and says once why it is slow."""

    def fails(*arguments):
        raise RuntimeError("Failed to find C compiler.")

    gpu._ready.cache_clear()
    monkeypatch.setattr(gpu, "_launch", fails)
    layer, x = filled(SwitchNorm2d, 3), uneven(2, 3, 4, 4)
    message = (
        "expected Triton to compile for cpu, received RuntimeError: Failed to find C compiler.; normalization runs as "
        "torch's own operations, which are slower"
    )
    with pytest.warns(UserWarning, match=exactly(message)):
        agrees(layer, x)
    gpu._ready.cache_clear()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("cls", [SwitchNorm2d, BatchRenorm2d])
def test_run_again(cls, reentrant, launches):
    """Under activation checkpointing gradients and statistics are those of the one forward."""
    layer, x, dy = filled(cls, 4, momentum=0.5), uneven(3, 4, 5, 6), torch.randn(3, 4, 5, 6)
    expected = step(copy.deepcopy(layer), x, dy)
    launches.clear()
    x = x.clone().requires_grad_()
    y = checkpoint(layer, x, use_reentrant=reentrant)
    y.backward(dy)

    assert launches.count("affine") == 2
    found = {
        "y": y.detach(),
        "d x": x.grad,
        **{n: p.grad for n, p in layer.named_parameters()},
        **dict(layer.named_buffers()),
    }
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def work(rank, path, cases, results):
    """One of two processes: its share of the batch, through the kernels in the first and past them in the second."""
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    gpu._devices = {"cpu"} if rank == 0 else set()
    found = []
    for shared, x, dy, first in cases:
        part = slice(first) if rank == 0 else slice(first, None)
        layer = copy.deepcopy(shared)
        layer.sync = True
        taken = step(layer, x[part], dy[part])
        for name, _ in layer.named_parameters():
            dist.all_reduce(taken[name])
        found.append(taken)
    results[rank] = found
    dist.destroy_process_group()


def test_processes_of_which_one_has_kernels(tmp_path):
    """Two processes, with uneven shares or none, with kernels or without, are one on the whole batch."""
    x, vectors = uneven(6, 4, 3, 5), (slice(2), slice(None), 0, 0)
    dy = torch.randn(x.shape)
    layers = [filled(SwitchNorm2d, 4), filled(BatchRenorm2d, 4), filled(SwitchNorm2d, 4, momentum=None)]
    cases = [(layer, x, dy, first) for layer in layers for first in (2, 6)]
    cases += [(filled(SwitchNorm2d, 4, compat="switchablenorms"), x, dy, 2)]
    published = filled(SwitchNorm1d, 4, compat="switchablenorms")
    cases += [(layer, x[vectors], dy[vectors], 1) for layer in (filled(BatchRenorm1d, 4), published)]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(work, (tmp_path / "rendezvous", cases, results), nprocs=2)
        shares = [results[0], results[1]]

    for index, (layer, whole, gradient, _) in enumerate(cases):
        expected = step(copy.deepcopy(layer).double(), whole.double(), gradient.double())
        both = [share[index] for share in shares]
        for name, value in expected.items():
            parts = (
                [torch.cat([each[name] for each in both])] if name in ("y", "d x") else [each[name] for each in both]
            )
            for part in parts:
                scale = max(1.0, float(value.abs().max()))
                torch.testing.assert_close(part.double() / scale, value.double() / scale, atol=5e-6, rtol=0)
