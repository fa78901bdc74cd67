"""A normalization on a CPU with no Python between the passes over its data: kernels, and the layer's formula compiled.

It computes what `normalize` does with the same layer's ``mix``, which is slower on small maps. A formula is asked for
what it makes of the moments, arrays (N, C) in float64, and later for the gradients.
"""

from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .normalize import refuse_derivative, wide
from .passes import Array, Memory, compiled, dense, kernels
from .watchers import watched

_NOTHING = np.empty(0, np.float32)
_DTYPES = torch.float32, torch.float64


class Formula(Protocol):
    """A layer's formula for one call."""

    def forward(self, mean: Array, var: Array, pivot: Array, scale: Array, offset: Array) -> None:
        """Write y = (x - pivot)·scale + offset, and keep what the gradients need."""

    def backward(self, product: Array, total: Array, pivot: Array, slope: Array, level: Array) -> list[Array]:
        """Write dx = scale·dy + slope·(x - pivot) + level, and return the gradients of the parameters.

        ``product`` and ``total`` are the sums of dy·(x - pivot) and of dy, and may be overwritten.
        """


def takes(x: Tensor, *tensors: Tensor | None) -> bool:
    """Whether ``x`` can go through kernels with a compiled formula on ``tensors``: a map on a CPU, which none watch."""
    return (
        not watched(x, *tensors)
        and x.dim() > 2
        and compiled(x)
        and all(t is None or (t.dtype in _DTYPES and t.is_cpu and t.is_contiguous()) for t in tensors)
    )


@cache
def formulas() -> Any:
    """Return the module of the compiled formulas, which is there where `takes` says so."""
    from . import formulas as module

    return module


def array(tensor: Tensor | None) -> Array:
    """Return a parameter or buffer as the array that it is, an empty one for None."""
    return _NOTHING if tensor is None else tensor.detach().numpy()


def switched(x: Tensor, *constant: Any) -> Tensor:
    """Return Switchable Normalization by constant batch statistics, each sample at once; no gradient is to come."""
    values = dense(wide(x))
    y = torch.empty_like(values)
    memory = Memory(values)
    memory.run(formulas().SWITCH, *(memory.data(each, by_sample=True) for each in (values, y)), *constant)
    return y.to(x.dtype)


class Normalize(torch.autograd.Function):
    """The passes and the formula: ``Normalize.apply(x, formula, *parameters)``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, formula: Formula, *parameters: Tensor | None) -> Tensor:
        """Return the normalized ``x``."""
        values = dense(wide(x))
        y = torch.empty_like(values)
        memory = Memory(values)
        data, shape = memory.data(values), (memory.samples, memory.channels)
        mean, var = np.empty(shape), np.empty(shape)
        pivot, scale, offset = np.empty((3, *shape), memory.dtype)
        memory.run(kernels().MOMENTS, data, memory.small(mean), memory.small(var))
        formula.forward(mean, var, pivot, scale, offset)
        memory.run(kernels().AFFINE, data, memory.data(y), *map(memory.small, (pivot, scale, offset)))
        ctx.save_for_backward(x, *parameters)
        ctx.formula, ctx.pivot, ctx.scale = formula, pivot, scale
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients; raises `RuntimeError` for what asks for more than one of them."""
        refuse_derivative(dy)
        x, *parameters = ctx.saved_tensors
        values, dy = dense(wide(x)), wide(dy)
        memory = Memory(values)
        data, slopes, shape = memory.data(values), memory.data(dy), (memory.samples, memory.channels)
        product, total = np.empty(shape), np.empty(shape)
        slope, level = np.empty((2, *shape), memory.dtype)
        memory.run(kernels().PRODUCTS, slopes, data, *map(memory.small, (ctx.pivot, product, total)))
        gradients = ctx.formula.backward(product, total, ctx.pivot, slope, level)
        d_parameters = [
            torch.from_numpy(gradient).to(p.dtype) if needed else None
            for p, gradient, needed in zip(parameters, gradients, ctx.needs_input_grad[2:], strict=True)
        ]
        if not ctx.needs_input_grad[0]:
            return None, None, *d_parameters
        dx = torch.empty_like(values)
        small = map(memory.small, (ctx.pivot, ctx.scale, slope, level))
        memory.run(kernels().COMBINE, slopes, data, memory.data(dx), *small)
        return dx.to(x.dtype), None, *d_parameters
