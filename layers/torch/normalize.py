"""How a normalization comes about: the data's moments, a formula on them, a scale and shift of the data.

A layer's formula is on arrays of the size of (N, C): a function ``mix`` that also returns its own gradient. Eagerly
these arrays are in NumPy on a CPU and float64 everywhere, so that a mean far above the deviation costs no digits, and
the passes over the data (`passes`) keep the input for backward and nothing else of its size. Where somebody is to see
the operations (`watchers`), the same formulas run as plain ones in float32 and autograd differentiates them. A GPU with
Triton has the formulas in kernels of its own (`gpu`), and a layer asks there first.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .passes import Array, affine, combine, dense, exact, moments, products, rounded
from .watchers import watched

Backward = Callable[[Array, Array, Array], tuple[Array, ...]]
Mix = Callable[..., tuple[tuple[Array, Array, Array], Backward]]


class Small(NamedTuple):
    """What a formula's arrays are: their library, their dtype, and how a tensor becomes one of them."""

    library: ModuleType
    dtype: torch.dtype
    array: Callable[[Tensor], Array]

    @property
    def watched(self) -> bool:
        """Whether these are the plain operations that a tracer or a function transform is to see."""
        return self.array is wide

    def per_channel(self, vector: Tensor, like: Array) -> Array:
        """Return a (C,) vector as an array that broadcasts along dimension 1 of ``like``."""
        return self.array(vector).reshape(1, -1, *[1] * (like.ndim - 2))


def normalize(x: Tensor, mix: Mix, *parameters: Tensor | None) -> Tensor:
    """Return ``(x - mean + away) * scale + shift`` with what a formula makes of the moments.

    ``mix(small, mean, var, *parameters)`` is given the mean and the biased variance per sample and channel, of shape
    (N, C, 1, ...), and returns ``(away, scale, shift), backward``, arrays that broadcast with them. It is called once.
    ``backward``, given the gradients of the three, returns those of ``mean``, of ``var`` and of each parameter. For
    (N, C) input each value is its own mean and the variance is 0.
    """
    if watched(x, *parameters):
        return _plainly(x, mix, *parameters)
    result: Tensor = _Normalize.apply(x, mix, *parameters)  # type: ignore[no-untyped-call]
    return result


def wide(x: Tensor) -> Tensor:
    """Return ``x`` in float32 where it is narrower: statistics are never taken in half precision."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def square(x: Array) -> Array:
    """Return ``x * x``: exporters write ``x ** 2`` as a slower power."""
    return x * x


def refuse_derivative(dy: Tensor) -> None:
    """Raise `RuntimeError` in a backward pass that is to be differentiated itself, or takes several gradients."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "expected create_graph=False, received create_graph=True: this layer's backward is not differentiable "
            "itself; use torch.func, or torch.compile, which differentiate its plain operations"
        )
    if torch._C._functorch.is_legacy_batchedtensor(dy) or torch._C._functorch.maybe_current_level() is not None:
        raise RuntimeError(
            "expected is_grads_batched=False, received is_grads_batched=True, which "
            "torch.autograd.functional sets with vectorize=True: this layer's backward takes one gradient at a "
            "time; use torch.func, or vectorize=False"
        )


class _Normalize(torch.autograd.Function):
    """The eager passes: moments, then (x - pivot)·scale + offset; the pivot is the mean as the data's dtype has it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mix: Mix, *parameters: Tensor | None) -> Tensor:
        values = dense(wide(x))
        mean, var = moments(values)
        numpy = isinstance(mean, np.ndarray)
        small = Small(np, torch.float64, _numpy) if numpy else Small(torch, mean.dtype, exact)
        pivot = rounded(mean, values)
        with np.errstate(all="ignore"):  # infinities and NaNs go through without a word, as they do in torch
            (away, scale, shift), ctx.mix_backward = mix(small, mean, var, *parameters)
            away = away + (pivot - mean)
            ctx.save_for_backward(x, *parameters)
            ctx.small = mean, pivot, away, scale
            return affine(values, pivot, scale, away * scale + shift).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_derivative(dy)
        with np.errstate(all="ignore"):
            return _gradients(ctx, wide(dy))


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, *parameters = ctx.saved_tensors
    mean, pivot, away, scale = ctx.small
    values = dense(wide(x))
    d_scale, d_shift = products(dy, values, pivot)
    d_away = scale * d_shift
    d_mean, d_var, *rest = ctx.mix_backward(d_away, d_scale + away * d_shift, d_shift)
    d_parameters = [
        torch.as_tensor(gradient, device=p.device).reshape(p.shape).to(p.dtype) if needed else None
        for p, gradient, needed in zip(parameters, rest, ctx.needs_input_grad[2:], strict=True)
    ]
    if not ctx.needs_input_grad[0]:
        return None, None, *d_parameters
    # dx = scale·dy + d_mean/count + 2·d_var·(x - mean)/count, with x - mean split into (x - pivot) + (pivot - mean)
    count = x.shape[2:].numel()
    slope = d_var * (2 / count)
    level = (d_mean - d_away) / count + (pivot - mean) * slope
    return combine(dy, values, pivot, scale, slope, level).to(x.dtype), None, *d_parameters


def _plainly(x: Tensor, mix: Mix, *parameters: Tensor | None) -> Tensor:
    values = wide(x)
    axes = list(range(2, x.dim()))
    if axes:
        own_mean = values.mean(axes, keepdim=True)
        centred = values - own_mean
        own_var = square(centred).mean(axes, keepdim=True)
    else:
        own_mean, centred, own_var = values, torch.zeros_like(values), torch.zeros_like(values)
    (away, scale, shift), _ = mix(Small(torch, values.dtype, wide), own_mean, own_var, *parameters)
    result: Tensor = centred * scale + (away * scale + shift)
    return result.to(x.dtype)


def _numpy(x: Tensor) -> Array:
    return x.detach().to(torch.float64, copy=True).numpy()
