"""Replaced layers of a PyTorch model with a share of the BatchNorm that was there."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ....errors import InputError, UnsupportedError
from ....frameworks.torch import named_layers
from ....patchers.torch.sites import MARK
from .layers import replaced


class Mix:
    """A replaced layer, while a frozen BatchNorm has a share in its output."""

    def __init__(self, layer: nn.Module, norm: Any) -> None:
        constants = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        self._constants = [None if part is None else part.detach().clone() for part in constants]
        self._layer, self._eps = layer, norm.eps
        self._share = torch.zeros(())  # a tensor, which compiled code reads anew
        self._handle: RemovableHandle | None = None

    def open(self) -> None:
        """Put the BatchNorm in, with no share."""
        # First of all hooks: before the one that activates where the BatchNorm did.
        self._handle = self._layer.register_forward_hook(self._mix, prepend=True)

    def _mix(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0]
        mean, var, weight, bias = (None if part is None else part.to(x.device) for part in self._constants)
        before = F.batch_norm(x, mean, var, weight, bias, False, 0.0, self._eps)
        return (1 - self._share) * output + self._share * before.to(output.dtype)

    def set(self, share: float) -> None:
        """Set the BatchNorm's share."""
        self._share.fill_(share)

    def close(self) -> None:
        """Take the BatchNorm out."""
        self.set(0.0)
        if self._handle is not None:
            self._handle.remove()


def blend(model: nn.Module, reference: nn.Module) -> list[Mix]:
    """Return every replaced layer with the reference's BatchNorm to mix in, in the order of the model.

    Raises `UnsupportedError` for a model without replaced layers, `InputError` for a reference without the BatchNorms.
    """
    found, known = replaced(model), dict(named_layers(reference))
    if not found:
        raise UnsupportedError("expected a patched model to blend, received one without replaced layers")
    norms = {name: known.get(name) for name in found}
    unfit = [n for n, norm in norms.items() if getattr(norm, "running_mean", None) is None or MARK in norm.__dict__]
    if unfit:
        raise InputError(
            "expected a reference with the BatchNorms and running statistics of the model before the patch, "
            f"received one without them at {', '.join(unfit)}"
        )
    return [Mix(layer, norms[name]) for name, layer in found.items()]
