"""Normalization on a GPU, where Triton is: three launches forward, three backward (`triton_kernels`).

Forward: moments of each row (reads x), statistics and gates, then scale and shift (reads x, writes y). Backward: two
sums of each row (reads dy and x), the small gradients, then their combination (reads dy and x, writes dx). Nothing of
the input's size is kept but the input. Where the batch is that of several processes its moments are exchanged after the
second launch, and the gradients of these before the last; BatchRenorm then has a launch more forward, and has it too
for a call that may be run again (`rerun`), and torch's operations on single numbers for a schedule.

- Nothing waits for the device: what the arithmetic needs, temperature, limits and counts of batches included, is read
  by the kernels, so a step can be captured in a CUDA graph once one call of its kind has compiled them.
- Launches go to the device of the data, whichever is current, and to that device's current stream; memory is torch's,
  on the same stream.
- Inputs are of the dtype that reaches the layer, also under autocast, which leaves it as it is; parameters and running
  statistics may be of another. float64 is left to torch's operations.
- Results are the same bit for bit each time.
"""

import sys
import warnings
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..limits import SIGMOID_START, Schedule, ramps
from . import rerun
from .norm import RunningNorm
from .normalize import refuse_derivative
from .passes import dense
from .watchers import watched

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LARGEST = 1 << 22
"""Runs times channels that the small kernels are made for; more, as in tables of millions of rows, is left to torch."""

TILE, WARPS = 2048, 4
"""Values that a program looks at at once, and the warps that do."""

PROGRAMS = 1024
"""Programs that fill a large card; rows are split to have as many."""

SHORTEST = 2
"""Tiles of a run at least where a row is split, lest what is written of each be a large share of what is read."""

LAST = 64
"""Channels of a tile where they lie next to each other: 128 bytes at least."""

_devices = {"cuda"}


def takes(x: Tensor, layer: RunningNorm) -> bool:
    """Whether a call of a layer goes through the kernels: on a GPU that has them, unseen, and not of nothing."""
    if x.device.type not in _devices or x.dtype not in DTYPES or not x.numel() or x.is_neg():
        return False
    tensors = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
    if not all(t.device == x.device and t.is_contiguous() for t in tensors):
        return False
    if any(t.is_floating_point() and t.dtype not in DTYPES for t in tensors):
        return False
    if watched(x, *tensors):
        return False
    samples, channels = x.shape[:2]
    positions = x.shape[2:].numel()
    return samples * channels <= LARGEST and positions < 1 << 30 and _ready(x.device)


@cache
def _ready(device: torch.device) -> bool:
    """Whether Triton is there and its kernels compile and run; if they do not, say so once."""
    if find_spec("triton") is None:
        return False
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (7, 0):
        return False
    if "tensorflow" in sys.modules and "triton" not in sys.modules:  # each brings LLVM, and the second ends the process
        warnings.warn(
            "expected Triton to be imported before TensorFlow, received a process that has TensorFlow already, which "
            "Triton would end; normalization runs as torch's own operations, which are slower: import triton first",
            stacklevel=2,
        )
        return False
    x = torch.zeros(1, 1, 1, dtype=torch.float32, device=device)
    try:
        with _on(x):
            _moments(x, _shape(x), None)
    except Exception as error:  # no C compiler, no place for a cache, a driver it does not know: anything
        warnings.warn(
            f"expected Triton to compile for {device}, received {type(error).__name__}: {error}; normalization runs as "
            "torch's own operations, which are slower",
            stacklevel=2,
        )
        return False
    return True


class Shape(NamedTuple):
    """How data (N, C, P) are shared by programs."""

    samples: int
    channels: int
    positions: int
    strides: tuple[int, int, int]
    splits: int
    tiles: int
    block_c: int
    block_p: int

    @property
    def programs(self) -> int:
        """How many there are in a pass over the data."""
        return self.samples * -(-self.channels // self.block_c) * self.splits

    @property
    def small(self) -> tuple[int, int]:
        """Return how many runs and channels a program takes between the passes."""
        return (8, 128) if self.samples * self.splits <= 8 else (64, 16)

    @property
    def strips(self) -> int:
        """How many programs take all channels."""
        return -(-self.channels // self.small[1])

    @property
    def row(self) -> tuple[int, int]:
        """Return a power of 2 that holds a row's runs, and how many channels a program takes of a sample at a time."""
        splits = next(power for power in (1, 32, PROGRAMS) if self.splits <= power)
        return splits, 1024 // splits


def _shape(x: Tensor, *, whole: bool = False) -> Shape:
    """Return how programs share dense data; ``whole`` splits no row."""
    return _shared(x.shape[0], x.shape[1], x.shape[2:].numel(), x.is_contiguous(), whole)


@lru_cache(maxsize=4096)
def _shared(samples: int, channels: int, positions: int, contiguous: bool, whole: bool) -> Shape:
    if contiguous:
        block_p = min(_power(positions), TILE)
        block_c = min(_power(channels), TILE // block_p)
    else:
        block_c = min(_power(channels), LAST)
        block_p = min(_power(positions), TILE // block_c)
    tiles = -(-positions // block_p)
    programs = samples * -(-channels // block_c)
    splits = 1 if whole else max(1, min(tiles // SHORTEST, PROGRAMS // programs))
    tiles = -(-tiles // splits)
    splits = -(-positions // (tiles * block_p))
    strides = (channels * positions, *((positions, 1) if contiguous else (1, channels)))
    return Shape(samples, channels, positions, strides, splits, tiles, block_c, block_p)


def _power(number: int) -> int:
    """Return the smallest power of 2 that is not smaller."""
    return 1 << (number - 1).bit_length()


def _launch(kernel: Any, programs: int, *arguments: Any) -> None:
    kernel[(programs,)](*arguments, num_warps=WARPS)


def _on(x: Tensor) -> AbstractContextManager[Any]:
    """Make the device of ``x`` the current one, which is where Triton launches."""
    return torch.cuda.device_of(x) if x.is_cuda else nullcontext()  # type: ignore[no-untyped-call]


def _moments(x: Tensor, shape: Shape, counter: Tensor | None) -> Tensor:
    from .triton_kernels import moments

    partial = _double(x, 2, shape.samples, shape.splits, shape.channels)
    _launch(moments, shape.programs, x, partial, counter, *shape.strides, *shape[:3], *shape[4:])
    return partial


def _products(dy: Tensor, x: Tensor, shape: Shape, line: Tensor | None, rows: Tensor | None) -> Tensor:
    from .triton_kernels import products

    partial = _double(x, 2, shape.samples, shape.splits, shape.channels)
    _launch(products, shape.programs, dy, x, partial, line, rows, *shape.strides, *shape[:3], *shape[4:])
    return partial


def _double(x: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float64, device=x.device)


def _beside(dy: Tensor, x: Tensor) -> Tensor:
    """Return a gradient that lies in memory as ``x`` does."""
    dy = dy.resolve_neg()
    same = dy.is_contiguous() if x.is_contiguous() else dy.movedim(1, -1).is_contiguous()
    beside: Tensor = dy if same else torch.empty_like(x, dtype=dy.dtype).copy_(dy)
    return beside


def _exchange(layer: RunningNorm, channels: Tensor, count: int, correction: int) -> Tensor:
    """Make the moments of this process's batch those of all processes'; return how many values they have.

    It is what `RunningNorm._batch_moments` exchanges, in its order: the other processes may be on other ways.
    """
    mean, var = channels[:1], channels[1:2]
    total: Tensor = layer._over_processes(torch.full_like(mean[:, :1], count))
    batch_mean = layer._over_processes(mean * count) / total
    squares = layer._over_processes((var + (mean - batch_mean).square()) * count)
    mean.copy_(batch_mean)
    var.copy_(squares / (total - correction))
    return total


def _exchange_gradients(layer: RunningNorm, to_batch: Tensor, total: Tensor, correction: int) -> None:
    d_mean, d_var = to_batch[:1], to_batch[1:]
    d_var.copy_(layer._over_processes(d_var) / (total - correction))
    d_mean.copy_(layer._over_processes(d_mean) / total)


def switch_norm(layer: Any, x: Tensor) -> Tensor:
    """Return Switchable Normalization of ``x`` by a layer's parameters; moves its running statistics in training."""
    result: Tensor = _Switch.apply(x, layer, layer.weight, layer.bias, layer.mean_weight, layer.var_weight)  # type: ignore[no-untyped-call]
    return result


def batch_renorm(layer: Any, x: Tensor, rerun_expected: bool) -> Tensor:
    """Return Batch Renormalization of ``x`` in training, and move the layer's running statistics."""
    result: Tensor = _Renorm.apply(x, layer, rerun_expected, layer.weight, layer.bias)  # type: ignore[no-untyped-call]
    return result


class _Switch(torch.autograd.Function):
    """Switchable Normalization in all its forms."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any, *parameters: Tensor | None) -> Tensor:
        from .triton_kernels import affine, switch_forward

        weight, bias, mean_weight, var_weight = parameters
        compat, maps, batch = layer.compat is not None, x.dim() > 2, layer.batch_statistics != "none"
        live = layer._takes_batch()
        moves = live and layer._moves()
        alone = layer._processes() == 1
        # What divides by n - 1: a map's values; for vectors a sample's and a batch's.
        corrections = int(compat and maps), int(compat and not maps), int(compat and not maps)
        with _on(x):
            values = dense(x)
            shape = _shape(values, whole=compat)
            partial = _moments(values, shape, layer.num_batches_tracked if moves and alone else None)
            rows = partial if shape.splits == 1 else _double(x, 2, shape.samples, shape.channels)
            samples, channels = _double(x, 2, shape.samples), _double(x, 2, shape.channels)
            gates = torch.empty(7, dtype=torch.float32, device=x.device)
            running = (layer.running_mean, layer.running_var) if batch else (None, None)
            _launch(
                switch_forward, shape.samples + (shape.strips if batch else 0), partial, rows, samples, channels, gates,
                mean_weight, var_weight, layer.temperature, *running, *_share(layer, compat=compat), *shape[:3],
                *shape[4:6], *corrections[:2], corrections[2] if alone else 0, batch, live, moves and alone,
                *shape.row, *shape.small, shape.block_p,
            )  # fmt: skip
            total = None
            if live and not alone:
                total = _exchange(layer, channels, shape.samples * shape.positions, corrections[2])
                if moves:
                    layer._move(*channels)
            elif moves:
                _moved(*running, layer.num_batches_tracked)
            y = torch.empty_like(values)
            _launch(
                affine, shape.programs, values, y, None, rows, samples, channels, gates, weight, bias, None,
                layer.epsilon, *shape.strides, *shape[:3], *shape[4:6], maps, corrections[0], batch, *shape[6:],
            )  # fmt: skip
        ctx.save_for_backward(x, *parameters)
        ctx.small = rows, samples, channels, gates, total
        ctx.settings = layer, layer.epsilon, shape, maps, corrections, batch, live
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        from .triton_kernels import combine, switch_backward

        refuse_derivative(dy)
        x, weight, bias, mean_weight, var_weight = ctx.saved_tensors
        rows, samples, channels, gates, total = ctx.small
        layer, epsilon, shape, maps, corrections, batch, live = ctx.settings
        with _on(x):
            values = dense(x)
            dy = _beside(dy, values)
            partial = _products(dy, values, shape, None, rows)
            sums = partial if shape.splits == 1 else _double(x, 2, shape.samples, shape.channels)
            sample_sums, to_batch = _double(x, 7, shape.samples), _double(x, 2, shape.channels)
            d_weight, d_bias = (None if vector is None else torch.empty_like(vector) for vector in (weight, bias))
            _launch(
                switch_backward, shape.samples + shape.strips, partial, sums, rows, samples, channels, gates, weight,
                sample_sums, to_batch, d_weight, d_bias, epsilon, *shape[:3], shape.splits, maps, *corrections, batch,
                live, total is not None, *shape.row, *shape.small,
            )  # fmt: skip
            if total is not None:
                _exchange_gradients(layer, to_batch, total, corrections[2])
            d_logits = torch.empty_like(mean_weight), torch.empty_like(var_weight)
            dx = torch.empty_like(values) if ctx.needs_input_grad[0] else None
            _launch(
                combine, 1 if dx is None else shape.programs, dy, values, dx, None, rows, samples, channels, gates,
                weight, sums, sample_sums, to_batch, *d_logits, epsilon, *shape.strides, *shape[:3], *shape[4:6], maps,
                corrections[0], batch, live, 256, *shape[6:],
            )  # fmt: skip
        return dx, None, d_weight, d_bias, *d_logits


class _Renorm(torch.autograd.Function):
    """Batch Renormalization in training."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any, rerun_expected: bool, *parameters: Tensor | None) -> Tensor:
        from .triton_kernels import affine, renorm_forward

        weight, bias = parameters
        counts, alone = layer._moves(), layer._processes() == 1
        moves = counts and layer.momentum != 0  # σ and back would round
        with _on(x):
            values = dense(x)
            shape = _shape(values)
            partial = _moments(values, shape, layer.num_batches_tracked if counts else None)
            channels = _double(x, 4, shape.channels)
            line = torch.empty(3, shape.channels, dtype=torch.float32, device=x.device)

            def between(
                partial: Tensor | None, state: tuple[Tensor, ...], finish: bool, step: Tensor | None = None
            ) -> None:
                _launch(
                    renorm_forward, shape.strips, partial, channels, line, *state, weight, bias, *_share(layer),
                    layer.eps, step, *_schedule(layer), *shape[:3], *shape[4:6], layer.schedule == "sigmoid", finish,
                    moves and finish, *shape.small, shape.block_p,
                )  # fmt: skip

            state, step, total = (layer.running_mean, layer.running_var, layer.r_max, layer.d_max), None, None
            if alone and not rerun_expected and not rerun.again():
                step = None if layer.schedule is None else layer.step
                between(partial, state, finish=True, step=step)
            else:
                layer._follow()
                between(partial, state, finish=False)
                if not alone:
                    total = _exchange(layer, channels, shape.samples * shape.positions, 0)
                between(None, layer._state(channels[0], rerun_expected), finish=True)
            if moves:
                _moved(*state[:2], layer.num_batches_tracked)
            y = torch.empty_like(values)
            _launch(
                affine, shape.programs, values, y, line, *[None] * 6, step, layer.eps, *shape.strides, *shape[:3],
                *shape[4:6], True, 0, True, *shape[6:],
            )  # fmt: skip
        ctx.save_for_backward(x, *parameters)
        ctx.small = channels, line, total
        ctx.settings = layer, layer.eps, shape
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        from .triton_kernels import combine, renorm_backward

        refuse_derivative(dy)
        x, weight, bias = ctx.saved_tensors
        channels, line, total = ctx.small
        layer, eps, shape = ctx.settings
        with _on(x):
            values = dense(x)
            dy = _beside(dy, values)
            partial = _products(dy, values, shape, line, None)
            to_batch = _double(x, 2, shape.channels)
            d_weight, d_bias = (None if vector is None else torch.empty_like(vector) for vector in (weight, bias))
            _launch(
                renorm_backward, shape.strips, partial, channels, line, to_batch, d_weight, d_bias, eps, *shape[:3],
                shape.splits, total is not None, *shape.small,
            )  # fmt: skip
            if total is not None:
                _exchange_gradients(layer, to_batch, total, 0)
            dx = None
            if ctx.needs_input_grad[0]:
                dx = torch.empty_like(values)
                _launch(
                    combine, shape.programs, dy, values, dx, line, None, None, channels, *[None] * 4, to_batch, None,
                    None, eps, *shape.strides, *shape[:3], *shape[4:6], True, 0, True, True, 256, *shape[6:],
                )  # fmt: skip
        return dx, None, None, d_weight, d_bias


def _share(layer: Any, *, compat: bool = False) -> tuple[float, Tensor | None]:
    """Return the weight of a batch in the running statistics, and where it is one of n, the count n."""
    momentum = layer.momentum
    if momentum is None:
        return 0.0, layer.num_batches_tracked
    return float(1 - momentum if compat else momentum), None


def _schedule(layer: Any) -> tuple[float, ...]:
    """Return what the limits of a schedule are computed of, but for the step."""
    schedule: Schedule = "pretrained" if layer.schedule is None else layer.schedule
    steps = 1 if layer.schedule_steps is None else layer.schedule_steps
    parts = *layer._limits, *ramps(schedule, layer.schedule_steps), steps, layer.t_delta, SIGMOID_START
    return tuple(map(float, parts))


def _moved(*state: Tensor) -> None:
    """Have autograd know that a kernel wrote to these."""
    torch.autograd.graph.increment_version([tensor for tensor in state if not tensor.is_inference()])
