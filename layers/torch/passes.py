"""The passes over (N, C, ...) data that a normalization and its backward consist of.

On a CPU they run compiled (`kernels`, where Numba is installed), on contiguous and on channels-last memory as it lies,
with as many threads as torch is set to; elsewhere as a few torch operations. The data are float32 or float64. What is
per sample and channel, of shape (N, C, 1, ...), is float64 where the device has it, and in NumPy on a CPU, where
calling torch costs more than the arithmetic.
"""

import os
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = Any
"""A NumPy array for data on a CPU, else a tensor."""

SHARE = 1 << 16
"""Values that are worth a thread."""


def moments(x: Tensor) -> tuple[Array, Array]:
    """Return mean and biased variance per sample and channel, never by E[x²] - E[x]²."""
    if compiled(x):
        mean, var = _empty(x), _empty(x)
        _run(kernels().MOMENTS, [x], [mean, var])
        return mean, var
    count = x.shape[2:].numel()
    pivot = _total(x) / count
    centred = x - pivot
    rest = exact(_total(centred)) / count
    var = (exact(_total(centred * centred)) / count - rest * rest).clamp_(min=0)
    return _array(x, exact(pivot) + rest), _array(x, var)


def affine(x: Tensor, pivot: Array, scale: Array, shift: Array) -> Tensor:
    """Return (x - pivot)·scale + shift."""
    if compiled(x):
        y = torch.empty_like(x)
        _run(kernels().AFFINE, [x, y], [_spread(part, x) for part in (pivot, scale, shift)])
        return y
    return (x - _tensor(pivot, x)).mul_(_tensor(scale, x)).add_(_tensor(shift, x))


def products(dy: Tensor, x: Tensor, pivot: Array) -> tuple[Array, Array]:
    """Return the sums of dy·(x - pivot) and of dy per sample and channel."""
    if compiled(x):
        product, total = _empty(x), _empty(x)
        _run(kernels().PRODUCTS, [dy, x], [_spread(pivot, x), product, total])
        return product, total
    product = exact(_total((x - _tensor(pivot, x)).mul_(dy)))
    return _array(x, product), _array(x, exact(_total(dy)))


def combine(dy: Tensor, x: Tensor, pivot: Array, scale: Array, slope: Array, level: Array) -> Tensor:
    """Return scale·dy + slope·(x - pivot) + level."""
    if compiled(x):
        dx = torch.empty_like(x)
        _run(kernels().COMBINE, [dy, x, dx], [_spread(part, x) for part in (pivot, scale, slope, level)])
        return dx
    centred = (x - _tensor(pivot, x)).mul_(_tensor(slope, x)).add_(_tensor(level, x))
    return centred.addcmul_(dy, _tensor(scale, x))


def rounded(small: Array, x: Tensor) -> Array:
    """Return an array per sample and channel as the dtype of ``x`` has it."""
    return small.astype(_dtype(x)) if isinstance(small, np.ndarray) else small.to(x.dtype)


def compiled(x: Tensor) -> bool:
    """Whether the passes over ``x`` run compiled."""
    return x.device.type == "cpu" and kernels() is not None


def dense(x: Tensor) -> Tensor:
    """Return ``x`` itself where its memory is contiguous or channels-last, else a contiguous copy."""
    return x if x.is_contiguous() or x.movedim(1, -1).is_contiguous() else x.contiguous()


def exact(x: Tensor) -> Tensor:
    """Return ``x`` in float64, where the device has it."""
    return x if x.device.type == "mps" else x.double()


class Memory:
    """How the kernels see data like ``x``: as rows (N·C, P), or where channels are last (N, P, C)."""

    def __init__(self, x: Tensor) -> None:
        self.samples, self.channels = x.shape[:2]
        self.rows = x.is_contiguous()
        self.dtype = _dtype(x)
        self._threads = min(torch.get_num_threads(), x.numel() // SHARE)

    def data(self, x: Tensor, *, by_sample: bool = False) -> Array:
        """Return data, as rows (N, C, P) if kernels go ``by_sample``; what lies in another order is copied."""
        if self.rows:
            shape = (self.samples, self.channels, -1) if by_sample else (self.samples * self.channels, -1)
            return x.detach().contiguous().numpy().reshape(shape)
        return x.detach().movedim(1, -1).contiguous().numpy().reshape(self.samples, -1, self.channels)

    def small(self, array: Array) -> Array:
        """Return an array per sample and channel."""
        return array.reshape(self.samples * self.channels if self.rows else (self.samples, self.channels))

    def run(self, pair: tuple[Any, Any], *arrays: Array) -> None:
        """Run the one of two kernels that is for this layout, on torch's number of threads."""
        kernel = pair[0] if self.rows else pair[1]
        if self._threads > 1 and _threads.available():
            _threads.use(self._threads)
            kernel.parallel(*arrays)
        else:
            kernel.serial(*arrays)


def _run(pair: tuple[Any, Any], data: list[Tensor], small: list[Array]) -> None:
    """Run a kernel over data and arrays per sample and channel."""
    memory = Memory(data[-1])
    if memory.samples:
        memory.run(pair, *map(memory.data, data), *map(memory.small, small))


class _Threads:
    """Numba's threads, where they may be used.

    Its own pool, unlike OpenMP's and TBB's, ends the process when two Python threads come at once. GNU OpenMP ends a
    forked child that uses it after its parent has.
    """

    def __init__(self) -> None:
        self.forked = False
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._note_fork)

    def _note_fork(self) -> None:
        self.forked = True

    def available(self) -> bool:
        return not self.forked and _has_thread_safe_pool()

    def use(self, threads: int) -> None:
        kernels().set_num_threads(threads)


_threads = _Threads()


@cache
def _has_thread_safe_pool() -> bool:
    return any(find_spec(f"numba.np.ufunc.{pool}") is not None for pool in ("omppool", "tbbpool"))


@cache
def kernels() -> Any:
    """Return the module of the compiled passes, None without Numba."""
    try:
        from . import kernels as module
    except ImportError:
        return None
    return module


def _empty(x: Tensor, dtype: type[np.floating[Any]] = np.float64) -> Array:
    return np.empty((*x.shape[:2], *[1] * (x.dim() - 2)), dtype)


def _spread(small: Array, x: Tensor) -> Array:
    """Return a small array in the dtype of ``x``, with a value for each sample and channel."""
    result = _empty(x, _dtype(x))
    result[...] = small
    return result


def _dtype(x: Tensor) -> type[np.floating[Any]]:
    return np.float32 if x.dtype == torch.float32 else np.float64


def _total(x: Tensor) -> Tensor:
    return x.sum(tuple(range(2, x.dim())), keepdim=True) if x.dim() > 2 else x


def _array(x: Tensor, small: Tensor) -> Array:
    return small.numpy() if x.device.type == "cpu" else small


def _tensor(small: Array, x: Tensor) -> Tensor:
    return torch.as_tensor(small, device=x.device).to(x.dtype)
