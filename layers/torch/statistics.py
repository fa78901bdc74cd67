"""The two passes over the data that every normalization consists of: take its moments, apply a scale and shift.

All else in a layer's formula is on arrays of the size of (N, C): plain operations in a function ``mix``, which autograd
differentiates. Eagerly the passes over the data have a hand-written backward that keeps the input and nothing else of
its size; they go through the batch in blocks that stay in the cache. Moments are float64 on the small arrays, so that a
mean far above the deviation costs no digits. Where the graph itself is wanted (``torch.compile``, ``torch.export``) or
a function transform is at work (``torch.func``), the same formulas run as plain operations in float32.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Mix = Callable[..., tuple[Tensor, Tensor, Tensor | float]]

BLOCK = 1 << 18
"""Values worked on at a time: a megabyte in float32, which a second-level cache holds."""


def normalize(x: Tensor, mix: Mix, *parameters: Tensor | None) -> Tensor:
    r"""Return ``(x - mean) * scale + shift`` with ``mean, scale, shift = mix(moments..., *parameters)``.

    ``mix(mean, var, *parameters)`` is given the mean and the biased variance per sample and channel, of shape
    (N, C, 1, ...), and returns arrays that broadcast with them. It is called once and has to be differentiable in all
    its arguments. For (N, C) input each value is its own mean and the variance is 0.
    """
    if _plain():
        return _plainly(x, mix, *parameters)
    result: Tensor = _Normalize.apply(x, mix, *parameters)  # type: ignore[no-untyped-call]
    return result


def wide(x: Tensor) -> Tensor:
    """Return ``x`` in float32 where it is narrower: statistics are never taken in half precision."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def per_channel(vector: Tensor, x: Tensor) -> Tensor:
    """Return a (C,) vector shaped to broadcast along dimension 1 of ``x``."""
    return vector.view(1, -1, *[1] * (x.dim() - 2))


def square(x: Tensor) -> Tensor:
    """Return ``x * x``: exporters write ``x ** 2`` as a slower power."""
    return x * x


class _Normalize(torch.autograd.Function):
    """The eager passes. The pivot K is the mean as float32 has it, and what is left of the mean corrects it.

    Nothing large is subtracted from something large: var = mean((x-K)²) - (mean(x)-K)² with mean(x)-K next to nothing,
    and the output is (x-K)·scale + offset.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, mix: Mix, *parameters: Tensor | None) -> Tensor:
        values = wide(x)
        axes = list(range(2, x.dim()))
        if not axes:  # K = x, and nothing of the size of the data is left
            pivot, y = values.double(), torch.zeros_like(values)
            mean, var = pivot.clone(), torch.zeros_like(pivot)
        else:
            y = torch.empty_like(values)
            pivot = values.mean(axes, keepdim=True)
            rest, power = torch.empty_like(pivot), torch.empty_like(pivot)
            for part in _blocks(values):
                centred = torch.sub(values[part], pivot[part], out=y[part])
                rest[part] = centred.mean(axes, keepdim=True)
                power[part] = _mean_of_squares(centred, axes)
            pivot, rest = pivot.double(), rest.double()
            mean, var = pivot + rest, (power.double() - square(rest)).clamp_(min=0)

        needs = any(ctx.needs_input_grad)
        with torch.set_grad_enabled(needs):
            leaves = [None if p is None else p.detach().requires_grad_(p.requires_grad) for p in parameters]
            moments = [moment.requires_grad_(needs) for moment in (mean, var)]
            mixed, scale, shift = mix(*moments, *leaves)
            offset = (pivot - mixed) * scale + shift
            scale, offset = scale.expand_as(pivot), offset.expand_as(pivot)
        if needs:
            ctx.save_for_backward(x)
            ctx.small = pivot, moments, leaves, scale, offset
        if not axes:
            y = offset.detach().to(values.dtype)
        else:
            narrow_scale, narrow_offset = (part.detach().to(values.dtype) for part in (scale, offset))
            for part in _blocks(values):
                y[part].mul_(narrow_scale[part]).add_(narrow_offset[part])
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        pivot, moments, leaves, scale, offset = ctx.small
        values, dy, axes = wide(x), wide(dy), list(range(2, x.dim()))
        dx = torch.empty_like(values)
        d_offset, d_scale = torch.zeros_like(pivot), torch.zeros_like(pivot)
        if axes:
            near = pivot.to(values.dtype)
            for part in _blocks(values):
                centred = torch.sub(values[part], near[part], out=dx[part])
                d_offset[part] = dy[part].sum(axes, keepdim=True)
                d_scale[part] = (dy[part] * centred).sum(axes, keepdim=True)
        else:
            d_offset += dy

        wanted = [*moments, *(leaf for leaf in leaves if leaf is not None and leaf.requires_grad)]
        found = torch.autograd.grad((scale, offset), wanted, (d_scale, d_offset), retain_graph=True, allow_unused=True)
        d_mean, d_var, *rest = found
        gradients = iter(rest)
        d_leaves = [next(gradients) if leaf is not None and leaf.requires_grad else None for leaf in leaves]
        if not ctx.needs_input_grad[0]:
            return None, None, *d_leaves

        d_mean = torch.zeros_like(pivot) if d_mean is None else d_mean
        if not axes:
            return (d_mean + scale.detach() * dy).to(x.dtype), None, *d_leaves
        # dx = scale·dy + d_mean/count + 2·d_var·(x - mean)/count, with x - mean split into (x - K) and (K - mean)
        count = x.shape[2:].numel()
        slope = torch.zeros_like(pivot) if d_var is None else d_var * (2 / count)
        level = d_mean / count + (pivot - moments[0].detach()) * slope
        scale, slope, level = (part.detach().to(values.dtype) for part in (scale, slope, level))
        for part in _blocks(values):
            dx[part].mul_(slope[part]).add_(level[part]).add_(dy[part] * scale[part])
        return dx.to(x.dtype), None, *d_leaves


def _plainly(x: Tensor, mix: Mix, *parameters: Tensor | None) -> Tensor:
    values = wide(x)
    axes = list(range(2, x.dim()))
    if not axes:
        mean, scale, shift = mix(values, torch.zeros_like(values), *parameters)
        return ((values - mean) * scale + shift).to(x.dtype)
    own_mean = values.mean(axes, keepdim=True)
    centred = values - own_mean
    mean, scale, shift = mix(own_mean, square(centred).mean(axes, keepdim=True), *parameters)
    return (centred * scale + ((own_mean - mean) * scale + shift)).to(x.dtype)


def _blocks(x: Tensor) -> Iterator[slice]:
    """Yield slices along the batch of about `BLOCK` values each; on an accelerator the whole batch at once."""
    samples = max(1, BLOCK // max(1, x.shape[1:].numel())) if x.device.type == "cpu" else max(1, len(x))
    for start in range(0, len(x), samples):
        yield slice(start, start + samples)


def _mean_of_squares(x: Tensor, axes: list[int]) -> Tensor:
    if x.is_contiguous():  # this kernel is fast along the last axes alone, and needs no second array
        return square(torch.linalg.vector_norm(x, 2, axes, keepdim=True)) / x.shape[2:].numel()
    return square(x).mean(axes, keepdim=True)


def _plain() -> bool:
    """Whether the formulas are wanted as plain operations."""
    return torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None
