"""A forward that is run again within a backward pass, as activation checkpointing does: it sees what the first saw.

The first run moves running statistics and counts steps; the second must find the same values and leave them alone. So
a call whose activations may not be kept (no gradient is recorded, or hooks take what is saved for backward) has what
it reads and changes remembered outside of the layer, and within a backward pass it is looked up by the batch's mean.

A compiled call cannot be asked whether it will be run again, so each has its state remembered, by an operator that no
compiler looks into.
"""

from collections import OrderedDict, deque
from collections.abc import Iterable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

LONGEST = 128
"""Calls of a layer that may wait for their backward pass at once: microbatches of a pipeline, steps of a recurrence."""

ALIKE = 1e-3
"""How far, as a share, the batch mean of a call that is run again may be from the first run's."""

COMPILED, LONGEST_COMPILED = 4096, 32
"""Layers within compiled code, and calls of each, that are remembered, for whether it is needed nobody knows."""

_Call = tuple[Tensor, tuple[Tensor, ...]]
_calls: WeakKeyDictionary[nn.Module, deque[_Call]] = WeakKeyDictionary()
_compiled: OrderedDict[int, deque[_Call]] = OrderedDict()


def again() -> bool:
    """Whether this call is made within a backward pass."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def expected() -> bool:
    """Whether a call made now may be run again: its activations may not be kept."""
    if torch.compiler.is_compiling() or again():
        return False
    return not torch.is_grad_enabled() or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def remember(layer: nn.Module, key: Tensor, state: tuple[Tensor, ...]) -> None:
    """Remember what a layer's call with this batch mean sees."""
    _calls.setdefault(layer, deque(maxlen=LONGEST)).append(_call(key, state))


def _call(key: Tensor, state: Iterable[Tensor]) -> _Call:
    return key.detach().clone(), tuple(tensor.detach().clone() for tensor in state)


def recall(layer: nn.Module, key: Tensor) -> tuple[Tensor, ...] | None:
    """Return what the call with this batch mean saw, of several alike the latest; None if nothing is remembered.

    Raises `RuntimeError` if the call is none of those that are.
    """
    calls = _calls.get(layer)
    return _found(calls, key, getattr(layer, "site", "") or type(layer).__name__) if calls else None


def _found(calls: deque[_Call], key: Tensor, name: str) -> tuple[Tensor, ...]:
    def distance(call: _Call) -> float:
        return float((call[0] - key.to(call[0])).abs().sum())

    found = min(reversed(calls), key=distance)
    if distance(found) > ALIKE * float(key.abs().sum()):
        raise RuntimeError(
            f"{name}: expected a forward pass within a backward pass to repeat one of the last {calls.maxlen} of this "
            "layer, received another input; checkpoint fewer calls at a time, or leave this layer out of the checkpoint"
        )
    return found[1]


@torch.library.custom_op("normswap::seen", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def seen(layer: Tensor, name: str, key: Tensor, state: list[Tensor]) -> list[Tensor]:
    """Return what a compiled call with this batch mean sees, or within a backward pass what its first run saw.

    ``layer`` is a buffer of the layer's own, by whose place in memory it is told from others. Raises as `recall`.
    """
    place = layer.data_ptr()
    if again():
        calls = _compiled.get(place)
        return [tensor.clone() for tensor in (_found(calls, key, name) if calls else state)]
    call = _call(key, state)
    _compiled.setdefault(place, deque(maxlen=LONGEST_COMPILED)).append(call)
    _compiled.move_to_end(place)
    while len(_compiled) > COMPILED:
        _compiled.popitem(last=False)
    return [tensor.clone() for tensor in call[1]]


@seen.register_fake
def _(layer: Tensor, name: str, key: Tensor, state: list[Tensor]) -> list[Tensor]:
    return [torch.empty_like(tensor) for tensor in state]
