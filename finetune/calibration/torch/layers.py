"""What calibration needs of a PyTorch model: its layers, what goes through them, and their parameters."""

from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ....convert.equalize import Equalized
from ....convert.gates import softmax
from ....convert.state import Array, BatchNormState
from ....convert.targets import BatchRenorm, GroupNorm, SwitchNorm
from ....errors import InputError
from ....frameworks.names import first_names
from ....frameworks.torch import call, inference, named_layers, to_numpy
from ....patchers.torch.batch_norm import is_frozen
from ....patchers.torch.equalized import absorbed
from ....patchers.torch.fronts import front_weights as front_weights  # of the contract
from ....patchers.torch.fronts import groups_of, read_front
from ....patchers.torch.sites import MARK
from ....patchers.torch.swap import FRONT, read_state
from ..contract import Solvable
from ..least_squares import WIDEST


def site_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the replaced layers by name; BatchRenorm computes the original already and is left out."""
    return {
        n: m
        for n, m in first_names(named_layers(model)).items()
        if getattr(m, MARK, BatchRenorm.kind) != BatchRenorm.kind
    }


def solvable(model: nn.Module, original: nn.Module, sites: Mapping[str, nn.Module]) -> dict[str, Solvable]:
    """Return what is known of each replaced layer; raises `InputError` where the original has no BatchNorm."""
    now, before = dict(named_layers(model)), dict(named_layers(original))
    found = {}
    for name, layer in sites.items():
        old = before[name]
        state = read_state(old) if isinstance(old, _BatchNorm) or is_frozen(old) else None
        if state is None:
            raise InputError(
                f"expected an original whose {name} is the BatchNorm that was replaced, received {type(old).__name__}"
            )
        if state.mean is None:
            continue
        gates = None
        target: GroupNorm | SwitchNorm
        if isinstance(layer, nn.GroupNorm):
            target = GroupNorm(groups=layer.num_groups)
        else:
            target = SwitchNorm(batch_statistics=layer.batch_statistics)  # type: ignore[arg-type]
            gates = softmax(layer.mean_weight.detach().double().cpu().numpy())  # type: ignore[operator]
        site = Solvable(state, target, (layer, None, None), getattr(layer, "num_groups", None), gates)
        if front := layer.__dict__.get(FRONT):
            site.layers = (layer, now[front], before[front])
            site.front, site.front_name = read_front(before[front]), front
            site.mode = "scale" if now[front].bias is None else "full"
        found[name] = site
    return found


def moments(layer: nn.Module, x: Tensor, state: BatchNormState) -> tuple[Array, Array]:
    """Return the mean and the mean square of what a BatchNorm normalizes its input to, by sample and channel."""
    rows = x.detach().float().flatten(2) if x.ndim > 2 else x.detach().float()[:, :, None]
    mean, deviation = (torch.from_numpy(each).to(rows)[:, None] for each in state.running())
    normalized = (rows - mean) / deviation
    pair = (normalized.mean(2), normalized.square_().mean(2))
    first, second = (each.double().cpu().numpy() for each in pair)
    return first, second


def spatial(layer: nn.Module, x: Tensor) -> tuple[int, ...]:
    """Return the sizes of a BatchNorm's input but batch and channels."""
    return tuple(x.shape[2:])


def write(site: Solvable, found: Equalized) -> None:
    """Give the replaced layer and the one in front these values."""
    layer, front, before = site.layers
    values = {"weight": found.gamma, "bias": found.beta}
    if front is not None:
        values |= {"running_mean": found.mean, "running_var": found.var}
    with torch.no_grad():
        for name, value in values.items():
            if (tensor := getattr(layer, name, None)) is not None:
                tensor.copy_(torch.from_numpy(value))
        if front is not None:
            old = {name: p for name, p in before._parameters.items() if p is not None}
            for name, weights in absorbed(front, old, found).items():
                front._parameters[name].copy_(weights)


def get_affine(layer: nn.Module) -> tuple[Array, Array]:
    """Return the layer's scale and shift in float64."""
    weight, bias = layer.weight, layer.bias
    return weight.detach().cpu().double().numpy(), bias.detach().cpu().double().numpy()  # type: ignore[operator]


def set_affine(layer: nn.Module, gamma: Array, beta: Array) -> None:
    """Give the layer this scale and shift."""
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(gamma))  # type: ignore[operator]
        layer.bias.copy_(torch.from_numpy(beta))  # type: ignore[operator]


def outputs(model: nn.Module, batch: Any) -> list[NDArray[Any]]:
    """Return what the model returns at inference, array by array."""
    with inference(model, compiled=False):
        return [to_numpy(y) for y in tree_leaves(call(model, batch)) if isinstance(y, Tensor) and y.is_floating_point()]


def linear_layers(model: nn.Module) -> Mapping[str, nn.Module]:
    """Return the convolutions and linear layers that can be refitted by name."""
    return {name: module for name, (module, obstacle) in _linear(model).items() if not obstacle}


def left_layers(model: nn.Module) -> Mapping[str, str]:
    """Return by name why the other convolutions and linear layers cannot be refitted."""
    return {name: obstacle for name, (_, obstacle) in _linear(model).items() if obstacle}


def _linear(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Return convolutions and linear layers by name, each with what stands in the way of refitting it, or nothing."""
    owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    kinds = (nn.Linear, _ConvNd)
    found = {n: m for n, m in first_names(named_layers(model)).items() if isinstance(m, kinds)}
    return {name: (module, _obstacle(module, owners)) for name, module in found.items()}


def _obstacle(layer: nn.Module, owners: Counter[int]) -> str:
    weight = layer._parameters.get("weight")
    parameters = list(layer.parameters(recurse=False))
    if isinstance(layer, _ConvTransposeNd):
        return "it is a transposed convolution"
    if weight is None:
        return "its weight is computed, by a parametrization or a hook"
    if any(owners[id(p)] > 1 for p in parameters):
        return "its parameters are those of another layer, too"
    if not all(p.requires_grad for p in parameters):
        return "it is frozen"
    return "" if weight[0].numel() < WIDEST else f"each of its outputs has {weight[0].numel()} inputs, too many"


def picked(layer: nn.Module, y: Tensor, count: int) -> NDArray[Any]:
    """Return some outputs (G, M, O/G) of a linear layer: for each of G groups, at ``count`` positions a sample."""
    groups, channels = groups_of(layer), y.shape[-1] if isinstance(layer, nn.Linear) else y.shape[1]
    rows = y.reshape(len(y), -1, channels) if isinstance(layer, nn.Linear) else y.flatten(2).transpose(1, 2)
    rows = rows[:, _positions(rows.shape[1], count)].reshape(-1, groups, channels // groups)
    return to_numpy(rows.transpose(0, 1))


def rows(layer: nn.Module, x: Tensor, y: Tensor, count: int) -> NDArray[Any] | None:
    """Return what the outputs that `picked` returns of y are a linear map of, (G, M, K + 1): windows, and a 1.

    A convolution's are of what its class gives the convolution itself, however it pads; None if its class gives that
    other weights than the layer's, or makes something else of what it returns.
    """
    found: Tensor | None
    if isinstance(layer, nn.Linear):
        flat = x.reshape(len(x), -1, x.shape[-1])
        found = flat[:, _positions(flat.shape[1], count)].reshape(1, -1, x.shape[-1])
    else:
        found = _windows(layer, x, y, count)
    if found is None:
        return None
    windows = to_numpy(found)
    return np.concatenate([windows, np.ones((*windows.shape[:2], 1), windows.dtype)], axis=2)


def get_weights(layer: nn.Module) -> Array:
    """Return a linear map's weights (G, K + 1, O/G) in float64, its bias or zeros as the last row."""
    groups = groups_of(layer)
    weight = layer.weight.detach().double().cpu().flatten(1).numpy()  # type: ignore[operator]
    bias = np.zeros(len(weight)) if layer.bias is None else layer.bias.detach().double().cpu().numpy()  # type: ignore[operator]
    both = np.concatenate([weight, bias[:, None]], axis=1)
    return both.reshape(groups, len(weight) // groups, -1).transpose(0, 2, 1)


def set_weights(layer: nn.Module, weights: Array) -> None:
    """Give the layer these weights, shaped as `get_weights` returns them; one without a bias ignores the last row."""
    both = torch.from_numpy(np.ascontiguousarray(weights.transpose(0, 2, 1)).reshape(-1, weights.shape[1]))
    with torch.no_grad():
        layer.weight.copy_(both[:, :-1].reshape(layer.weight.shape))  # type: ignore[operator, arg-type]
        if layer.bias is not None:
            layer.bias.copy_(both[:, -1])  # type: ignore[operator]


def _positions(size: int, count: int) -> Tensor:
    """Return up to ``count`` of ``size`` positions, the same at every call."""
    order = torch.randperm(size, generator=torch.Generator().manual_seed(size))
    return order[:count]


_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)


class _Seen(Exception):  # noqa: N818 - no error
    """Ends a forward pass of which all is known."""


class _Convolved(TorchFunctionMode):
    """Takes down what the convolution with a weight is called with, and lets it not run."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight
        self.called: dict[str, Any] = {}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in _CONVOLUTIONS:
            names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
            found = dict(zip(names, args, strict=False)) | (kwargs or {})
            if found["weight"] is self.weight:
                self.called = found
                raise _Seen
        return function(*args, **(kwargs or {}))


def _windows(layer: nn.Module, x: Tensor, y: Tensor, count: int) -> Tensor | None:
    """Return the windows (G, M, K) that a convolution sees for some of its outputs."""
    convolved = _Convolved(layer.weight)  # type: ignore[arg-type]
    with suppress(_Seen, TypeError), convolved:
        type(layer).forward(layer, x)  # whose class may take more than its input
    if not (called := convolved.called):
        return None
    padded: Tensor = called["input"]
    kernel = called["weight"].shape[2:]
    stride, dilation, padding = (
        _each(called.get(name, default), len(kernel))
        for name, default in (("stride", 1), ("dilation", 1), ("padding", 0))
    )
    if isinstance(called.get("padding"), str):
        wide = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        sides = [(w // 2, w - w // 2) for w in wide] if called["padding"] == "same" else [(0, 0)] * len(kernel)
    else:
        sides = [(p, p) for p in padding]
    if any(side for pair in sides for side in pair):
        padded = F.pad(padded, [side for pair in reversed(sides) for side in pair])
    for axis, (size, step, apart) in enumerate(zip(kernel, stride, dilation, strict=True), 2):
        padded = padded.unfold(axis, apart * (size - 1) + 1, step)[..., ::apart]
    if padded.shape[2 : y.ndim] != y.shape[2:]:
        return None
    chosen = _positions(int(np.prod(y.shape[2:])), count)
    where = torch.from_numpy(np.stack(np.unravel_index(chosen.numpy(), y.shape[2:])))
    found = padded[(slice(None), slice(None), *where)]  # (N, C, M, *kernel)
    groups = groups_of(layer)
    found = found.transpose(1, 2).reshape(len(x) * len(chosen), groups, -1)
    return found.transpose(0, 1)


def _each(value: Any, count: int) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,) * count
