"""What calibration needs of a PyTorch model: its replaced layers, their outputs, their scale and shift."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..convert.targets import BatchRenorm
from ..patchers.torch import MARK, call, inference

Array = NDArray[np.float64]


class _PassEnded(Exception):  # noqa: N818
    """Raised to leave a forward pass once its last wanted layer has run."""


def site_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the replaced layers by name; BatchRenorm computes the original already and is left out."""
    return {n: m for n, m in model.named_modules() if getattr(m, MARK, BatchRenorm.kind) != BatchRenorm.kind}


def observe(model: nn.Module, names: Sequence[str], batch: Any, see: Callable[[str, NDArray[Any]], bool]) -> None:
    """Run ``model`` on one batch and tell ``see(name, output)`` of each call of the named layers, channels last.

    If ``see`` returns True, the forward pass ends there.
    """

    def note(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if see(name, output.detach().movedim(1, -1).cpu().numpy()):
                raise _PassEnded

        return hook

    handles = [model.get_submodule(name).register_forward_hook(note(name)) for name in names]
    try:
        with inference(model):
            call(model, batch)
    except _PassEnded:
        pass
    finally:
        for handle in handles:
            handle.remove()


def get_affine(layer: nn.Module) -> tuple[Array, Array]:
    """Return the layer's scale and shift in float64."""
    weight, bias = layer.weight, layer.bias
    return weight.detach().double().cpu().numpy(), bias.detach().double().cpu().numpy()  # type: ignore[operator]


def set_affine(layer: nn.Module, gamma: Array, beta: Array) -> None:
    """Give the layer this scale and shift."""
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(gamma))  # type: ignore[operator]
        layer.bias.copy_(torch.from_numpy(beta))  # type: ignore[operator]
