"""What a drift measurement does with a PyTorch model."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..measured_drift import See, outputs_of
from .lifting import lifted
from .sites import call, eager, inference, named_modules
from .swap import Swap


def watch(model: nn.Module, example: Any, names: Collection[str], see: See) -> dict[str, NDArray[Any]]:
    """Run ``model``, telling ``see`` of each call of the named layers, and return its outputs by name."""

    def hook(name: str) -> Any:
        return lambda module, inputs, output: see(name, _array(output))

    with lifted(model):
        modules = dict(named_modules(model))
        handles = [modules[name].register_forward_hook(hook(name)) for name in names]
        try:
            with inference(model), eager():
                return {name: _array(y) for name, y in outputs_of(call(model, example))}
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def as_original(swaps: Sequence[Swap]) -> Iterator[None]:
    """Run the body with every replacement computing what its BatchNorm computes, and nothing else changed."""
    before = [swap.module.__dict__.get("forward") for swap in swaps]
    for swap in swaps:
        swap.module.__dict__["forward"] = swap.original
    try:
        yield
    finally:
        for swap, forward in zip(swaps, before, strict=True):
            del swap.module.__dict__["forward"]
            swap.module.__dict__.update({} if forward is None else {"forward": forward})


def _array(value: Tensor) -> NDArray[Any]:
    wide = torch.promote_types(value.dtype, torch.float32)
    return value.detach().to("cpu", wide).numpy()
