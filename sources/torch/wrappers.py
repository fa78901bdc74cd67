"""What training scripts, parallel and compiled models and averages put around a state dict, taken off again.

A dictionary around it is known by its key, what stands before names by the names of the model it is for: a model may
itself have a child called ``model``.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ...errors import InputError, note

KEYS = (
    *("state_dict", "model_state_dict", "model", "module", "net", "network", "params", "generator"),
    *("ema", "model_ema", "ema_model", "ema_state_dict", "state_dict_ema", "params_ema"),
)
"""Keys under which a checkpoint may have the weights."""
PREFIXES = ("module", "_orig_mod", "model", "net", "network", "params", "generator", "ema", "ema_model", "state_dict")
"""What may stand before the names of all weights."""
_COMPILED = "_orig_mod"
"""What a compiled module is called within its wrapper, at any depth."""
_AVERAGED = "n_averaged"
"""What `torch.optim.swa_utils.AveragedModel` has beside the weights."""


def state_in(content: Any, path: Path) -> Mapping[str, Tensor]:
    """Return the state dict in what a checkpoint holds, however deep.

    Raises `InputError` if there is none, or two of which either could be meant.
    """
    found = list({id(state): (way, state) for way, state in _states(content, ())}.values())
    if not found:
        kind = type(content).__name__
        raise InputError(f"expected a state dict of tensors in {path}, received a {kind} with other content")
    if len(found) > 1:
        names = " and ".join(".".join(way) for way, _ in found)
        raise InputError(
            f"expected one state dict in {path}, received {names}; save the one that you want to a file of its own: "
            f"torch.save(torch.load({path.name!r}){''.join(f'[{key!r}]' for key in found[0][0])}, 'weights.pth')"
        )
    way, state = found[0]
    if way:
        note(f"weights taken from {'.'.join(way)} in {path}")
    return state


def _states(content: Any, way: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Mapping[str, Tensor]]]:
    if not isinstance(content, Mapping) or not content or len(way) > len(KEYS):
        return
    if all(isinstance(value, Tensor) for value in content.values()):
        yield way, content
        return
    for key in KEYS:
        yield from _states(content.get(key), (*way, key))


Rename = Callable[[str], str]


def plain(names: Iterable[str]) -> tuple[Rename, list[str]]:
    """Return how names become those without what parallel and compiled models put there, and what that is.

    That no model's own names have: ``module.`` before all of them, and ``_orig_mod.`` anywhere.
    """
    removed: list[str] = []
    left = list(names)
    if any(_COMPILED in name.split(".") for name in left):
        removed.append(_COMPILED)
    left = [_without(name, _COMPILED) for name in left]
    depth = 0
    while _first(left) == "module":
        left = [name.partition(".")[2] for name in left]
        depth += 1
    removed += ["module"] * depth
    if len({*left}) < len(left):  # two weights would have one name
        return (lambda name: name), []
    return lambda name: _cut(_without(name, _COMPILED), depth), removed


def fitted(names: Iterable[str], own: Iterable[str]) -> tuple[Rename, list[str]]:
    """Return how names become those of a model, whose ``own`` names are given, and what was taken off or put before.

    Names of which one is the model's stay as they are, and so do those that no wrapper's name leads to it.
    """
    left, known = list(names), set(own)
    depth = 0
    removed: list[str] = []
    while not known & set(left) and (first := _first(left)) in PREFIXES:
        left = [name.partition(".")[2] for name in left]
        removed.append(first)
        depth += 1
    if known & set(left):
        return (lambda name: _cut(name, depth)), removed
    first = _first(known)
    if first in PREFIXES and known & {f"{first}.{name}" for name in names}:
        return (lambda name: f"{first}.{name}"), []
    return (lambda name: name), []


def _first(names: Iterable[str]) -> str:
    """Return what all names have before their first dot, "" if they have nothing in common there."""
    firsts = {name.partition(".")[0] if "." in name else "" for name in names}
    return firsts.pop() if len(firsts) == 1 else ""


def _without(name: str, part: str) -> str:
    return ".".join(each for each in name.split(".") if each != part)


def _cut(name: str, depth: int) -> str:
    for _ in range(depth):
        name = name.partition(".")[2]
    return name


def without_count(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the state of an averaged model without the number of models in it, which is no weight."""
    rest = {name: tensor for name, tensor in state.items() if name != _AVERAGED}
    return rest if len(rest) < len(state) and _first(rest) == "module" else state
