"""Find the BatchNorms of a PyTorch module tree and judge what stands in the way of replacing each."""

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.overrides import TorchFunctionMode

from ...errors import InputError, UnsupportedError
from ..plan import Site
from .graphs import norms_of
from .subclasses import After, after, nothing_more

MARK = "_normswap"
"""Attribute of a replaced module that holds its target's kind."""

_PARALLEL = {"DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine"}
_QUANTIZED = ("torch.ao.nn.", "torch.nn.intrinsic", "torch.nn.qat", "torch.nn.quantized")
_RANKS = {cls._check_input_dim: rank for rank, cls in enumerate((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), 1)}
_FOLDS = {"running_mean", "running_var", "fuse_conv_bn_eval", "fuse_conv_bn_weights"}


def find_sites(model: nn.Module, example: Any = None) -> tuple[list[nn.Module], list[Site]]:
    """Return the BatchNorm modules of ``model``, patched ones included, and what is known of each.

    A call of ``batch_norm`` that no layer makes, in a traced graph (see `graphs`) or, as a dry run on ``example`` sees,
    in a forward, is a site of the module that makes it. The dry run also tells shapes, and initialises what is lazy.

    Raises `UnsupportedError` for TorchScript and for a model already wrapped for parallel training, `InputError` for
    an example on which the model fails.
    """
    _require_open(model)
    names: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    for name, module in named_modules(model):
        names.setdefault(id(module), []).append(name)
        modules[id(module)] = module
    found = {key: module for key, module in modules.items() if _is_site(module)}
    seen = _DryRun(modules, found) if example is None else _dry_run(model, modules, found, example)
    by_name = {name: modules[key] for key, group in names.items() for name in group}
    sites = [_judge(module, names[key], seen.shapes.get(key), by_name) for key, module in found.items()]
    holders = list(found.values())
    for key, module in modules.items():
        for norm in norms_of(module):
            holders.append(module)
            name = _join(names[key][0], norm.name)
            sites.append(Site(name, "batch_norm", norm.channels, obstacle=norm.obstacle))
    for key, channels in seen.calls.items():
        holders.append(modules[key])
        obstacle = "called in a forward without a layer of the model: make it a BatchNorm submodule"
        sites.append(Site(_join(names[key][0], "forward"), "batch_norm", channels, obstacle=obstacle))
    return holders, sites


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every module under every name, as the model is called where it is not compiled."""
    for name, module in model.named_modules(remove_duplicate=False):
        yield (_uncompiled(name) if "_orig_mod" in name else name), module


def channels_of(module: nn.Module) -> int:
    """Return the number of channels a BatchNorm or its replacement normalizes."""
    for name in ("num_features", "num_channels"):
        if isinstance(channels := getattr(module, name, None), int):
            return channels
    return int(module.running_mean.numel())  # type: ignore[operator]


def rank_of(module: nn.Module, spatial: tuple[int, ...] | None) -> int | None:
    """Return how many dimensions follow the channels, 1 where there is none too; None if the class takes any."""
    if spatial is not None:
        return max(1, len(spatial))
    if not isinstance(module, _BatchNorm):
        return 2 if _is_frozen(module) else None
    return _RANKS.get(type(module)._check_input_dim)


def added_by(module: nn.Module) -> After:
    """Return what the module's class does after the normalization."""
    cls: Any = type(module)
    return next((added for owner, _ in _overrides(cls) if (added := after(owner))), nothing_more)


def normalized(module: nn.Module, x: Tensor, output: Tensor) -> Tensor:
    """Return what the normalization in a BatchNorm gives at inference, without what its class adds in ``output``."""
    if added_by(module) is nothing_more:
        return output
    mean, var = module.running_mean, module.running_var
    return F.batch_norm(x, mean, var, module.weight, module.bias, mean is None, 0.0, module.eps)  # type: ignore[arg-type]


def call(model: nn.Module, example: Any) -> Any:
    """Call ``model`` on an example: a tensor or array, a tuple of positional or a mapping of keyword inputs.

    All go to the device of the model; arrays of floats take its type, too.
    """
    device = next((state.device for state in _states(model)), None)

    def tensor(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(value)
            value = value.to(float_type(model)) if value.is_floating_point() else value
        return value.to(device) if isinstance(value, Tensor) else value

    if isinstance(example, Mapping):
        return model(**{name: tensor(value) for name, value in example.items()})
    return model(*map(tensor, example)) if isinstance(example, tuple) else model(tensor(example))


def float_type(model: nn.Module) -> torch.dtype:
    """Return the type of floats that ``model`` computes in."""
    return next((state.dtype for state in _states(model) if state.is_floating_point()), torch.float32)


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Run the body with every module in eval mode and without gradients, then restore each module's own flag."""
    flags = [(module, module.training) for module in model.modules()]
    for module in model.modules():  # not model.eval(), which a module made by torch.export refuses
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in flags:
            module.training = training


def _is_site(module: nn.Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule):
        return "BatchNorm" in module.original_name and hasattr(module, "running_mean")
    return isinstance(module, _BatchNorm) or MARK in module.__dict__ or _is_frozen(module)


def _states(model: nn.Module) -> Iterator[Tensor]:
    return chain(model.parameters(), model.buffers())


def _is_frozen(module: nn.Module) -> bool:
    """Tell the frozen BatchNorms that torchvision, detectron2, timm and others write alike."""
    return "FrozenBatchNorm" in type(module).__name__ and "running_mean" in module._buffers


def _judge(
    module: nn.Module, names: list[str], spatial: tuple[int, ...] | None, by_name: Mapping[str, nn.Module]
) -> Site:
    above = list(_above(names[0], by_name))
    left = ""
    if MARK not in module.__dict__:
        if any(cls.__module__.startswith(_QUANTIZED) for _, cls in [*above, ("", type(module))]):
            left = "part of a quantization-aware module"
        elif _is_frozen(module):
            left = "frozen: a constant scale and shift, which no batch can disturb"
    readers = (f"{name or 'the model'} ({folds})" for name, cls in above if (folds := _folds(cls)))
    return Site(
        name=names[0],
        aliases=tuple(names[1:]),
        source=getattr(module, "original_name", type(module).__name__),
        channels=channels_of(module),
        spatial=spatial,
        obstacle="" if MARK in module.__dict__ else _obstacle(module, left),
        left=left,
        read_by=next(readers, ""),
        any_rank=rank_of(module, spatial) is None,
        kind=module.__dict__.get(MARK),
        has_statistics=getattr(module, "running_mean", None) is not None,
    )


def _obstacle(module: nn.Module, left: str) -> str:
    cls: Any = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        return "TorchScript has no Python code to change: patch the module it was made from"
    if left.startswith("part of"):
        return f"{left}: patch the model before it is prepared for quantization"
    if isinstance(module, LazyModuleMixin):
        return "not initialised yet: run one forward pass first, or give an example input"
    if "forward" in module.__dict__:
        return "its forward was replaced on the object itself: patch the model before that"
    for owner, method in () if _is_frozen(module) else _overrides(cls):
        if after(owner) is None:
            return (
                f"{owner.__name__} overrides {method}, which a replacement would lose: say what it adds with "
                "normswap.register_batch_norm"
            )
    for name in ("weight", "bias", "eps"):
        if not hasattr(module, name):
            return f"it has no attribute {name}"
    if not {"weight", "bias"}.isdisjoint(module.__dict__):
        return "its weight or bias is computed by a hook: make it permanent first, as torch.nn.utils.prune.remove does"
    return ""


@functools.cache
def _overrides(cls: type) -> tuple[tuple[type, str], ...]:
    """Return the classes outside torch that give ``cls`` its forward and its train, each with which of them."""
    owners = ((next(base for base in cls.__mro__ if name in vars(base)), name) for name in ("forward", "train"))
    return tuple((owner, name) for owner, name in owners if not owner.__module__.startswith("torch.nn."))


@functools.cache
def _folds(cls: type) -> str:
    """Return the name of a method of ``cls`` that reads running statistics, as those that fold a BatchNorm do."""
    for base in cls.__mro__:
        if base.__module__.startswith("torch.") or base is object:
            continue
        for name, value in vars(base).items():
            code = getattr(inspect.unwrap(value), "__code__", None) if callable(value) else None
            if code is not None and not _FOLDS.isdisjoint(code.co_names):
                return f"{cls.__name__}.{name}"
    return ""


def _above(name: str, by_name: Mapping[str, nn.Module]) -> Iterator[tuple[str, Any]]:
    """Yield the name and class of each module that holds the one called ``name``, from the nearest to the model."""
    while name:
        name = name.rpartition(".")[0]
        if name in by_name:
            yield name, type(by_name[name])


class _DryRun(TorchFunctionMode):
    """What one forward pass shows: the shape each site sees, and the calls of batch_norm that no site makes."""

    def __init__(self, modules: Mapping[int, nn.Module], sites: Mapping[int, nn.Module]) -> None:
        super().__init__()
        self.modules, self.sites = modules, sites
        self.shapes: dict[int, tuple[int, ...]] = {}
        self.calls: dict[int, int] = {}

    def note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take down the shape of a site's input."""
        x = args[0] if args else next(iter(kwargs.values()))
        self.shapes.setdefault(id(module), tuple(x.shape[2:]))

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.batch_norm or function is torch.batch_norm:
            mean = _running_mean(function, args, kwargs)
            caller = self._caller()
            if mean is not None and caller not in self.sites and not _is_graph(self.modules[caller]):
                self.calls.setdefault(caller, int(mean.numel()))
        return function(*args, **kwargs)

    def _caller(self) -> int:
        """Return the id of the innermost module of the model whose method is running."""
        frame = sys._getframe(2)
        while frame is not None:
            key = id(frame.f_locals.get("self"))
            if key in self.modules:
                return key
            frame = frame.f_back  # type: ignore[assignment]
        return next(iter(self.modules))


def _dry_run(
    model: nn.Module, modules: Mapping[int, nn.Module], sites: Mapping[int, nn.Module], example: Any
) -> _DryRun:
    seen = _DryRun(modules, sites)
    handles = [module.register_forward_pre_hook(seen.note, with_kwargs=True) for module in sites.values()]
    try:
        with inference(model), seen, eager():
            call(model, example)
    except Exception as error:
        raise InputError(f"expected an example the model accepts, received one on which it fails: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
    return seen


def eager() -> AbstractContextManager[None]:
    """Run what torch.compile has wrapped without compiling it."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: Callable[[str], AbstractContextManager[None]] = torch.compiler.set_stance
    return stance("force_eager")


def _is_graph(module: nn.Module) -> bool:
    return isinstance(module, torch.fx.GraphModule)


def _running_mean(function: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
    index = 1 if function is F.batch_norm else 3
    return args[index] if len(args) > index else kwargs.get("running_mean")


def _require_open(model: nn.Module) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedError(
            f"expected a module with Python code, received TorchScript ({model.original_name}); "
            "patch the module it was made from"
        )
    for name, module in model.named_modules():
        cls: Any = type(module)
        if wrapper := _wrapper(cls):
            where = f" in {name}" if name else ""
            raise UnsupportedError(
                f"expected an unwrapped model, received a {wrapper}{where}; patch the model and then wrap it"
            )


@functools.cache
def _wrapper(cls: type) -> str:
    return next((base.__name__ for base in cls.__mro__ if base.__name__ in _PARALLEL), "")


def _uncompiled(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
