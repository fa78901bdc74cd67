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

from ...convert.carry_over import Array, BatchNormState, carry_over
from ...convert.targets import BatchRenorm, GroupNorm, SwitchNorm, Target
from ...errors import InputError
from ...layers import torch as layers
from ...layers.torch.group_norm import guard
from ..plan import Decision, Site
from .batch_norm import added_by, channels_of, rank_of
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
_SINCE_BATCH_NORM = {"mean_weight", "var_weight", "r_max", "d_max"}


class Swap:
    """One site's replacement, ready to be put in place of the BatchNorm and taken out again.

    ``owners`` counts by id in how many modules each parameter is: one that is tied to another module cannot take two
    values, so the replacement gets one of its own. ``like`` is a tensor of the model, for the device and dtype of a
    BatchNorm that holds none.
    """

    def __init__(self, module: nn.Module, decision: Decision, owners: Counter[int], like: Tensor | None) -> None:
        site, target = decision.site, decision.target
        assert target is not None
        self.name, self.module, self.kind = site.name, module, target.kind
        self.old_class, self.old_contents = type(module), _shallow(module.__dict__)
        self.after = added_by(module)
        self.loaded = _FromBatchNorm(target, site.spatial)
        self.handles: list[Any] = []
        affine = {name: tensor for name in _AFFINE if (tensor := getattr(module, name, None)) is not None}
        self.affine = {name: tensor.detach() for name, tensor in affine.items()}
        learns = not affine or any(tensor.requires_grad for tensor in affine.values())
        like = next(_own_tensors(module), like)
        with _naming(self.name), torch.no_grad():
            self.new = _build(module, target, site, like)
            self.home = None if like is None else (like.device, like.dtype)
            self.values: list[tuple[nn.Parameter, Tensor, Tensor]] = []  # what to write where, and what was there
            for name, value in _carried(module, self.new, target, site).items():
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

    def apply(self) -> None:
        """Put the replacement in place."""
        with torch.no_grad():
            for parameter, value, _ in self.values:
                parameter.copy_(value)
        self._become(type(self.new), self._contents())
        hook = self.module.register_load_state_dict_pre_hook(self.loaded)  # type: ignore[no-untyped-call]
        self.handles.append(hook)
        if self.after is not nothing_more:
            self.handles.append(self.module.register_forward_hook(_Then(self.after), prepend=True))
        if isinstance(self.module, nn.GroupNorm):
            self.handles.append(guard(self.module))
        if self.kind != BatchRenorm.kind:  # which computes what the BatchNorm with its parameters computes
            self.written = {name: tensor.detach().clone() for name, tensor in self._tensors()}

    def trained(self) -> bool:
        """Return whether the replacement has changed since into something no BatchNorm computes."""
        if self.kind == BatchRenorm.kind:
            return False
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
        old, now = self.old_contents["_buffers"], self.module._buffers
        affine = self.module._parameters if self.kind == BatchRenorm.kind else self.affine  # its own go on learning
        found = [None if old.get(name) is None else now.get(name, old[name]) for name in _STATISTICS]
        found += [affine.get(name) for name in _AFFINE]
        mean, var, weight, bias = (None if tensor is None else tensor.to(x.device) for tensor in found)
        return F.batch_norm(x, mean, var, weight, bias, mean is None, 0.0, self.new.eps)  # type: ignore[arg-type]

    def restore(self) -> None:
        """Put the BatchNorm back, with the hooks and the mode of the present."""
        for handle in self.handles:
            handle.remove()
        with torch.no_grad():
            for parameter, _, value in self.values:
                parameter.copy_(value)
        now, old = self.module.__dict__, _shallow(self.old_contents)
        old |= {key: value for key, value in now.items() if key in _HOOKS_AND_MODE}
        for name, buffer in old["_buffers"].items():
            shared = now["_buffers"].get(name)  # has moved and learned with the model
            if buffer is not None:
                old["_buffers"][name] = self._moved(buffer) if shared is None else shared
        self._become(self.old_class, old)

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
        return {**extras, **new, **kept, **merged, "site": self.name, MARK: self.kind}

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what the replacement computes with, by name."""
        contents = self.module.__dict__
        for name in (*self.new._parameters, *self.new._buffers):
            tensor = contents["_parameters"].get(name, contents["_buffers"].get(name))
            if tensor is not None:
                yield name, tensor

    def _become(self, cls: type[nn.Module], contents: dict[str, Any]) -> None:
        self.module.__dict__.clear()
        self.module.__dict__.update(contents)
        self.module.__class__ = cls


def swaps_for(model: nn.Module, layers: Mapping[str, nn.Module], decisions: Sequence[Decision]) -> list[Swap]:
    """Return what replaces the BatchNorms of ``model``, given by name, as a plan has decided."""
    owners = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    return [Swap(layers[decision.site.name], decision, owners, like) for decision in decisions]


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

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        found = {name: state[prefix + name] for name in _TENSORS if prefix + name in state}
        mean = found.get("running_mean")
        if mean is None or "running_var" not in found or any(prefix + name in state for name in _SINCE_BATCH_NORM):
            return  # not a BatchNorm's state
        if mean.shape != (channels_of(module),):
            return  # which torch will complain of
        own: dict[str, Any] = {**module._parameters, **module._buffers}
        if isinstance(self.target, BatchRenorm):
            if own["r_max"].is_meta:  # as is all that a model without values holds
                found |= {name: mean.new_tensor(getattr(self.target, name)) for name in ("r_max", "d_max")}
        else:
            with _naming(prefix.removesuffix(".")):
                values = _carry(found, float(module.eps), mean.numel(), self.target, self.spatial)  # type: ignore[arg-type]
            found |= {name: value.to(mean) for name, value in values.items()}
        for name in _TENSORS | _SINCE_BATCH_NORM:
            state.pop(prefix + name, None)
            if own.get(name) is not None:
                state[prefix + name] = found.get(name, own[name])


def _build(module: nn.Module, target: Target, site: Site, like: Tensor | None) -> nn.Module:
    """Return the replacement, with the BatchNorm's settings, statistics, and for BatchRenorm its γ and β."""
    floating = like is not None and like.is_floating_point()
    common: dict[str, Any] = {
        "eps": module.eps,
        "device": None if like is None else like.device,
        "dtype": like.dtype if like is not None and floating else None,
    }
    if isinstance(target, GroupNorm):
        assert isinstance(target.groups, int)
        return nn.GroupNorm(target.groups, site.channels, **common)
    dimensions = rank_of(module, site.spatial)
    assert dimensions is not None  # an obstacle otherwise
    common["momentum"] = getattr(module, "momentum", 0.1)
    new: nn.Module
    if isinstance(target, SwitchNorm):
        common |= {} if target.compat is None else {"compat": target.compat, "momentum": "auto"}
        new = _SWITCH_NORMS[dimensions](site.channels, batch_statistics=target.batch_statistics, **common)
    else:
        assert isinstance(target, BatchRenorm)  # the way back has swaps of its own
        new = _BATCH_RENORMS[dimensions](site.channels, r_max=target.r_max, d_max=target.d_max, **common)
        new._parameters |= {name: module._parameters[name] for name in _AFFINE if name in module._parameters}
    for name, buffer in module._buffers.items():
        if name in new._buffers and buffer is not None:
            new._buffers[name] = buffer
    if "process_group" in module.__dict__:
        new.sync, new.process_group = True, module.process_group
    return new


def _carried(module: nn.Module, new: nn.Module, target: Target, site: Site) -> dict[str, Tensor]:
    """Return the parameters of ``new`` that are to be written, by name."""
    own = module._parameters
    if any(tensor.is_meta for tensor in _own_tensors(module)):  # which hold nothing to carry over
        return {name: p for name, p in new._parameters.items() if p is not None and p is not own.get(name)}
    tensors = {name: getattr(module, name, None) for name in _TENSORS}
    if isinstance(target, BatchRenorm):  # what is no parameter is computed by a parametrization, or frozen
        return {name: value for name in _AFFINE if name not in own and (value := tensors[name]) is not None}
    return _carry(tensors, float(module.eps), site.channels, target, site.spatial)  # type: ignore[arg-type]


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
    return _state(tensors, float(layer.eps), channels_of(layer))  # type: ignore[arg-type]


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
