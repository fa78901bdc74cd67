"""Find the linear layer in front of each BatchNorm, by what a forward pass does with its output.

A convolution, transposed convolution or linear layer is in front of a BatchNorm if its output reaches the BatchNorm as
it is, or reshaped with its channels kept, and nothing else reads it. Everything that is computed is seen as PyTorch's
dispatcher sees it, in whoever's code it is.
"""

import gc
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from ...convert.equalize import Front, by_groups
from ...convert.state import Array
from .linears import kept_calls
from .lines import Lines, constants_of

Linear = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d | nn.Linear
_KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

_aten = torch.ops.aten
_MOVES = {
    *(_aten.view.default, _aten._unsafe_view.default, _aten.alias.default, _aten.detach.default),
    *(_aten.permute.default, _aten.transpose.int, _aten.t.default, _aten.unsqueeze.default, _aten.clone.default),
    *(_aten.squeeze.default, _aten.squeeze.dim, _aten.squeeze.dims, _aten._reshape_alias.default),
}
"""What only moves values about; whether the channels stay together is seen by moving their numbers."""

TOLERANCE = 0.05
"""How far, as a share of its largest value, an output may be from a line of what it was, if a layer rounds to half."""


class Fronts:
    """What a forward pass shows of the linear layers of a model and of who reads their outputs.

    ``layers`` and ``sites`` are modules by key, and ``kept`` says of sites that read a call in a graph why that is no
    layer. `watching` surrounds the pass, `returned` takes what it returned, and `of` tells what is in front of a site.
    """

    def __init__(self, modules: Mapping[int, nn.Module], sites: Mapping[int, nn.Module]) -> None:
        self.sites = sites
        self.layers = {key: module for key, module in modules.items() if isinstance(module, _KINDS)}
        owners = Counter(id(p) for m in modules.values() for p in m._parameters.values() if p is not None)
        self.obstacles = {key: _obstacle(layer, owners) for key, layer in self.layers.items()}
        self.owned = {
            id(p): key for key, layer in self.layers.items() for p in layer._parameters.values() if p is not None
        }
        self.sources: Any = WeakIdKeyDictionary()  # tensor: (layer, the axis of its channels)
        self.calls: Counter[int] = Counter()
        self.read_by: dict[int, int] = {}
        self.fed_by: dict[int, int | None] = {}
        self.within: list[int] = []
        self.lines = Lines(constants_of([*modules.values()]), _MOVES)
        self.kept = {
            id(module.get_submodule(name)): reason
            for module in modules.values()
            for name, reason in kept_calls(module).items()
        }

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch what is computed in the body."""
        with ExitStack() as stack:
            for key, module in {**self.layers, **self.sites}.items():
                is_site = key in self.sites
                before, after = (self._reads, self._has_read) if is_site else (self._enters, self._leaves)
                stack.callback(module.register_forward_pre_hook(_keyed(before, key), with_kwargs=True).remove)
                hook = module.register_forward_hook(_keyed(after, key), prepend=True, with_kwargs=True)
                stack.callback(hook.remove)
            stack.enter_context(_Watch(self))
            yield

    def returned(self, outputs: Any) -> None:
        """Take what the model returned; what of its layers' outputs is alive once that is gone is kept by somebody."""
        self.lines.returned(outputs)
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, Tensor) and tensor in self.sources:
                self._refuse(self.sources[tensor][0], "its output is one of the model's")

    def ended(self) -> None:
        """Look who has kept an output of a layer, now that the pass and its outputs are gone."""
        if self.sources:
            gc.collect()  # of frames that are looked into some outlive their calls
        for key, _ in list(self.sources.values()):
            self._refuse(key, "its output is kept by code of the model")

    def of(self, key: int, names: Mapping[int, str]) -> dict[str, Any]:
        """Return what a `Site` is to know of the layer in front of it; ``names`` are those of all modules."""
        return {"goes_in": self.lines.end_at(key), **self._front(key, names)}

    def _front(self, key: int, names: Mapping[int, str]) -> dict[str, Any]:
        front = self.fed_by.get(key)
        if key not in self.fed_by:
            return {"unequal": "it did not run on the example"}
        if self.calls[key] > 1:
            return {"unequal": "it runs several times"}
        if front is None:
            return {"unequal": self.kept.get(key, "no linear layer in front")}
        layer, name = self.layers[front], names[front]
        if obstacle := self.obstacles[front]:
            return {"unequal": f"{name}: {obstacle}"}
        return {"front": name, "front_biased": layer.bias is not None, "unequal": ""}

    def note(self, function: Any, arguments: Any, output: Any) -> None:
        """Take down who reads what in one operation."""
        self.lines.note(function, arguments, output, _moved, within=any(key in self.sites for key in self.within))
        for tensor in tree_leaves(arguments):
            if not isinstance(tensor, Tensor):
                continue
            owner = self.owned.get(id(tensor))
            if owner is not None and owner not in self.within:
                self._refuse(owner, f"its parameters are read elsewhere, by {function}")
            found = self.sources.get(tensor)
            if found is None or self.read_by.get(found[0]) in self.within:
                continue
            axis = _moved(function, arguments, tensor, found[1], output) if function in _MOVES else None
            if axis is None:
                self._refuse(found[0], f"its output is also read by {function}")
            else:
                self.sources[output] = (found[0], axis)

    def _enters(self, key: int, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.within.append(key)

    def _leaves(self, key: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.calls[key] += 1
        if not isinstance(output, Tensor):
            self._refuse(key, "it does not return a tensor")
        else:
            if self.calls[key] > 1:
                self._refuse(key, "it runs several times")
            if not self.obstacles[key]:
                with self.lines.resting():  # what is tried here no file has
                    self.obstacles[key] = _tried(module, args, kwargs, output)
            self.sources[output] = (key, _axis(module, output))
        self.within.remove(key)

    def _reads(self, key: int, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.calls[key] += 1
        x = args[0] if args else next(iter(kwargs.values()), None)
        self.lines.reads(key, x)
        front, axis = self.sources.get(x, (None, None)) if isinstance(x, Tensor) else (None, None)
        self.fed_by[key] = front if axis == 1 else None
        if front is not None:
            if axis != 1:
                self._refuse(front, "its channels are not those of the norm")
            if front in self.read_by:
                self._refuse(front, "several norms read its output")
            self.read_by[front] = key
        self.within.append(key)

    def _has_read(self, key: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.within.remove(key)

    def _refuse(self, key: int, reason: str) -> None:
        self.obstacles[key] = self.obstacles[key] or reason


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tells of every operation, of one with functions for arguments (`torch.cond`) as a whole."""

    supports_higher_order_operators = True

    def __init__(self, fronts: Fronts) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fronts = fronts

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        self.fronts.note(function, (args, kwargs), output)
        return output


def _keyed(function: Any, key: int) -> Any:
    return lambda *arguments: function(key, *arguments)


def _obstacle(layer: nn.Module, owners: Counter[int]) -> str:
    """Return why a layer's weights cannot take a factor, as far as the layer tells."""
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    if weight is None or "parametrizations" in layer._modules:
        return "its weight is computed, by a parametrization or a hook"
    if weight.is_meta or not weight.is_floating_point():
        return "its weight holds no values to change"
    if "bias" not in layer._parameters:
        return "its bias is computed, by a parametrization or a hook"
    if any(owners[id(p)] > 1 for p in (weight, bias) if p is not None):
        return "its parameters are those of another layer, too"
    if not all(p.requires_grad for p in (weight, bias) if p is not None):
        return "it is frozen"
    if layer._forward_pre_hooks or layer._forward_hooks or layer._backward_hooks:
        return "hooks watch it"
    return ""


def _tried(layer: nn.Module, args: Any, kwargs: Any, output: Tensor) -> str:
    """Return what is wrong with a layer whose output does not follow its weights and bias, channel by channel.

    It is tried in float32 where it computes in less, so that roundings do not pass for what it does.
    """
    axis = _axis(layer, output)
    channels = output.shape[axis]
    if not output.numel():
        return "it returned nothing on the example"
    kept = {name: layer._parameters[name] for name in ("weight", "bias")}
    weight, bias = (None if p is None else _widened(p.detach()) for p in kept.values())
    assert weight is not None
    args, kwargs = tree_map(_widened, (args, kwargs))

    def run(weight: Tensor, bias: Tensor | None) -> Tensor:
        layer._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        layer._parameters["bias"] = None if bias is None else nn.Parameter(bias, requires_grad=False)
        with torch.autocast(weight.device.type, enabled=False):
            found: Tensor = type(layer).forward(layer, *args, **kwargs)
        return found

    try:
        if torch.finfo(output.dtype).bits < 32:
            output = run(weight, bias)
        factor = torch.tensor([-2.0, 0.5, -1.0, 4.0]).repeat(-(-channels // 4))[:channels].to(weight)
        shift = torch.linspace(-1, 1, channels).to(weight) * output.abs().amax().to(weight).clamp(min=1e-3)
        found = run(scaled(layer, weight, factor), shift if bias is None else bias * factor + shift)
    except Exception as error:
        return f"it fails with other weights ({error})"
    finally:
        layer._parameters.update(kept)
    shape = [1] * output.ndim
    shape[axis] = channels
    wanted = output * factor.view(shape) + shift.view(shape)
    tolerance = min(100 * torch.finfo(output.dtype).eps, TOLERANCE) * float(wanted.abs().amax())
    if found.shape != wanted.shape or not bool((found - wanted).abs().amax() <= tolerance):
        return "its output is no linear function of its weights and bias, as with weights that are standardized"
    return ""


def _widened(value: Any) -> Any:
    """Return a tensor of floats of less than 32 bits in float32, and anything else as it is."""
    half = isinstance(value, Tensor) and value.is_floating_point() and torch.finfo(value.dtype).bits < 32
    return value.float() if half else value


def scaled(layer: nn.Module, weight: Tensor, factor: Tensor) -> Tensor:
    """Return the weights of a linear layer with each output channel times a factor, (C,)."""
    if not isinstance(layer, _TRANSPOSED):
        return weight * factor.view(-1, *[1] * (weight.ndim - 1))
    inputs, outputs = weight.shape[:2]
    groups = int(layer.groups)
    grouped = weight.view(groups, inputs // groups, outputs, -1)
    return (grouped * factor.view(groups, 1, outputs, 1)).view(weight.shape)


def channels_of(layer: nn.Module) -> int:
    """Return the number of a linear layer's output channels."""
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)  # type: ignore[arg-type]


def groups_of(layer: nn.Module) -> int:
    """Return in how many groups a linear layer's outputs read other inputs."""
    return 1 if isinstance(layer, nn.Linear) else int(layer.groups)  # type: ignore[arg-type]


def by_channel(layer: nn.Module, weight: Tensor) -> Array:
    """Return weights of a linear layer as (C, inputs of each, positions of the kernel), in float64."""
    weight = weight.detach().double().cpu()
    if isinstance(layer, _TRANSPOSED):
        groups, (inputs, outputs) = groups_of(layer), weight.shape[:2]
        weight = weight.view(groups, inputs // groups, outputs, -1).transpose(1, 2)
        weight = weight.reshape(groups * outputs, inputs // groups, -1)
    return weight.reshape(weight.shape[0], weight.shape[1], -1).numpy()


def front_weights(layer: nn.Module) -> tuple[Array, Array | None]:
    """Return the weights (C, K) of a layer in front, a row for each output channel, and its bias, in float64."""
    weight = by_channel(layer, layer.weight)  # type: ignore[arg-type]
    bias = None if layer.bias is None else layer.bias.detach().double().cpu().numpy()  # type: ignore[operator]
    return weight.reshape(len(weight), -1), bias


def read_front(layer: nn.Module, state: Mapping[str, Tensor | None] | None = None) -> Front:
    """Return what equalizing needs of a linear layer, or of such weights as it might have."""
    values = layer._parameters if state is None else state
    bias = values.get("bias")
    weight = by_channel(layer, values["weight"])  # type: ignore[arg-type]
    return Front(
        gain=by_groups(weight.sum(axis=2), groups_of(layer)),
        norms=np.sqrt(np.square(weight).sum(axis=(1, 2))),
        bias=None if bias is None else bias.detach().double().cpu().numpy(),
    )


def _axis(layer: nn.Module, output: Tensor) -> int:
    """Return where a linear layer's output has its channels."""
    if isinstance(layer, nn.Linear):
        return output.ndim - 1
    return output.ndim - 1 - len(layer.kernel_size)  # type: ignore[arg-type]


def _moved(function: Any, arguments: Any, tensor: Tensor, axis: int, output: Any) -> int | None:
    """Return where the channels of ``tensor`` are after they have been moved, None if they are not together."""
    if not isinstance(output, Tensor) or output.dtype != tensor.dtype:
        return None
    shape = [1] * tensor.ndim
    shape[axis] = -1
    numbers = torch.arange(tensor.shape[axis], device=tensor.device).view(shape).expand(tensor.shape).contiguous()
    if tensor.stride() != numbers.stride():
        numbers = torch.empty_like(tensor, dtype=numbers.dtype).copy_(numbers)
    args, kwargs = arguments
    moved = function(*[numbers if each is tensor else each for each in args], **kwargs)
    for place, size in enumerate(moved.shape):
        if size == tensor.shape[axis]:
            shape = [1] * moved.ndim
            shape[place] = -1
            if bool((moved == torch.arange(size, device=moved.device).view(shape)).all()):
                return place
    return None
