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

Mix = Callable[..., tuple[Tensor, Tensor, Tensor | float]]

BLOCK = 1 << 18
"""Values worked on at a time: a megabyte in float32, which a second-level cache holds."""

FAR = 32.0
"""A mean this many deviations from zero costs the row kernel too many digits: 32 roundings of 6e-8."""

TINY = 1e-12
"""What keeps the row kernel's variance from 0; it is taken off again."""


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
    """The eager passes: into z = (x - pivot)·unit with its moments, then z·scale/unit + offset in place.

    ``pivot`` and ``unit`` are those of the way the moments were taken; see `_moments`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, mix: Mix, *parameters: Tensor | None) -> Tensor:
        values = wide(x)
        z, pivot, unit, mean, var = _moments(values)
        needs = any(ctx.needs_input_grad)
        with torch.set_grad_enabled(needs):
            leaves = [None if p is None else p.detach().requires_grad_(p.requires_grad) for p in parameters]
            moments = [moment.requires_grad_(needs) for moment in (mean, var)]
            mixed, scale, shift = mix(*moments, *leaves)
            offset = (pivot - mixed) * scale + shift
            scale, offset = scale.expand_as(pivot), offset.expand_as(pivot)
        if needs:
            ctx.save_for_backward(x)
            ctx.small = pivot, unit, moments, leaves, scale, offset
        if x.dim() == 2:
            return offset.detach().to(x.dtype)
        factor, addend = (scale.detach() / unit).to(z.dtype), offset.detach().to(z.dtype)
        for part in _blocks(z):
            z[part].mul_(factor[part]).add_(addend[part])
        return z.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "expected create_graph=False, received create_graph=True: this layer's backward is not differentiable "
                "itself; use torch.func, or torch.compile, which differentiate its plain operations"
            )
        (x,) = ctx.saved_tensors
        pivot, unit, moments, leaves, scale, offset = ctx.small
        values, dy = wide(x), wide(dy)
        d_scale, d_offset = _products(dy, values, pivot, unit)

        wanted = [*moments, *(leaf for leaf in leaves if leaf is not None and leaf.requires_grad)]
        d_mean, d_var, *rest = torch.autograd.grad(
            (scale, offset), wanted, (d_scale, d_offset), retain_graph=True, allow_unused=True
        )
        gradients = iter(rest)
        d_leaves = [next(gradients) if leaf is not None and leaf.requires_grad else None for leaf in leaves]
        if not ctx.needs_input_grad[0]:
            return None, None, *d_leaves

        scale, d_mean = scale.detach(), torch.zeros_like(pivot) if d_mean is None else d_mean
        if x.dim() == 2:
            return (d_mean + scale * dy).to(x.dtype), None, *d_leaves
        # dx = scale·dy + d_mean/count + 2·d_var·(x - mean)/count, with x - mean split into (x - pivot) + (pivot - mean)
        count = x.shape[2:].numel()
        slope = torch.zeros_like(pivot) if d_var is None else d_var * (2 / count)
        level = d_mean / count + (pivot - moments[0].detach()) * slope
        return _combine(dy, values, pivot, scale, slope, level).to(x.dtype), None, *d_leaves


def _moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return z = (x - pivot)·unit, then pivot, unit, mean and biased variance of (N, C, 1, ...) in float64.

    The native kernel that normalizes rows does it in one pass, as x·rstd - mean·rstd, and its moments are as good as
    its result while the mean is not far above the deviation. Else the pivot is the mean as the working dtype has it,
    the mean of what is left corrects it, and the variance is that of the difference.
    """
    axes = list(range(2, x.dim()))
    if not axes:  # each value is its own pivot, and nothing of the size of the data is left
        pivot = _exact(x)
        return x, pivot, torch.ones_like(pivot), pivot.clone(), torch.zeros_like(pivot)
    small = (*x.shape[:2], *[1] * len(axes))
    if _rowwise(x):
        rows, count = small[0] * small[1], x.shape[2:].numel()
        z, mean, rstd = torch.native_group_norm(x.view(1, rows, count), None, None, 1, rows, count, rows, TINY)
        if bool((mean * rstd).abs().max() <= FAR):
            mean, rstd = _exact(mean).view(small), _exact(rstd).view(small)
            return z.view_as(x), mean, rstd, mean.clone(), (1 / square(rstd) - TINY).clamp_(min=0)
    z, pivot = torch.empty_like(x), x.mean(axes, keepdim=True)
    rest, power = torch.empty_like(pivot), torch.empty_like(pivot)
    for part in _blocks(x):
        centred = torch.sub(x[part], pivot[part], out=z[part])
        rest[part] = centred.mean(axes, keepdim=True)
        power[part] = square(centred).mean(axes, keepdim=True)
    pivot, rest = _exact(pivot), _exact(rest)
    return z, pivot, torch.ones_like(pivot), pivot + rest, (_exact(power) - square(rest)).clamp_(min=0)


def _products(dy: Tensor, x: Tensor, pivot: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums of dy·(x - pivot) and of dy per sample and channel, in float64."""
    axes = list(range(2, x.dim()))
    if not axes:
        return torch.zeros_like(pivot), _exact(dy)
    if _rowwise(x) and bool((pivot * unit).abs().max() <= FAR):
        rows, count = pivot.numel(), x.shape[2:].numel()
        ones = torch.ones(rows, dtype=x.dtype)
        _, products, sums = torch.ops.aten.native_group_norm_backward(
            dy.contiguous().view(1, rows, count),
            x.view(1, rows, count),
            pivot.to(x.dtype).view(1, rows),
            ones.view(1, rows),
            ones,
            1,
            rows,
            count,
            rows,
            [False, True, True],
        )
        return _exact(products).view_as(pivot), _exact(sums).view_as(pivot)
    products, sums, near = torch.empty_like(pivot), torch.empty_like(pivot), pivot.to(x.dtype)
    for part in _blocks(x):
        products[part] = (x[part] - near[part]).mul_(dy[part]).sum(axes, keepdim=True)
        sums[part] = dy[part].sum(axes, keepdim=True)
    return products, sums


def _combine(dy: Tensor, x: Tensor, pivot: Tensor, scale: Tensor, slope: Tensor, level: Tensor) -> Tensor:
    """Return scale·dy + slope·(x - pivot) + level."""
    result = torch.empty_like(x)
    scale, slope, level, pivot = (part.to(x.dtype) for part in (scale, slope, level, pivot))
    for part in _blocks(x):
        torch.sub(x[part], pivot[part], out=result[part]).mul_(slope[part]).add_(level[part])
        result[part].add_(dy[part] * scale[part])
    return result


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


def _exact(x: Tensor) -> Tensor:
    """Return ``x`` in float64, where the device has it."""
    return x if x.device.type == "mps" else x.double()


def _rowwise(x: Tensor) -> bool:
    """Whether the native kernel's rows are the samples' channels."""
    return x.device.type == "cpu" and x.is_contiguous()


def _plain() -> bool:
    """Whether the formulas are wanted as plain operations."""
    return torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None
