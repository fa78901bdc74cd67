"""The norms of a PyTorch module tree, and how each becomes a BatchNorm again, in place and reversibly.

As in `swap`, the object stays and only its class and contents change.
"""

import copy
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.lazy import LazyModuleMixin

from ...convert.line import LineFit
from ...convert.recipe import Recipe
from ...convert.state import BatchNormState
from ...convert.targets import BatchNorm, BatchRenorm
from ...errors import UnsupportedError, spoken
from ...frameworks.torch import call, inference, named_layers, to_numpy, watching
from ...frameworks.torch import copied as copied_module
from ...layers import torch as layers
from ...layers.torch.channels_last import ChannelsLastBatchNorm
from ...layers.torch.group_norm import _contiguous
from ...layers.torch.norm import RunningNorm
from ..plan import Decision, Site
from ..swap import Swap, become
from .batch_norm import epsilon_of
from .sites import MARK, find_sites
from .swap import _FromBatchNorm, read_state

_BATCH_NORMS: dict[int, type[nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d]] = {
    1: nn.BatchNorm1d,
    2: nn.BatchNorm2d,
    3: nn.BatchNorm3d,
}
_SWITCH = (layers.SwitchNorm1d, layers.SwitchNorm2d, layers.SwitchNorm3d)
_RENORM = (layers.BatchRenorm1d, layers.BatchRenorm2d, layers.BatchRenorm3d)
_AFFINE, _STATISTICS = ("weight", "bias"), ("running_mean", "running_var")
_GROUPS = ("_parameters", "_buffers", "_modules")
_HOOKS_AND_MODE = frozenset(nn.Module().__dict__) - {*_GROUPS, "_non_persistent_buffers_set"}

_SAME = {
    "timm.layers.norm.GroupNorm": 1,
    "timm.layers.norm.GroupNorm1": 1,
    "timm.layers.norm.LayerNorm": -1,
    "timm.layers.norm.LayerNorm2d": 1,
    "torchvision.models.convnext.LayerNorm2d": 1,
}
"""Classes with a forward of their own that computes what their base class does, and the axis of their channels."""


def find_norms(model: nn.Module, example: Any = None) -> tuple[list[nn.Module], list[Site]]:
    """Return the norms of ``model`` and what is known of each, BatchNorms (``kind`` "bn") among them.

    Raises as `find_sites` does, which finds the BatchNorms.
    """
    holders, batch_norms = find_sites(model, example)
    names: dict[int, list[str]] = {}
    norms: dict[int, nn.Module] = {}
    order: dict[str, int] = {}
    for name, module in named_layers(model):
        order.setdefault(name, len(order))
        if _is_norm(module):
            names.setdefault(id(module), []).append(name)
            norms[id(module)] = module
    shapes = {} if example is None else _shapes(model, norms, example)
    found = [
        (
            module,
            Site(
                name=names[key][0],
                aliases=tuple(names[key][1:]),
                source=type(module).__name__,
                channels=_channels(module),
                spatial=shapes.get(key),
                obstacle=_obstacle(module),
                kind=_kind(module),
            ),
        )
        for key, module in norms.items()
    ]
    for module, site in zip(holders, batch_norms, strict=True):
        if id(module) not in norms:
            missing = "" if site.has_statistics else "it keeps no running statistics"
            there = {"kind": BatchNorm.kind, "obstacle": site.obstacle or missing, "read_by": ""}
            found.append((module, Site(**{**vars(site), **there})))
    found.sort(key=lambda pair: order.get(pair[1].name, len(order)))
    return [module for module, _ in found], [site for _, site in found]


def channel_axis(layer: nn.Module) -> int:
    """Return the axis of the channels in what a norm takes and returns."""
    if isinstance(layer, nn.LayerNorm):
        return _SAME.get(_owner(type(layer)), -1)
    return -1 if isinstance(layer, ChannelsLastBatchNorm) else 1


def epsilon(layer: nn.Module) -> float:
    """Return what a norm adds to its variance."""
    return epsilon_of(layer)


def exact_state(layer: nn.Module) -> BatchNormState | None:
    """Return the BatchNorm that computes what a norm computes at inference, None where no BatchNorm does."""
    if isinstance(layer, _SWITCH):
        of_the_batch = all(float(gates.detach()[-1]) == 1 for gates in layer.gates())
        exact = layer.compat is None and layer.batch_statistics != "none" and of_the_batch
    else:
        exact = isinstance(layer, (*_RENORM, _InstanceNorm)) and getattr(layer, "running_mean", None) is not None
    return read_state(layer) if exact else None


@contextmanager
def by_the_batch(batch_norms: Mapping[str, nn.Module], seen: Mapping[str, LineFit]) -> Iterator[None]:
    """Have BatchNorms normalize by what they are given within the context, and count that in ``seen``."""
    kept = {name: [_tensor(m, part).clone() for part in _STATISTICS] for name, m in batch_norms.items()}

    def hook(name: str) -> Callable[..., None]:
        def see(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = to_numpy(inputs[0].movedim(channel_axis(module), -1))
            batch = LineFit()
            batch.add(x, x)
            seen[name].add(x, x)
            _tensor(module, "running_mean").copy_(torch.from_numpy(batch.mean[0]))
            _tensor(module, "running_var").copy_(torch.from_numpy(batch.moments[0]))

        return see

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in batch_norms.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, module in batch_norms.items():
            for part, value in zip(_STATISTICS, kept[name], strict=True):
                _tensor(module, part).copy_(value)


def swaps_back(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    decisions: Sequence[Decision],
    state_of: Callable[[str], BatchNormState | None],
) -> list[Swap]:
    """Return what makes the norms of ``model`` BatchNorms as a plan has decided."""
    owners = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    swaps: list[Swap] = []
    for decision in decisions:
        site, module = decision.site, layers[decision.site.name]
        state = functools.partial(state_of, site.name)
        swaps.append(
            _Remeasured(module, site.name, state)
            if site.kind == BatchNorm.kind
            else _Back(module, site, state, owners, like)
        )
    return swaps


def copied(model: nn.Module) -> nn.Module:
    """Return a copy of ``model``; raises `UnsupportedError` if none can be made."""
    return copied_module(model)


def around(model: nn.Module) -> AbstractContextManager[None]:
    """Do nothing: modules are looked up at every call."""
    return nullcontext()


def fitted(recipe: Recipe, names: Sequence[str]) -> Recipe:
    """Return the recipe: a module's names are the same in every copy."""
    return recipe


class _Back:
    """One norm's BatchNorm, ready to be put in its place and taken out again."""

    compared = True

    def accept(self, found: Any) -> None:
        """Do nothing: a calibration leaves a BatchNorm as it is."""

    def __init__(
        self,
        module: nn.Module,
        site: Site,
        state: Callable[[], BatchNormState | None],
        owners: Counter[int],
        like: Tensor | None,
    ) -> None:
        self.name, self.module, self.state = site.name, module, state
        self.old_class, self.old_contents = type(module), _shallow(module.__dict__)
        self.hooks: list[tuple[Any, dict[Any, Any]]] = []
        own = module._parameters
        like = next((p for p in (*own.values(), *module._buffers.values()) if p is not None), like)
        self.new = _build(module, site, like)
        affine = {name: p for name in _AFFINE if (p := own.get(name)) is not None}
        learns = not affine or any(p.requires_grad for p in affine.values())
        for name in _AFFINE:
            parameter = affine.get(name)
            if parameter is not None and owners[id(parameter)] == 1:
                self.new._parameters[name] = parameter
            else:
                made = self.new._parameters[name]
                assert made is not None
                made.requires_grad_(learns if parameter is None else parameter.requires_grad)
        self.before = {name: p.detach().clone() for name, p in own.items() if p is not None}
        self.written: dict[str, Tensor] = {}

    def apply(self) -> None:
        """Put the BatchNorm in place."""
        if (state := self.state()) is not None:
            values = (state.gamma, state.beta, state.mean, state.var)
            with torch.no_grad():
                for name, value in zip((*_AFFINE, *_STATISTICS), values, strict=True):
                    _tensor(self.new, name).copy_(torch.from_numpy(value))
        self._without_hooks_of_ours()
        old, new = self.module.__dict__, self.new.__dict__
        extras = {key: value for key, value in old.items() if key not in {*_settings(), *_GROUPS}}
        merged = {
            group: {**new[group], **{n: v for n, v in old[group].items() if n not in _tensors()}} for group in _GROUPS
        }
        kept = {key: value for key, value in old.items() if key in _HOOKS_AND_MODE}
        persistence = {"_non_persistent_buffers_set": set(old["_non_persistent_buffers_set"])}
        become(self.module, type(self.new), {**extras, **new, **kept, **merged, **persistence})
        self.written = {name: tensor.detach().clone() for name, tensor in self._own()}

    def trained(self) -> bool:
        """Return whether the BatchNorm has changed since."""
        return not all(torch.equal(t, self.written[name].to(t)) for name, t in self._own() if not t.is_meta)

    @contextmanager
    def as_original(self) -> Iterator[None]:
        """Run the body with the BatchNorm computing what the norm did, and nothing else changed."""
        shadow: nn.Module = object.__new__(self.old_class)
        shadow.__dict__.update(_shallow(self.old_contents))
        shadow.__dict__["training"] = False
        for name, value in self.before.items():
            shadow._parameters[name] = nn.Parameter(value, requires_grad=False)
        shadow.to(next(self.module.parameters()).device)
        contents = self.module.__dict__
        before = contents.get("forward")
        contents["forward"] = functools.partial(self.old_class.forward, shadow)
        try:
            yield
        finally:
            del contents["forward"]
            contents.update({} if before is None else {"forward": before})

    def restore(self) -> None:
        """Put the norm back, with the hooks and the mode of the present, also where it was never taken out."""
        now, old = self.module.__dict__, _shallow(self.old_contents)
        like = next((tensor for _, tensor in self._own()), None)
        with torch.no_grad():
            for name, value in self.before.items():
                old["_parameters"][name].copy_(value)
            for tensor in (*old["_parameters"].values(), *old["_buffers"].values()):
                if tensor is not None and like is not None and tensor.device != like.device:
                    tensor.data = tensor.data.to(like.device)
        for hooks, removed in self.hooks:
            hooks.update(removed)
        self.hooks.clear()
        old |= {key: value for key, value in now.items() if key in _HOOKS_AND_MODE}
        become(self.module, self.old_class, old)

    def _without_hooks_of_ours(self) -> None:
        """Take away what a BatchNorm's replacement was given: it would carry over what is loaded into a BatchNorm."""
        for name in ("_load_state_dict_pre_hooks", "_forward_pre_hooks"):
            hooks = self.module.__dict__[name]
            ours = {
                key: hook
                for key, hook in hooks.items()
                if isinstance(getattr(hook, "hook", None), _FromBatchNorm) or hook is _contiguous
            }
            for key in ours:
                del hooks[key]
            self.hooks.append((hooks, ours))

    def _own(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what the BatchNorm computes with, by name."""
        for name in (*_AFFINE, *_STATISTICS):
            tensor = self.module._parameters.get(name, self.module._buffers.get(name))
            if tensor is not None:
                yield name, tensor


class _Remeasured:
    """New running statistics for a BatchNorm, which stays what it is."""

    compared = True

    def accept(self, found: Any) -> None:
        """Do nothing: a calibration leaves a BatchNorm as it is."""

    def __init__(self, module: nn.Module, name: str, state: Callable[[], BatchNormState | None]) -> None:
        self.module, self.name, self.state = module, name, state
        self.before = [_tensor(module, part).clone() for part in _STATISTICS]
        self.written = self.before

    def apply(self) -> None:
        """Give the BatchNorm what was measured."""
        state = self.state()
        if state is not None and state.mean is not None and state.var is not None:
            self._set([torch.from_numpy(state.mean), torch.from_numpy(state.var)])
        self.written = [_tensor(self.module, part).clone() for part in _STATISTICS]

    def trained(self) -> bool:
        """Return whether the statistics have moved since."""
        now = [_tensor(self.module, part) for part in _STATISTICS]
        return not all(torch.equal(t, value.to(t)) for t, value in zip(now, self.written, strict=True))

    @contextmanager
    def as_original(self) -> Iterator[None]:
        """Run the body with the statistics from before."""
        now = [_tensor(self.module, part).clone() for part in _STATISTICS]
        self._set(self.before)
        try:
            yield
        finally:
            self._set(now)

    def restore(self) -> None:
        """Give the BatchNorm the statistics it had."""
        self._set(self.before)

    def _set(self, values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for part, value in zip(_STATISTICS, values, strict=True):
                _tensor(self.module, part).copy_(value)


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, (nn.GroupNorm, nn.LayerNorm, _InstanceNorm, RunningNorm))


def _kind(module: nn.Module) -> str | None:
    """Return what is told of a norm: "brn" where it is a BatchNorm at inference."""
    return BatchRenorm.kind if isinstance(module, _RENORM) else None


def _channels(module: nn.Module) -> int:
    if isinstance(module, nn.LayerNorm):
        return int(module.normalized_shape[-1])
    return int(module.num_channels if isinstance(module, nn.GroupNorm) else module.num_features)  # type: ignore[arg-type]


def _obstacle(module: nn.Module) -> str:
    cls = type(module)
    if isinstance(module, LazyModuleMixin):
        way = spoken("give --input-shape", "run one forward pass first, or give an example input")
        return f"not initialised yet: {way}"
    if "forward" in module.__dict__:
        return "its forward was replaced on the object itself: take that back first"
    if not cls.forward.__module__.startswith(("torch.nn.", "normswap.layers.")) and _owner(cls) not in _SAME:
        name = _owner(cls).rpartition(".")[2]
        return f"{name} overrides forward, which a BatchNorm would lose: put a plain norm and what it adds in its place"
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) > 1:
        shape = tuple(module.normalized_shape)
        return (
            f"a LayerNorm over positions (normalized_shape={shape}) scales each by itself, a BatchNorm only channels: "
            "put a GroupNorm of one group in its place and train it"
        )
    if not {"weight", "bias"}.isdisjoint(module.__dict__) or "parametrizations" in module._modules:
        return "its weight or bias is computed: make it permanent first, as torch.nn.utils.prune.remove does"
    return ""


def _owner(cls: type) -> str:
    """Return the qualified name of the class that gives ``cls`` its forward."""
    owner = next(base for base in cls.__mro__ if "forward" in vars(base))
    return f"{owner.__module__}.{owner.__qualname__}"


def _shapes(model: nn.Module, norms: Mapping[int, nn.Module], example: Any) -> dict[int, tuple[int, ...]]:
    """Return the sizes of what each norm is given on an example but for batch and channels."""
    seen: dict[int, tuple[int, ...]] = {}

    def note(key: int, x: Tensor, y: Any) -> None:
        seen.setdefault(key, tuple(x.movedim(channel_axis(norms[key]), 1).shape[2:]))

    with inference(model, compiled=False), watching(norms, note):
        call(model, example)
    return seen


def _build(module: nn.Module, site: Site, like: Tensor | None) -> nn.Module:
    """Return a BatchNorm with a norm's settings, and where it has them its statistics."""
    like = like if like is not None and like.is_floating_point() else None
    rank = _rank(module, site)
    options: dict[str, Any] = {
        "eps": epsilon(module),
        "device": None if like is None else like.device,
        "dtype": None if like is None else like.dtype,
    }
    if not isinstance(module, (nn.GroupNorm, nn.LayerNorm)) and getattr(module, "compat", None) is None:
        options["momentum"] = module.momentum
    new: nn.Module
    if channel_axis(module) != 1 and site.spatial != ():
        new = ChannelsLastBatchNorm(site.channels, **options)
    elif getattr(module, "sync", False):
        new = nn.SyncBatchNorm(site.channels, process_group=module.process_group, **options)
    else:
        new = _BATCH_NORMS[rank](site.channels, **options)
    counted = module._buffers.get("num_batches_tracked")
    if counted is not None:
        _tensor(new, "num_batches_tracked").copy_(counted)
    return new


def _rank(module: nn.Module, site: Site) -> int:
    """Return how many dimensions follow the channels, 1 where there is none too."""
    if site.spatial is not None:
        rank = max(1, len(site.spatial))
    else:
        rank = next((r for r in (3, 2, 1) if type(module).__name__.endswith(f"{r}d")), 1)
    if rank > 3 and channel_axis(module) == 1:
        raise UnsupportedError(
            f"expected {site.name} on maps of at most 3 dimensions, which torch has BatchNorms for, received {rank}; "
            f"leave it as it is with {spoken('--exclude', 'exclude=')}{site.name!r}"
        )
    return rank


def _tensor(module: nn.Module, name: str) -> Tensor:
    tensor = module._parameters.get(name, module._buffers.get(name))
    assert tensor is not None
    return tensor


def _shallow(contents: Mapping[str, Any]) -> dict[str, Any]:
    groups = {*_GROUPS, "_non_persistent_buffers_set"}
    return {key: copy.copy(value) if key in groups else value for key, value in contents.items()}


@functools.cache
def _plain() -> tuple[nn.Module, ...]:
    made = (nn.GroupNorm(1, 1), nn.LayerNorm(1), nn.InstanceNorm1d(1, affine=True, track_running_stats=True))
    return (*made, layers.SwitchNorm1d(1), layers.BatchRenorm1d(1))


@functools.cache
def _settings() -> frozenset[str]:
    """Name the settings of every norm, and what a patch writes on one."""
    return frozenset(key for norm in _plain() for key in norm.__dict__) - _HOOKS_AND_MODE | {MARK, "site"}


@functools.cache
def _tensors() -> frozenset[str]:
    """Name the parameters and buffers of every norm."""
    return frozenset(name for norm in _plain() for name in (*norm._parameters, *norm._buffers))
