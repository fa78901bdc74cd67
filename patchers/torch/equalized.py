"""The linear layer in front of a replaced norm, with a scale and a shift absorbed, and the way back."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...convert.equalize import Equalized
from .fronts import scaled


class Absorbed:
    """What one linear layer takes for the norm behind it.

    The weight stays the `Parameter` it is and takes other values. A bias that the layer lacks, where ``mode`` is
    "full", is a new one.
    """

    def __init__(self, name: str, layer: nn.Module, mode: str | None) -> None:
        self.name, self.layer = name, layer
        self.adds_bias = mode == "full" and layer._parameters.get("bias") is None
        self.bias: nn.Parameter | None = None
        self.old = {
            name: p.detach().clone() for name in ("weight", "bias") if (p := layer._parameters.get(name)) is not None
        }

    def apply(self, found: Equalized | None) -> None:
        """Absorb what equalizing found; without it only make room for a bias."""
        weight = self.layer._parameters["weight"]
        assert weight is not None
        if self.adds_bias and self.layer._parameters.get("bias") is None:
            channels = weight.shape[0] if found is None else found.scale.size
            self.layer._parameters["bias"] = nn.Parameter(
                weight.new_zeros(channels), requires_grad=weight.requires_grad
            )
        if found is not None:
            values = absorbed(self.layer, self.old, found)
            with torch.no_grad():
                for name, value in values.items():
                    self.layer._parameters[name].copy_(value)  # type: ignore[union-attr]
        self.written = self.values()

    def trained(self) -> bool:
        """Return whether the layer has changed since."""
        return not all(torch.equal(value, self.written[name].to(value)) for name, value in self.values().items())

    def restore(self) -> None:
        """Give the layer back what it had."""
        with torch.no_grad():
            for name, value in self.old.items():
                self.layer._parameters[name].copy_(value)  # type: ignore[union-attr]
        if self.adds_bias:
            self.layer._parameters["bias"] = None

    def values(self) -> dict[str, Tensor]:
        """Return a copy of what the layer has now."""
        found = {name: self.layer._parameters.get(name) for name in ("weight", "bias")}
        return {name: p.detach().clone() for name, p in found.items() if p is not None and not p.is_meta}


def absorbed(layer: nn.Module, old: Mapping[str, Tensor], found: Equalized) -> dict[str, Tensor]:
    """Return the weight and, where there is one, the bias of ``layer`` that had ``old`` ones, in float64."""
    weight = old["weight"].detach().double()
    values = {"weight": scaled(layer, weight, torch.from_numpy(found.factor).to(weight))}
    if layer._parameters.get("bias") is not None:
        bias = old.get("bias")
        before: Any = None if bias is None else bias.detach().double().cpu().numpy()
        values["bias"] = torch.from_numpy(found.absorbed(before))
    return values
