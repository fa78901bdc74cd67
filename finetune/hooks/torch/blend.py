"""Replaced layers of a PyTorch model with a share of the BatchNorm that was there."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ....convert.equalize import affine_since
from ....errors import InputError, UnsupportedError
from ....frameworks.torch import named_layers
from ....patchers.torch.fronts import front_weights
from ....patchers.torch.patch import layers_by_name
from ....patchers.torch.sites import MARK
from ....patchers.torch.swap import FRONT, read_state
from .layers import replaced

Fronts = tuple[nn.Module, nn.Module]
"""The layer in front of a norm, in the model and in the reference."""


class Mix:
    """A replaced layer, while a frozen BatchNorm has a share in its output."""

    def __init__(self, layer: nn.Module, norm: Any, fronts: Fronts | None) -> None:
        constants = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        self._constants = [None if part is None else part.detach().clone() for part in constants]
        self._layer, self._eps = layer, norm.eps
        state = None if fronts is None else read_state(norm)
        self._affine = None
        if state is not None and fronts is not None:  # in front is what has taken a scale and a shift since
            self._affine = affine_since(state, *map(front_weights, reversed(fronts)))
        self._share = torch.zeros(())  # a tensor, which compiled code reads anew
        self._handle: RemovableHandle | None = None

    def open(self) -> None:
        """Put the BatchNorm in, with no share."""
        # First of all hooks: before the one that activates where the BatchNorm did.
        self._handle = self._layer.register_forward_hook(self._mix, prepend=True)

    def _mix(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0]
        before = self._before(x)
        return (1 - self._share) * output + self._share * before.to(output.dtype)

    def _before(self, x: Tensor) -> Tensor:
        """Return what the BatchNorm computes, of an equalized input where the layer in front has taken a scale."""
        if self._affine is not None:
            shape = [1, -1] + [1] * (x.ndim - 2)
            scale, shift = (torch.from_numpy(each).to(x).view(shape) for each in self._affine)
            return x * scale + shift
        mean, var, weight, bias = (None if part is None else part.to(x.device) for part in self._constants)
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, self._eps)

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
    found, mine = replaced(model), dict(named_layers(model))
    if not found:
        raise UnsupportedError("expected a patched model to blend, received one without replaced layers")
    with layers_by_name(reference) as known:
        norms = {name: known.get(name) for name in found}
        unfit = [n for n, norm in norms.items() if getattr(norm, "running_mean", None) is None or MARK in norm.__dict__]
        if unfit:
            raise InputError(
                "expected a reference with the BatchNorms and running statistics of the model before the patch, "
                f"received one without them at {', '.join(unfit)}"
            )
        return [Mix(layer, norms[name], _fronts(name, layer, mine, known)) for name, layer in found.items()]


def _fronts(
    name: str, layer: nn.Module, mine: Mapping[str, nn.Module], known: Mapping[str, nn.Module]
) -> Fronts | None:
    """Return the layer in front that is equalized for a norm, in the model and in the reference, None for no such."""
    front = layer.__dict__.get(FRONT)
    if front is None:
        return None
    pair = mine.get(front), known.get(front)
    weights = [getattr(each, "weight", None) for each in pair]
    if any(weight is None for weight in weights) or weights[0].shape != weights[1].shape:  # type: ignore[union-attr]
        raise InputError(
            f"expected a reference with the layer {front} that is equalized for {name}, received one without it"
        )
    return pair  # type: ignore[return-value]
