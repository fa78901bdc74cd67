"""Weights given to a patched PyTorch model."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LISTED, InputError, spoken
from ..layers import torch as layers
from ..patchers.torch.sites import MARK
from ..patchers.torch.swap import FRONT
from ..sources.torch.state_dict import load_state_dict
from .arrays import Array, require_eps, require_none
from .checkpoint import Checkpoint
from .switchablenorms import dimensions_of, from_switchablenorms

_SWITCH_NORMS = {layers.SwitchNorm1d: 1, layers.SwitchNorm2d: 2, layers.SwitchNorm3d: 3}
_BATCH_RENORMS = (layers.BatchRenorm1d, layers.BatchRenorm2d, layers.BatchRenorm3d)
_EPS = (1e-5, 2e-5)
"""Those of the classification and of the face networks of switchablenorms."""


def norms_of(model: nn.Module) -> dict[str, str]:
    """Return the kind ("sn", "brn", "gn") of every replaced layer by its names."""
    return {
        name: kind
        for name, module in model.named_modules(remove_duplicate=False)
        if (kind := module.__dict__.get(MARK) or _kind(module)) is not None
    }


def load(model: nn.Module, checkpoint: Checkpoint, eps: float | None, batches: int | None) -> tuple[int, int]:
    """Load the weights whole or not at all, and return how many norms and how many other layers got some."""
    assert checkpoint.state is not None
    state, published = checkpoint.state, checkpoint.system == "switchablenorms"
    if published:
        state = _converted(model, checkpoint.state, eps, batches)
    _require_same_biases(model, state, checkpoint)
    load_state_dict(model, state, str(checkpoint.path))
    owners = {name.rpartition(".")[0] for name in state}
    norms = owners & norms_of(model).keys()
    for name in norms if published else ():
        _compute_as_published(model.get_submodule(name))
    return len(norms), len(owners - norms)


def _require_same_biases(model: nn.Module, state: Mapping[str, Any], checkpoint: Checkpoint) -> None:
    """Raise `InputError` if biases alone tell that layers in front of norms were equalized otherwise than here."""
    own = {name for name in model.state_dict() if not name.endswith(("num_batches_tracked", "temperature"))}
    ours, theirs = own - set(state), set(state) - set(model.state_dict())
    fronts = {f"{module.__dict__[FRONT]}.bias" for module in model.modules() if FRONT in module.__dict__}
    linear = {f"{name}.bias" for name, module in model.named_modules() if getattr(module, "bias", module) is None}
    if (ours and theirs) or not (ours or theirs) or not (ours <= fronts and theirs <= linear):
        return
    names = ", ".join(sorted(ours or theirs)[:LISTED])
    if theirs:
        found = f"with {names}, biases that equalizing adds to layers in front of norms"
        way = spoken("--equalize full, with --input-shape", "equalize=True, with an example")
    else:
        found = f"without {names}, biases that equalizing has added to layers in front of norms here"
        way = spoken("--equalize scale or without --equalize", "equalize='scale' or equalize=False")
    raise InputError(
        f"expected weights of a network that was equalized as the model is, received {checkpoint.path} {found}; patch "
        f"with {way}"
    )


def _kind(module: nn.Module) -> str | None:
    if type(module) in _SWITCH_NORMS:
        return "sn"
    return "brn" if isinstance(module, _BATCH_RENORMS) else None


def _compute_as_published(norm: Any) -> None:
    if type(norm) in _SWITCH_NORMS:
        norm.compat, norm.momentum, norm.temperature = "switchablenorms", norm.published_momentum, 1.0


def _converted(
    model: nn.Module, state: Mapping[str, Tensor], eps: float | None, batches: int | None
) -> dict[str, Tensor]:
    """Return switchablenorms' state in the model's shapes, once its layers are those that were trained."""
    arrays = {name: as_array(tensor) for name, tensor in state.items()}
    own = from_switchablenorms(arrays, batches=batches)
    modules: dict[str, Any] = dict(model.named_modules(remove_duplicate=False))
    found = {name: modules[name] for name in dimensions_of(arrays) if type(modules.get(name)) in _SWITCH_NORMS}
    _require_same_dimensions(found, dimensions_of(arrays))
    _require_same_gates(found, own)
    require_eps({name: (norm.epsilon, _EPS if eps is None else (eps,)) for name, norm in found.items()})
    # What was not converted stays the tensor it is: NumPy has not all of torch's dtypes.
    return {n: state[n] if array is arrays.get(n) else torch.from_numpy(array) for n, array in own.items()}


def as_array(tensor: Tensor) -> Array:
    """Return a tensor as NumPy has it."""
    tensor = tensor.detach()
    array: Array = (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy()
    return array


def _require_same_dimensions(norms: Mapping[str, Any], dimensions: Mapping[str, int]) -> None:
    require_none(
        [
            f"{name}: SwitchNorm{dimensions[name]}d in the file, {type(norm).__name__} in the model"
            for name, norm in norms.items()
            if _SWITCH_NORMS[type(norm)] != dimensions[name]
        ],
        "expected layers for input of the file's dimensions, received others; patch the network that was trained",
    )


def _require_same_gates(norms: Mapping[str, Any], own: Mapping[str, Array]) -> None:
    gates = {name: own[f"{name}.mean_weight".removeprefix(".")].size for name in norms}
    wrong = {name: gates[name] for name, norm in norms.items() if norm.mean_weight.numel() != gates[name]}
    statistics = "none" if 2 in wrong.values() else "moving"
    require_none(
        [
            f"{name}: using_bn={count == 3} in the file, batch_statistics={norms[name].batch_statistics!r} in the model"
            for name, count in wrong.items()
        ],
        "expected layers with the file's gates, received others; patch to "
        + spoken(f"--batch-statistics {statistics}", f"SwitchNorm(batch_statistics='{statistics}')"),
    )
