"""Find, plan and replace the BatchNorms of a PyTorch module tree.

A site keeps its identity: the module object stays and only its class and contents change (as torch's own lazy
modules do), so every alias, hook, plain-list reference and optimizer that points at it or at its parameters keeps
working.
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from ..convert.carry_over import Array, BatchNormState, carry_over
from ..convert.recipe import Recipe
from ..convert.targets import BatchRenorm, GroupNorm, SwitchNorm, Target
from ..errors import InputError, UnsupportedError
from ..layers import torch as layers
from .plan import Decision, Plan, Report, Site, decide
from .swap import carry_out

MARK = "_normswap"
"""Attribute of a replaced module that holds its target's kind."""

_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_FORWARDS = {cls.forward for cls in (_BatchNorm, *_PLAIN)}
_SWITCH_NORMS = {1: layers.SwitchNorm1d, 2: layers.SwitchNorm2d, 3: layers.SwitchNorm3d}
_BATCH_RENORMS = {1: layers.BatchRenorm1d, 2: layers.BatchRenorm2d, 3: layers.BatchRenorm3d}
_CONTENTS = {"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"}
_KEPT = frozenset(nn.Module().__dict__) - _CONTENTS
_OWN = {"num_features", "eps", "momentum", "affine", "track_running_stats", "process_group"}


def plan(
    model: nn.Module,
    target: Target | Recipe,
    *,
    example: Any = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    where: Callable[[nn.Module, str], bool] | None = None,
) -> Plan:
    """Return what `patch` would do to ``model``, touching nothing."""
    modules, sites = find_sites(model, example)
    by_name = dict(zip((site.name for site in sites), modules, strict=True))
    selected = None if where is None else lambda name: where(by_name[name], name)
    return decide("torch", sites, target, include=include, exclude=exclude, where=selected)


def patch(
    model: nn.Module,
    target: Target | Recipe,
    *,
    example: Any = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    where: Callable[[nn.Module, str], bool] | None = None,
    inplace: bool = True,
) -> Report:
    """Replace the BatchNorms of ``model`` by ``target`` and return the report.

    Every replacement is built before the first is put in place; if anything fails, the model is as it was.
    """
    if not inplace:
        model = copy.deepcopy(model)
    decided = plan(model, target, example=example, include=include, exclude=exclude, where=where)
    decided.require_work()
    by_name = dict(model.named_modules(remove_duplicate=False))
    owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    swaps = []
    for decision in decided.having("replace"):
        with _naming(decision.site.name):
            swaps.append(_Swap(by_name[decision.site.name], decision, owners))
    return carry_out(model, decided, swaps, lambda: (site.name for site in find_sites(model)[1] if site.kind is None))


def find_sites(model: nn.Module, example: Any = None) -> tuple[list[nn.Module], list[Site]]:
    """Return the BatchNorm modules of ``model``, patched ones included, and what is known of each.

    Raises `UnsupportedError` for TorchScript and for a model already wrapped for parallel training.
    """
    _require_open(model)
    names: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    quantized: set[int] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module).__module__.startswith(("torch.ao.", "torch.nn.intrinsic")):
            quantized.update(id(child) for child in module.modules())
        if isinstance(module, _BatchNorm) or hasattr(module, MARK):
            names.setdefault(id(module), []).append(name)
            modules[id(module)] = module
    spatial = {} if example is None else _dry_run(model, list(modules.values()), example)
    sites = []
    for key, module in modules.items():
        obstacle = "part of a quantization-aware module" if key in quantized else _obstacle(module, spatial.get(key))
        sites.append(
            Site(
                name=names[key][0],
                aliases=tuple(names[key][1:]),
                source=type(module).__name__,
                channels=_channels(module),
                spatial=spatial.get(key),
                obstacle=obstacle,
                kind=getattr(module, MARK, None),
                has_statistics=getattr(module, "running_mean", None) is not None,
            )
        )
    return list(modules.values()), sites


def read_state(module: nn.Module) -> BatchNormState:
    """Return a BatchNorm's parameters and running statistics in float64."""

    def read(name: str) -> Array | None:
        value: Tensor | None = getattr(module, name)
        return None if value is None else value.detach().double().cpu().numpy()

    channels = _channels(module)
    gamma, beta = read("weight"), read("bias")
    return BatchNormState(
        gamma=np.ones(channels) if gamma is None else gamma,
        beta=np.zeros(channels) if beta is None else beta,
        mean=read("running_mean"),
        var=read("running_var"),
        eps=float(module.eps),  # type: ignore[arg-type]
    )


def call(model: nn.Module, example: Any) -> Any:
    """Call ``model`` on an example: a tensor or array, a tuple of positional or a mapping of keyword inputs."""
    if isinstance(example, Mapping):
        return model(**{name: _tensor(value) for name, value in example.items()})
    return model(*map(_tensor, example)) if isinstance(example, tuple) else model(_tensor(example))


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Run the body with every module in eval mode and without gradients, then restore each module's own flag."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in flags:
            module.training = training


class _Swap:
    """One site's replacement, applied to the module object itself and reversible."""

    def __init__(self, module: nn.Module, decision: Decision, owners: Counter[int]) -> None:
        self.name, self.module = decision.site.name, module
        self.new, self.kind = _build(module, decision)
        self.kept = _kept_parameters(module, decision.target, owners)
        self.old_class, self.old_contents = type(module), _shallow(module)
        self.old_values = {name: getattr(module, name).detach().clone() for name in self.kept}

    def apply(self) -> None:
        old, contents = self.old_contents, _shallow(self.new)
        for name in self.kept:
            parameter, value = old["_parameters"][name], contents["_parameters"][name]
            with torch.no_grad():
                parameter.copy_(value)
            contents["_parameters"][name] = parameter
        extras = {key: value for key, value in old.items() if key not in _KEPT | _CONTENTS | _OWN}
        kept = {key: value for key, value in old.items() if key in _KEPT}
        self._set(type(self.new), {**contents, **kept, **extras, MARK: self.kind})
        self.written = {name: value.detach().clone() for name, value in self.module.state_dict().items()}

    def trained(self) -> bool:
        if self.kind == BatchRenorm.kind:  # computes what the BatchNorm with its parameters computes
            return False
        now = self.module.state_dict()
        return any(not torch.equal(now[name], value) for name, value in self.written.items() if not value.is_meta)

    def restore(self) -> None:
        if self.kind != BatchRenorm.kind:
            for name, value in self.old_values.items():
                with torch.no_grad():
                    self.old_contents["_parameters"][name].copy_(value)
        hooks = {key: value for key, value in self.module.__dict__.items() if key in _KEPT}
        self._set(self.old_class, {**self.old_contents, **hooks})

    def _set(self, cls: type[nn.Module], contents: dict[str, Any]) -> None:
        self.module.__dict__.clear()
        self.module.__dict__.update(contents)
        self.module.__class__ = cls


def _build(module: nn.Module, decision: Decision) -> tuple[nn.Module, str]:
    target, site = decision.target, decision.site
    assert target is not None
    reference = next((t for t in (*module.parameters(recurse=False), *module.buffers(recurse=False))), None)
    device = None if reference is None else reference.device
    dtype = reference.dtype if reference is not None and reference.is_floating_point() else None
    common: dict[str, Any] = {"eps": module.eps, "device": device, "dtype": dtype}
    new: nn.Module
    if isinstance(target, GroupNorm):
        assert isinstance(target.groups, int)
        new = nn.GroupNorm(target.groups, site.channels, **common)
    elif isinstance(target, SwitchNorm):
        common |= {"momentum": module.momentum, "batch_statistics": target.batch_statistics}
        new = _SWITCH_NORMS[_dimensions(module, site.spatial)](site.channels, **common)
    else:
        common |= {"momentum": module.momentum, "r_max": target.r_max, "d_max": target.d_max}
        new = _BATCH_RENORMS[_dimensions(module, site.spatial)](site.channels, **common)
    if not isinstance(target, GroupNorm) and site.has_statistics:
        for name in set(new._buffers) & set(module._buffers):
            new._buffers[name] = module._buffers[name]
    if isinstance(target, BatchRenorm):
        new._parameters.update(module._parameters)  # γ and β stay what they are, absent ones included
    elif reference is None or not reference.is_meta:
        _write(new, target, site, read_state(module))
    for name, parameter in module.named_parameters(recurse=False):
        new._parameters[name].requires_grad_(parameter.requires_grad)  # type: ignore[union-attr]
    return new, target.kind


def _write(new: nn.Module, target: Target, site: Site, state: BatchNormState) -> None:
    groups = target.groups if isinstance(target, GroupNorm) and isinstance(target.groups, int) else None
    carried = carry_over(state, target, groups=groups, spatial=site.spatial)
    values = {"weight": carried.gamma, "bias": carried.beta}
    if carried.gate_logits is not None:
        values |= {"mean_weight": carried.gate_logits, "var_weight": carried.gate_logits}
    with torch.no_grad():
        for name, value in values.items():
            getattr(new, name).copy_(torch.from_numpy(value))


def _kept_parameters(module: nn.Module, target: Target | None, owners: Counter[int]) -> set[str]:
    """Name the parameters whose objects live on with new values; one tied to another module cannot take two."""
    if isinstance(target, BatchRenorm):
        return set()
    return {name for name, p in module.named_parameters(recurse=False) if owners[id(p)] == 1}


def _obstacle(module: nn.Module, spatial: tuple[int, ...] | None) -> str:
    if hasattr(module, MARK) or type(module) in _PLAIN:
        if type(module) is nn.SyncBatchNorm and spatial is None:
            return "a SyncBatchNorm takes any rank: give an example input to see which it is"
        return ""
    if isinstance(module, LazyModuleMixin):
        return "not initialised yet: run one forward pass first"
    if type(module).forward in _FORWARDS:
        return ""
    return f"{type(module).__name__} overrides forward: a replacement would lose what it adds"


def _channels(module: nn.Module) -> int:
    return int(module.num_channels if isinstance(module, nn.GroupNorm) else module.num_features)  # type: ignore[arg-type]


def _dimensions(module: nn.Module, spatial: tuple[int, ...] | None) -> int:
    for dimensions, cls in ((1, nn.BatchNorm1d), (2, nn.BatchNorm2d), (3, nn.BatchNorm3d)):
        if isinstance(module, cls):
            return dimensions
    assert spatial is not None  # a SyncBatchNorm without an example is an obstacle
    return max(1, len(spatial))


def _dry_run(model: nn.Module, modules: list[nn.Module], example: Any) -> dict[int, tuple[int, ...]]:
    seen: dict[int, tuple[int, ...]] = {}

    def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.setdefault(id(module), tuple(inputs[0].shape[2:]))

    handles = [module.register_forward_pre_hook(note) for module in modules]
    try:
        with inference(model):
            call(model, example)
    except Exception as error:
        raise InputError(f"expected an example the model accepts, received one on which it fails: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _require_open(model: nn.Module) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedError(
            f"expected a module with Python code, received TorchScript ({model.original_name}); "
            "patch the module it was made from"
        )
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise UnsupportedError(
            f"expected an unwrapped model, received a {type(model).__name__}; patch `model.module` before wrapping"
        )


def _tensor(value: Any) -> Any:
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def _shallow(module: nn.Module) -> dict[str, Any]:
    return {k: copy.copy(v) if k in _CONTENTS else v for k, v in module.__dict__.items()}


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Put the site's name in front of what a computation on its values complains of."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
