"""The gates of a PyTorch model, held and tempered."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class Gates:
    """The gates of every SN of a model, while a schedule holds and tempers them."""

    def __init__(self, model: nn.Module, *, held: bool, tempered: bool) -> None:
        self.layers: list[Any] = [module for module in model.modules() if hasattr(module, "harden")]
        self._holds, self._tempers = held, tempered
        self._held = False
        self._handles: list[RemovableHandle] = []

    def open(self) -> None:
        """Let the gates be held and tempered; what they compute stays."""
        self._held = False
        logits = [gates for layer in self.layers for gates in (layer.mean_weight, layer.var_weight)]
        for gates in logits if self._holds else ():
            if gates.requires_grad:
                self._handles.append(gates.register_hook(self._pass))
                self._handles.append(gates.register_post_accumulate_grad_hook(self._drop))
        for layer in self._tempered():
            if layer.temperature == 0:
                layer.harden()
                layer.temperature = 1.0

    def _tempered(self) -> list[Any]:
        return self.layers if self._tempers else []

    def _pass(self, gradient: Tensor) -> Tensor:
        return torch.zeros_like(gradient) if self._held else gradient

    def _drop(self, gates: Tensor) -> None:
        if self._held:
            gates.grad = None  # so that the optimizer passes them over, unless DistributedDataParallel writes its zeros

    def hold(self, held: bool) -> None:
        """Let gradients reach the gates, or not."""
        self._held = held

    def temper(self, temperature: float) -> None:
        """Set the temperature."""
        for layer in self._tempered():
            layer.temperature = temperature

    def fold(self) -> None:
        """Leave the temperature in the logits, which changes no gate."""
        for layer in self._tempered():
            with torch.no_grad():
                layer.mean_weight.div_(layer.temperature)
                layer.var_weight.div_(layer.temperature)
            layer.temperature = 1.0

    def close(self) -> None:
        """Leave plain gates of the same values."""
        while self._handles:
            self._handles.pop().remove()
        self.fold()
