"""What the hooks do to a PyTorch model."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ....errors import InputError, UnsupportedError
from ....frameworks.torch import named_layers as named_modules
from ....layers.torch.batch_renorm import _BatchRenorm
from ....layers.torch.norm import RunningNorm
from ....patchers.torch.sites import MARK
from .learning import Learning
from .statistics import moving_layers, update_statistics

__all__ = [
    "Gates",
    "Learning",
    "blend",
    "layers",
    "moving_layers",
    "replaced",
    "scale_momentum",
    "set_limits",
    "update_statistics",
]


class Gates:
    """The gates of every SN of a model, while a schedule holds and tempers them."""

    def __init__(self, model: nn.Module, *, held: bool, tempered: bool) -> None:
        self.layers: list[Any] = [module for module in model.modules() if hasattr(module, "harden")]
        logits = [gates for layer in self.layers for gates in (layer.mean_weight, layer.var_weight)]
        self._held = held
        learning = [gates for gates in logits if held and gates.requires_grad]
        self._handles = [gates.register_hook(self._pass) for gates in learning]
        self._handles += [gates.register_post_accumulate_grad_hook(self._drop) for gates in learning]
        self._temperatures: dict[Any, Tensor] = {}
        for layer in self.layers if tempered else ():
            if layer.temperature == 0:  # in a tensor it has to be above
                layer.harden()
                layer.temperature = 1.0
            layer.temperature = torch.tensor(float(layer.temperature))  # a tensor, which compiled code reads anew
            self._temperatures[layer] = layer.temperature

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
        for each in self._temperatures.values():
            each.fill_(temperature)

    def fold(self) -> None:
        """Leave the temperature in the logits, which changes no gate."""
        for layer, temperature in self._temperatures.items():
            with torch.no_grad():
                layer.mean_weight.div_(temperature)
                layer.var_weight.div_(temperature)
            temperature.fill_(1.0)

    def close(self) -> None:
        """Leave plain gates of the same values."""
        for handle in self._handles:
            handle.remove()
        self.fold()
        while self._temperatures:
            self._temperatures.popitem()[0].temperature = 1.0


class _Mix:
    """A forward hook that mixes a frozen BatchNorm into a layer's output."""

    def __init__(self, layer: nn.Module, norm: Any) -> None:
        constants = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        self._constants = [None if part is None else part.detach().clone() for part in constants]
        self._eps = norm.eps
        self._share = torch.ones(())  # a tensor, which compiled code reads anew
        # First of all hooks: before the one that activates where the BatchNorm did.
        self._handle = layer.register_forward_hook(self._mix, prepend=True)

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
        self._handle.remove()


def blend(model: nn.Module, reference: nn.Module) -> list[_Mix]:
    """Return what mixes the reference's BatchNorm into each replaced layer, in the order of the model."""
    found, known = replaced(model), dict(named_modules(reference))
    if not found:
        raise UnsupportedError("expected a patched model to blend, received one without replaced layers")
    norms = {name: known.get(name) for name in found}
    unfit = [name for name, norm in norms.items() if getattr(norm, "running_mean", None) is None or _is_replaced(norm)]
    if unfit:
        raise InputError(
            "expected a reference with the BatchNorms and running statistics of the model before the patch, "
            f"received one without them at {', '.join(unfit)}"
        )
    return [_Mix(layer, norms[name]) for name, layer in found.items()]


def layers(model: nn.Module) -> Iterator[nn.Module]:
    """Return every module of ``model`` once."""
    return model.modules()


def set_limits(renorms: Iterable[Any], r_max: float, d_max: float) -> None:
    """Set the limits of every BRN."""
    for layer in renorms:
        layer.set_limits(r_max, d_max)


def replaced(model: nn.Module) -> dict[str, nn.Module]:
    """Return the replaced layers, each by the first of its names."""
    found: dict[int, tuple[str, nn.Module]] = {}
    for name, module in named_modules(model):
        if _is_replaced(module):
            found.setdefault(id(module), (name, module))
    return dict(found.values())


def _is_replaced(module: Any) -> bool:
    return MARK in module.__dict__


def scale_momentum(model: nn.Module, share: float, renorm: float) -> Callable[[], None]:
    """Let a batch weigh as the ``share`` of one in all moving statistics, and return what undoes it.

    In those of BRN one weighs ``renorm`` at most.
    """
    found = [module for module in model.modules() if isinstance(module, RunningNorm | _BatchNorm)]
    kept = [(module, module.momentum) for module in found if module.momentum is not None]
    for module, momentum in kept:
        if isinstance(module, _BatchRenorm):
            momentum = min(momentum, renorm)
        of_the_old = getattr(module, "compat", None) is not None
        module.momentum = momentum**share if of_the_old else 1 - (1 - momentum) ** share

    def undo() -> None:
        for module, momentum in kept:
            module.momentum = momentum

    return undo
