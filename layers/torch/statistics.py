"""The two passes over the data that every normalization consists of: take its moments, apply a scale and shift.

All else in a layer's formula is on arrays of the size of (N, C), written in plain operations and differentiated by
autograd. Eagerly, the two passes are autograd functions with hand-written backwards that keep the input and arrays of
(N, C) alone, and moments are float64 on those small arrays, so that a mean far above the deviation costs no digits.
Where the graph itself is wanted (``torch.compile``, ``torch.export``) or a function transform is at work
(``torch.func``), the same formulas run as plain operations in float32.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def wide(x: Tensor) -> Tensor:
    """Return ``x`` in float32 where it is narrower: statistics are never taken in half precision."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def per_channel(vector: Tensor, x: Tensor) -> Tensor:
    """Return a (C,) vector shaped to broadcast along dimension 1 of ``x``."""
    return vector.view(1, -1, *[1] * (x.dim() - 2))


def square(x: Tensor) -> Tensor:
    """Return ``x * x``: exporters write ``x ** 2`` as a slower power."""
    return x * x


class Centred:
    """An input with its moments per sample and channel: ``mean`` and biased ``var`` of shape (N, C, 1, ...).

    For (N, C) input each value is its own mean and the variance is 0.
    """

    def __init__(self, x: Tensor) -> None:
        self._x = x
        if _plain():
            values = wide(x)
            axes = list(range(2, x.dim()))
            self.mean = values.mean(axes, keepdim=True) if axes else values
            self._centred = values - self.mean if axes else torch.zeros_like(values)
            self.var = square(self._centred).mean(axes, keepdim=True) if axes else self._centred
            self._pivot = self.mean
        else:
            self.mean, self.var, self._centred, self._pivot = _Moments.apply(x)

    def normalize(self, mean: Tensor, scale: Tensor, shift: Tensor | float) -> Tensor:
        """Return ``(x - mean) * scale + shift`` in the dtype of x; may be called once.

        The arguments broadcast with (N, C, 1, ...).
        """
        if _plain():
            if self._x.dim() == 2:
                return ((self.mean - mean) * scale + shift).to(self._x.dtype)
            return (self._centred * scale + ((self.mean - mean) * scale + shift)).to(self._x.dtype)
        offset = (self._pivot - mean) * scale + shift
        scale, offset = (part.expand_as(self.mean) for part in (scale, offset))
        result: Tensor = _Affine.apply(self._x, self._centred, self._pivot, scale, offset)
        return result


class _Moments(torch.autograd.Function):
    """Mean and biased variance per sample and channel, by two passes about a pivot.

    The pivot is the mean as float32 has it; the mean of what is left corrects it, and the variance is that of the
    difference, so nothing large is ever subtracted from something large.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        values = wide(x)
        axes = list(range(2, x.dim()))
        pivot = values.mean(axes, keepdim=True) if axes else values
        centred = values - pivot
        rest = centred.mean(axes, keepdim=True).double() if axes else torch.zeros_like(pivot, dtype=torch.float64)
        var = _mean_of_squares(centred, axes) - square(rest) if axes else torch.zeros_like(rest)
        pivot = pivot.double()
        mean = pivot + rest
        ctx.save_for_backward(x, mean)
        ctx.mark_non_differentiable(centred, pivot)
        ctx.set_materialize_grads(False)
        return mean, var.clamp_(min=0), centred, pivot

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, d_mean: Tensor | None, d_var: Tensor | None, *_: Any) -> Tensor | None:
        x, mean = ctx.saved_tensors
        count = x.shape[2:].numel()
        # dx = (d_mean + 2 (x - mean) d_var) / count, split about the mean as the working dtype has it.
        working = wide(x).dtype
        gradient: Tensor | None = None
        if d_var is not None and x.dim() > 2:
            near = mean.to(working)
            slope = d_var * (2 / count)
            gradient = (wide(x) - near).mul_(slope.to(working))
            level = (near.double() - mean) * slope
            level = level if d_mean is None else level + d_mean / count
            gradient.add_(level.to(working))
        elif d_mean is not None:
            gradient = (d_mean / count).to(working).expand_as(x)
        return None if gradient is None else gradient.to(x.dtype)


class _Affine(torch.autograd.Function):
    """``centred * scale + offset``, written over ``centred`` = x - pivot, which backward computes again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, centred: Tensor, pivot: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        ctx.save_for_backward(x, pivot, scale)
        y = centred.mul_(scale.to(centred.dtype)).add_(offset.to(centred.dtype))
        if y.dtype != x.dtype:
            return y.to(x.dtype)
        ctx.mark_dirty(centred)
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, Tensor | None]:
        x, pivot, scale = ctx.saved_tensors
        working, axes = wide(x).dtype, list(range(2, x.dim()))
        dy = wide(dy)
        d_scale = d_offset = dx = None
        if ctx.needs_input_grad[4]:
            d_offset = _total(dy, axes)
        if ctx.needs_input_grad[3]:
            product = (wide(x) - pivot.to(working)).mul_(dy)
            d_scale = _total(product, axes)
            if ctx.needs_input_grad[0]:
                dx = torch.mul(dy, scale.to(working), out=product)
        elif ctx.needs_input_grad[0]:
            dx = dy * scale.to(working)
        return None if dx is None else dx.to(x.dtype), None, None, d_scale, d_offset


def _mean_of_squares(x: Tensor, axes: list[int]) -> Tensor:
    if x.is_contiguous():  # the norm's kernel is fast along the last axes alone, and needs no second array
        count = x.shape[2:].numel()
        return square(torch.linalg.vector_norm(x, 2, axes, keepdim=True).double()) / count
    return square(x).mean(axes, keepdim=True).double()


def _total(x: Tensor, axes: list[int]) -> Tensor:
    """Return the sum over ``axes`` in float64, never a view of ``x``."""
    return x.sum(axes, keepdim=True).double() if axes else x.to(torch.float64, copy=True)


def _plain() -> bool:
    """Whether the formulas are wanted as plain operations."""
    return torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None
