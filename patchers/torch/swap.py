"""One BatchNorm module turned into its replacement, in place and reversibly.

The object stays and only its class and contents change (as torch's own lazy modules do), so every alias, hook,
plain-list reference and optimizer that points at it or at its parameters keeps working.
"""

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...convert.carry_over import carry_over
from ...convert.equalize import Equalized, equalize
from ...convert.state import Array, BatchNormState
from ...convert.targets import BatchRenorm, GroupNorm, SwitchNorm, Target
from ...errors import InputError
from ...frameworks.torch import named_layers
from ...layers import torch as layers
from ...layers.torch.group_norm import guard
from ..plan import Decision, Site
from ..swap import become
from .batch_norm import added_by, channels_of, epsilon_of, rank_of
from .equalized import Absorbed, absorbed
from .fronts import read_front
from .sites import MARK
from .subclasses import After, nothing_more

_SWITCH_NORMS = {1: layers.SwitchNorm1d, 2: layers.SwitchNorm2d, 3: layers.SwitchNorm3d}
_BATCH_RENORMS = {1: layers.BatchRenorm1d, 2: layers.BatchRenorm2d, 3: layers.BatchRenorm3d}
_AFFINE = ("weight", "bias")
_STATISTICS = ("running_mean", "running_var")
_TENSORS = {*_AFFINE, *_STATISTICS, "num_batches_tracked"}
_CONTENTS = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
_HOOKS_AND_MODE = frozenset(nn.Module().__dict__) - set(_CONTENTS)
_SETTINGS = {"num_features", "eps", "momentum", "affine", "track_running_stats", "process_group"}
FRONT = "_normswap_front"
"""Attribute of a replaced module that holds the name of the layer in front that is equalized for it."""

_SINCE_BATCH_NORM = {"mean_weight", "var_weight", "r_max", "d_max"}


class Swap:
    """One site's replacement, ready to be put in place of the BatchNorm and taken out again.

    ``owners`` counts by id in how many modules each parameter is: one that is tied to another module cannot take two
    values, so the replacement gets one of its own. ``like`` is a tensor of the model, for the device and dtype of a
    BatchNorm that holds none. ``front`` is the layer in front, if that takes a scale, and ``above`` the
    module that holds both, with what it does to a BatchNorm network's state.
    """

    compared = True

    def __init__(
        self,
        module: nn.Module,
        decision: Decision,
        owners: Counter[int],
        like: Tensor | None,
        front: nn.Module | None = None,
        above: "tuple[nn.Module, _FrontFromBatchNorm] | None" = None,
        solve: bool = True,
    ) -> None:
        site, target = decision.site, decision.target
        assert target is not None
        self.name, self.module, self.kind = site.name, module, target.kind
        self.old_class, self.old_contents = type(module), _shallow(module.__dict__)
        self.after = added_by(module)
        self.above = above
        self.front = None if front is None else Absorbed(decision.front, front, decision.mode)
        self.loaded = _FromBatchNorm(target, site.spatial, decision.front)
        self.found: Equalized | None = None
        if front is not None and not any(tensor.is_meta for tensor in _own_tensors(module)):
            with _naming(self.name):
                self.found = _equalized(read_state(module), target, decision, front, solve)
        self.handles: list[Any] = []
        affine = {name: tensor for name in _AFFINE if (tensor := getattr(module, name, None)) is not None}
        self.affine = {name: tensor.detach() for name, tensor in affine.items()}
        learns = not affine or any(tensor.requires_grad for tensor in affine.values())
        like = next(_own_tensors(module), like)
        with _naming(self.name), torch.no_grad():
            self.new = _build(module, target, site, like)
            self.home = None if like is None else (like.device, like.dtype)
            self.values: list[tuple[nn.Parameter, Tensor, Tensor]] = []  # what to write where, and what was there
            for name, value in self._start(module, target, site).items():
                own = module._parameters.get(name)
                if own is not None and owners[id(own)] == 1:
                    self.affine[name] = own.detach().clone()
                    self.values.append((own, value, self.affine[name]))
                    self.new._parameters[name] = own
                else:
                    old, parameter = affine.get(name), self.new._parameters[name]
                    assert parameter is not None
                    parameter.copy_(value)
                    parameter.requires_grad_(learns if old is None else old.requires_grad)

    def _start(self, module: nn.Module, target: Target, site: Site) -> dict[str, Tensor]:
        """Return the parameters that are to be written, by name, and give SN the running statistics it is to have."""
        if self.found is None:
            return _carried(module, self.new, target, site)
        for name, value in _statistics(self.found).items():
            if (buffer := self.new._buffers.get(name)) is not None:
                self.new._buffers[name] = torch.from_numpy(value).to(buffer)
        return _parameters(self.found)

    def apply(self) -> None:
        """Put the replacement in place."""
        if self.front is not None:
            self.front.apply(self.found)
        with torch.no_grad():
            for parameter, value, _ in self.values:
                parameter.copy_(value)
        become(self.module, type(self.new), self._contents())
        hook = self.module.register_load_state_dict_pre_hook(self.loaded)  # type: ignore[no-untyped-call]
        self.handles.append(hook)
        if self.above is not None:
            holder, loaded = self.above
            hook = holder.register_load_state_dict_pre_hook(loaded)  # type: ignore[no-untyped-call]
            self.handles.append(hook)
        if self.after is not nothing_more:
            self.handles.append(self.module.register_forward_hook(_Then(self.after), prepend=True))
        if isinstance(self.module, nn.GroupNorm):
            self.handles.append(guard(self.module))
        if self.kind != BatchRenorm.kind:  # which computes what the BatchNorm with its parameters computes
            self.written = {name: tensor.detach().clone() for name, tensor in self._tensors()}

    def accept(self, found: Equalized | None) -> None:
        """Take what the replacement is now for what it was given, by a calibration that found this."""
        if self.front is not None:
            self.found = found or self.found
            self.front.written = self.front.values()
        if self.kind != BatchRenorm.kind:
            self.written = {name: tensor.detach().clone() for name, tensor in self._tensors()}

    def trained(self) -> bool:
        """Return whether the replacement has changed since into something no BatchNorm computes."""
        if self.kind == BatchRenorm.kind:
            return False
        if self.front is not None and self.front.trained():
            return True
        return not all(torch.equal(t, self.written[name].to(t)) for name, t in self._tensors() if not t.is_meta)

    @contextmanager
    def as_original(self) -> Iterator[None]:
        """Run the body with the replacement computing what its BatchNorm computes, and nothing else changed."""
        contents = self.module.__dict__
        before = contents.get("forward")
        contents["forward"] = self._original
        try:
            yield
        finally:
            del contents["forward"]
            contents.update({} if before is None else {"forward": before})

    def _original(self, x: Tensor) -> Tensor:
        """Return what the BatchNorm computed of ``x`` at inference, without what its class adds to that."""
        if self.found is not None:
            scale, shift = (torch.from_numpy(each).to(x) for each in self.found.affine)
            shape = [1, -1] + [1] * (x.ndim - 2)
            return x * scale.view(shape) + shift.view(shape)
        old, now = self.old_contents["_buffers"], self.module._buffers
        affine = self.module._parameters if self.kind == BatchRenorm.kind else self.affine  # its own go on learning
        found = [None if old.get(name) is None else now.get(name, old[name]) for name in _STATISTICS]
        found += [affine.get(name) for name in _AFFINE]
        mean, var, weight, bias = (None if tensor is None else tensor.to(x.device) for tensor in found)
        return F.batch_norm(x, mean, var, weight, bias, mean is None, 0.0, epsilon_of(self.new))

    def restore(self) -> None:
        """Put the BatchNorm back, with the hooks and the mode of the present."""
        for handle in self.handles:
            handle.remove()
        if self.front is not None:
            self.front.restore()
        with torch.no_grad():
            for parameter, _, value in self.values:
                parameter.copy_(value)
        now, old = self.module.__dict__, _shallow(self.old_contents)
        old |= {key: value for key, value in now.items() if key in _HOOKS_AND_MODE}
        for name, buffer in old["_buffers"].items():
            shared = now["_buffers"].get(name) if self.found is None else None  # has moved and learned with the model
            if buffer is not None:
                old["_buffers"][name] = self._moved(buffer) if shared is None else shared
        become(self.module, self.old_class, old)

    def _moved(self, buffer: Tensor) -> Tensor:
        """Take a buffer that the replacement had no use for to where the model has gone since."""
        like = next(_own_tensors(self.module), None)
        if like is None or (like.device, like.dtype) == self.home:
            return buffer
        return buffer.to(like.device, like.dtype if buffer.is_floating_point() else None)

    def _contents(self) -> dict[str, Any]:
        """Return what the object holds as the replacement: the new layer's contents, and what else the old one had."""
        old, new = self.old_contents, self.new.__dict__
        kept = {key: value for key, value in old.items() if key in _HOOKS_AND_MODE}
        extras = {key: value for key, value in old.items() if key not in _SETTINGS and key not in _CONTENTS}
        merged: dict[str, Any] = {}
        for key in ("_parameters", "_buffers", "_modules"):
            others = {name: value for name, value in old[key].items() if name not in _TENSORS}
            merged[key] = {**new[key], **others}
        merged["_modules"].pop("parametrizations", None)  # what they computed is the parameter now
        merged["_non_persistent_buffers_set"] = new["_non_persistent_buffers_set"] | old["_non_persistent_buffers_set"]
        marks = {"site": self.name, MARK: self.kind, **({FRONT: self.front.name} if self.front else {})}
        return {**extras, **new, **kept, **merged, **marks}

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what the replacement computes with, by name."""
        contents = self.module.__dict__
        for name in (*self.new._parameters, *self.new._buffers):
            tensor = contents["_parameters"].get(name, contents["_buffers"].get(name))
            if tensor is not None:
                yield name, tensor


def swaps_for(
    model: nn.Module, layers: Mapping[str, nn.Module], decisions: Sequence[Decision], *, solve: bool = True
) -> list[Swap]:
    """Return what replaces the BatchNorms of ``model``, given by name, as a plan has decided."""
    owners = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    known = dict(named_layers(model)) if any(decision.front for decision in decisions) else {}
    names = {id(module): name for name, module in model.named_modules()} if known else {}

    def swap(decision: Decision) -> Swap:
        norm, front = layers[decision.site.name], _front(known, decision)
        above = None if front is None else _above(model, names[id(norm)], names[id(front)], decision)
        return Swap(norm, decision, owners, like, front, above, solve)

    return [swap(decision) for decision in decisions]


def _above(model: nn.Module, norm: str, front: str, decision: Decision) -> "tuple[nn.Module, _FrontFromBatchNorm]":
    """Return the innermost module that holds both layers, and the hook that it gets."""
    ways = norm.split("."), front.split(".")
    shared = 0
    while shared < min(map(len, ways)) - 1 and ways[0][shared] == ways[1][shared]:
        shared += 1
    names = [".".join(way[shared:]) for way in ways]
    return model.get_submodule(".".join(ways[0][:shared])), _FrontFromBatchNorm(names[0], names[1], decision)


def _front(layers: Mapping[str, nn.Module], decision: Decision) -> nn.Module | None:
    if not decision.front:
        return None
    layer = layers.get(decision.front)
    if layer is None or layer._parameters.get("weight") is None:
        raise InputError(
            f"{decision.site.name}: expected the recipe's layer in front, {decision.front}, received a model without it"
        )
    return layer


@dataclass(frozen=True)
class _Then:
    """A forward hook that does to the normalized output what the replaced class does to it."""

    after: After

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        return self.after(module, output)


@dataclass(frozen=True)
class _FromBatchNorm:
    """A hook that carries a BatchNorm's state over while it is loaded into the layer that replaced it."""

    target: Target
    spatial: tuple[int, ...] | None
    front: str = ""

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        found = {name: state[prefix + name] for name in _TENSORS if prefix + name in state}
        mean = found.get("running_mean")
        if mean is None or "running_var" not in found or any(prefix + name in state for name in _SINCE_BATCH_NORM):
            return  # not a BatchNorm's state
        if mean.shape != (channels_of(module),):
            return  # which torch will complain of
        if self.front:
            raise InputError(
                f"expected a BatchNorm's weights together with those of {self.front}, which is equalized for it, "
                f"received those of {prefix.removesuffix('.') or 'the norm'} alone: load them into a module with both"
            )
        own: dict[str, Any] = {**module._parameters, **module._buffers}
        if isinstance(self.target, BatchRenorm):
            if own["r_max"].is_meta:  # as is all that a model without values holds
                found |= {name: mean.new_tensor(getattr(self.target, name)) for name in ("r_max", "d_max")}
        else:
            with _naming(prefix.removesuffix(".")):
                values = _carry(found, epsilon_of(module), mean.numel(), self.target, self.spatial)
            found |= {name: value.to(mean) for name, value in values.items()}
            if "temperature" in own and own["temperature"].is_meta:
                state[f"{prefix}temperature"] = mean.new_tensor(1.0)
        for name in _TENSORS | _SINCE_BATCH_NORM:
            state.pop(prefix + name, None)
            if own.get(name) is not None:
                state[prefix + name] = found.get(name, own[name])


@dataclass(frozen=True)
class _FrontFromBatchNorm:
    """A hook of the module that holds both a norm and the layer in front: a BatchNorm network's state is equalized.

    ``norm`` and ``front`` are their names below that module. Weights of a layer that had no bias get one of zeros.
    """

    norm: str
    front: str
    decision: Decision

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        """Rewrite ``state``, which `load_state_dict` is about to load into ``module``."""
        layer, norm = module.get_submodule(self.front), module.get_submodule(self.norm)
        weights = {name: state.get(f"{prefix}{self.front}.{name}") for name in ("weight", "bias")}
        tensors = {name: state.get(f"{prefix}{self.norm}.{name}") for name in _TENSORS}
        if weights["weight"] is None:
            return
        biased = layer._parameters.get("bias") is not None
        target = self.decision.target
        others = [f"{prefix}{self.norm}.{name}" for name in _SINCE_BATCH_NORM]
        ours = (
            tensors["running_mean"] is None or tensors["running_var"] is None or any(name in state for name in others)
        )
        fits = not ours and tensors["running_mean"].shape == (channels_of(norm),)  # type: ignore[union-attr]
        if fits and weights["weight"].shape == layer._parameters["weight"].shape:  # type: ignore[union-attr]
            with _naming(f"{prefix}{self.norm}"):
                batch_norm = _state(tensors, epsilon_of(norm), channels_of(norm))
                found = _equalized(batch_norm, target, self.decision, layer, True, weights)
            like: Any = weights["weight"]
            for name, value in absorbed(layer, {k: v for k, v in weights.items() if v is not None}, found).items():
                state[f"{prefix}{self.front}.{name}"] = value.to(like)
            for name in _TENSORS:
                state.pop(f"{prefix}{self.norm}.{name}", None)
            values = {**_parameters(found), **{k: torch.from_numpy(v) for k, v in _statistics(found).items()}}
            own: dict[str, Any] = {**norm._parameters, **norm._buffers}
            for name in _TENSORS | _SINCE_BATCH_NORM:
                if own.get(name) is not None:
                    given = values.get(name, own[name])
                    state[f"{prefix}{self.norm}.{name}"] = given.to(like) if given.is_floating_point() else given
        elif biased and weights["bias"] is None:
            state[f"{prefix}{self.front}.bias"] = torch.zeros_like(layer._parameters["bias"])  # type: ignore[arg-type]


def _equalized(
    state: BatchNormState | None,
    target: Target | None,
    decision: Decision,
    front: nn.Module,
    solve: bool,
    weights: Mapping[str, Tensor | None] | None = None,
) -> Equalized:
    """Return what a norm and the layer in front of it become."""
    assert state is not None
    assert isinstance(target, GroupNorm | SwitchNorm)
    assert decision.mode is not None
    if problems := state.problems():
        raise InputError(f"expected finite parameters and variances >= 0, received {'; '.join(problems)}")
    groups = target.groups if isinstance(target, GroupNorm) and isinstance(target.groups, int) else None
    seen = read_front(front, weights)
    return equalize(state, target, seen, groups=groups, spatial=decision.site.spatial, mode=decision.mode, solve=solve)


def _parameters(found: Equalized) -> dict[str, Tensor]:
    values = {"weight": found.gamma, "bias": found.beta}
    if found.gate_logits is not None:
        values |= {"mean_weight": found.gate_logits, "var_weight": found.gate_logits}
    return {name: torch.from_numpy(value) for name, value in values.items()}


def _statistics(found: Equalized) -> dict[str, Array]:
    return {"running_mean": found.mean, "running_var": found.var}


def _build(module: nn.Module, target: Target, site: Site, like: Tensor | None) -> nn.Module:
    """Return the replacement, with the BatchNorm's settings, statistics, and for BatchRenorm its γ and β."""
    floating = like is not None and like.is_floating_point()
    common: dict[str, Any] = {
        "eps": epsilon_of(module),
        "device": None if like is None else like.device,
        "dtype": like.dtype if like is not None and floating else None,
    }
    if isinstance(target, GroupNorm):
        assert isinstance(target.groups, int)
        return nn.GroupNorm(target.groups, site.channels, **common)
    dimensions = rank_of(module, site.spatial)
    assert dimensions is not None  # an obstacle otherwise
    new: nn.Module
    if isinstance(target, SwitchNorm):
        common |= {} if target.compat is None else {"compat": target.compat}
        new = _SWITCH_NORMS[dimensions](site.channels, batch_statistics=target.batch_statistics, **common)
    else:
        assert isinstance(target, BatchRenorm)  # the way back has swaps of its own
        new = _BATCH_RENORMS[dimensions](site.channels, r_max=target.r_max, d_max=target.d_max, **common)
        new._parameters |= {name: module._parameters[name] for name in _AFFINE if name in module._parameters}
    for name, buffer in module._buffers.items():
        if name in new._buffers and buffer is not None:
            new._buffers[name] = buffer
    _move_alike(new, module, target)
    if "process_group" in module.__dict__:
        new.sync, new.process_group = True, module.process_group
    return new


def _move_alike(new: Any, module: Any, target: Target) -> None:
    """Have the running statistics move as a BatchNorm's do, whatever has been set on it since it was made."""
    if getattr(target, "compat", None) is None:
        new.momentum = getattr(module, "momentum", 0.1)
        if new.momentum is None and getattr(module, "num_batches_tracked", None) is None:
            new.momentum = 0.0  # an average over a count that is not kept
    if getattr(module, "running_mean", None) is not None:
        new.track_running_stats = bool(getattr(module, "track_running_stats", True))


def _carried(module: nn.Module, new: nn.Module, target: Target, site: Site) -> dict[str, Tensor]:
    """Return the parameters of ``new`` that are to be written, by name."""
    own = module._parameters
    if any(tensor.is_meta for tensor in _own_tensors(module)):  # which hold nothing to carry over
        return {name: p for name, p in new._parameters.items() if p is not None and p is not own.get(name)}
    tensors = {name: getattr(module, name, None) for name in _TENSORS}
    if isinstance(target, BatchRenorm):  # what is no parameter is computed by a parametrization, or frozen
        return {name: value for name in _AFFINE if name not in own and (value := tensors[name]) is not None}
    return _carry(tensors, epsilon_of(module), site.channels, target, site.spatial)


def _carry(
    tensors: Mapping[str, Tensor | None], eps: float, channels: int, target: Target, spatial: tuple[int, ...] | None
) -> dict[str, Tensor]:
    """Return what the carry-over makes of a BatchNorm's tensors, in float64."""
    state = _state(tensors, eps, channels)
    groups = target.groups if isinstance(target, GroupNorm) and isinstance(target.groups, int) else None
    carried = carry_over(state, target, groups=groups, spatial=spatial)
    values = {"weight": carried.gamma, "bias": carried.beta}
    if carried.gate_logits is not None:
        values |= {"mean_weight": carried.gate_logits, "var_weight": carried.gate_logits}
    return {name: torch.from_numpy(value) for name, value in values.items()}


def read_state(layer: nn.Module) -> BatchNormState | None:
    """Return a BatchNorm's parameters and running statistics in float64, None where it holds no values."""
    if any(tensor.is_meta for tensor in _own_tensors(layer)):
        return None
    tensors = {name: getattr(layer, name, None) for name in (*_AFFINE, *_STATISTICS)}
    return _state(tensors, epsilon_of(layer), channels_of(layer))


def _state(tensors: Mapping[str, Tensor | None], eps: float, channels: int) -> BatchNormState:
    def read(name: str) -> Array | None:
        tensor = tensors.get(name)
        return None if tensor is None else tensor.detach().double().cpu().numpy()

    gamma, beta = read("weight"), read("bias")
    return BatchNormState(
        gamma=np.ones(channels) if gamma is None else gamma,
        beta=np.zeros(channels) if beta is None else beta,
        mean=read("running_mean"),
        var=read("running_var"),
        eps=eps,
    )


def _own_tensors(module: nn.Module) -> Iterator[Tensor]:
    contents = module.__dict__
    for tensor in (*contents["_parameters"].values(), *contents["_buffers"].values()):
        if tensor is not None:
            yield tensor


def _shallow(contents: Mapping[str, Any]) -> dict[str, Any]:
    return {key: copy.copy(value) if key in _CONTENTS else value for key, value in contents.items()}


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Put the site's name in front of what a computation on its values complains of."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
