"""Find the BatchNorms of a PyTorch module tree and judge what stands in the way of replacing each."""

import functools
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.overrides import TorchFunctionMode

from ...errors import UnsupportedError, said, spoken
from ...frameworks.example import Inputs, not_taken
from ...frameworks.torch import call, inference, input_names, named_layers, watching
from ..plan import Site
from .batch_norm import channels_of, is_frozen, overrides, rank_of
from .callers import choosing_mode, folding
from .fronts import Fronts
from .graphs import norms_of
from .subclasses import after

MARK = "_normswap"
"""Attribute of a replaced module that holds its target's kind."""

_PARALLEL = {"DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine"}
_PADDING = re.compile(r"mask|length|(^|_)lens?($|_)|padding", re.IGNORECASE)
_QUANTIZED = ("torch.ao.nn.", "torch.nn.intrinsic", "torch.nn.qat", "torch.nn.quantized")


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
    for name, module in named_layers(model):
        names.setdefault(id(module), []).append(name)
        modules[id(module)] = module
    found = {key: module for key, module in modules.items() if _is_site(module)}
    seen = _DryRun(modules, found) if example is None else _dry_run(model, modules, found, example)
    by_name = {name: modules[key] for key, group in names.items() for name in group}
    first = {key: group[0] for key, group in names.items()}
    masked_by = "" if example is None else _mask_in(model, example)
    sites = [
        replace(
            _judge(module, names[key], seen.shapes.get(key), by_name), masked_by=masked_by, **seen.front(key, first)
        )
        for key, module in found.items()
    ]
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


def _is_site(module: nn.Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule):
        return "BatchNorm" in module.original_name and hasattr(module, "running_mean")
    return isinstance(module, _BatchNorm) or MARK in module.__dict__ or is_frozen(module)


def _judge(
    module: nn.Module, names: list[str], spatial: tuple[int, ...] | None, by_name: Mapping[str, nn.Module]
) -> Site:
    above = list(_above(names[0], by_name))
    left = ""
    if MARK not in module.__dict__:
        if any(cls.__module__.startswith(_QUANTIZED) for _, cls in [*above, ("", type(module))]):
            left = "part of a quantization-aware module"
        elif is_frozen(module):
            left = "frozen: a constant scale and shift, which no batch can disturb"
    readers = (f"{name or 'the model'} ({folds})" for name, cls in above if (folds := folding(cls)))
    freezers = (f"{name or 'the model'} ({trains})" for name, cls in above if (trains := choosing_mode(cls)))
    return Site(
        name=names[0],
        aliases=tuple(names[1:]),
        source=getattr(module, "original_name", type(module).__name__),
        channels=channels_of(module),
        spatial=spatial,
        obstacle="" if MARK in module.__dict__ else _obstacle(module, left),
        left=left,
        read_by=next(readers, ""),
        mode_set_by=next(freezers, ""),
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
        way = spoken("give --input-shape", "run one forward pass first, or give an example input")
        return f"not initialised yet: {way}"
    if "forward" in module.__dict__:
        return "its forward was replaced on the object itself: patch the model before that"
    for owner, method in () if is_frozen(module) else overrides(cls):
        if after(owner) is None:
            return (
                f"{owner.__name__} overrides {method}, which a replacement would lose: say what it adds with "
                "normswap.register_batch_norm"
            )
    for name in ("weight", "bias") if is_frozen(module) else ("weight", "bias", "eps"):
        if not hasattr(module, name):
            return f"it has no attribute {name}"
    if not {"weight", "bias"}.isdisjoint(module.__dict__):
        return "its weight or bias is computed by a hook: make it permanent first, as torch.nn.utils.prune.remove does"
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
        self.fronts: Fronts | None = None

    def note(self, key: int, x: Tensor, output: Any) -> None:
        """Take down the shape of a site's input."""
        self.shapes.setdefault(key, tuple(x.shape[2:]))

    def front(self, key: int, names: Mapping[int, str]) -> dict[str, Any]:
        """Return what a site is to know of the layer in front of it."""
        return {} if self.fronts is None else self.fronts.of(key, names)

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
    """Run the model on noise of the example's shape where that is a constant, so that every value counts."""
    varied = Inputs.of(example).map(_noise)
    for inputs in (varied, example):
        try:
            return _dry_run_on(model, modules, sites, inputs, closely=True)
        except Exception:
            continue
    try:  # where a transform of `torch.func` runs the layers there are no values to look at
        return _dry_run_on(model, modules, sites, example, closely=False)
    except Exception as error:
        raise not_taken(said(error)) from error


def _dry_run_on(
    model: nn.Module, modules: Mapping[int, nn.Module], sites: Mapping[int, nn.Module], example: Any, *, closely: bool
) -> _DryRun:
    """Return what a run shows, and with ``closely`` what is in front of each site."""
    seen = _DryRun(modules, sites)
    fronts = Fronts(modules, sites) if closely else None
    looking = nullcontext() if fronts is None else fronts.watching()
    with inference(model, compiled=False), watching(sites, seen.note), seen, looking:
        outputs = call(model, example)
        if fronts is not None:
            fronts.returned(outputs)
    del outputs
    if fronts is not None:
        fronts.ended()
        seen.fronts = fronts
    return seen


def _mask_in(model: nn.Module, example: Any) -> str:
    """Return the name of an input that masks others or gives their lengths, "" if there is none."""
    inputs = Inputs.of(example)
    for name, value in zip(input_names(model, inputs), inputs.arrays.values(), strict=False):
        kind = str(value.dtype).removeprefix("torch.")
        if (kind == "bool" and len(value.shape) > 1) or (_PADDING.search(name) and len(value.shape) < 4):
            return name
    return ""


def _noise(value: Any) -> Any:
    """Return standard normal noise in place of floats that are all one value."""
    tensor = torch.as_tensor(value)
    if not tensor.is_floating_point() or not tensor.numel() or tensor.min() != tensor.max():
        return value
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)).to(tensor)


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


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
