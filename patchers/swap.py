"""Carry out a plan: every replacement or none, and the way back."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from ..convert.equalize import Equalized
from ..errors import UnsupportedError
from ..frameworks.detect import get_framework
from .measured_drift import Drift, Swapped, drift_from_original
from .plan import Plan, Report


def become(layer: Any, cls: type[Any], contents: Mapping[str, Any]) -> None:
    """Make of an object one of another class with these contents."""
    layer.__dict__.clear()
    layer.__dict__.update(contents)
    layer.__class__ = cls


class Swap(Swapped, Protocol):
    """One site's replacement, built and ready, in place of the BatchNorm called ``name``."""

    def apply(self) -> None:
        """Put the replacement in place."""

    def trained(self) -> bool:
        """Return whether the replacement has changed since into something no BatchNorm computes."""

    def accept(self, found: Equalized | None) -> None:
        """Take what the replacement is now for what it was given, by a calibration that found this."""

    def restore(self) -> None:
        """Put the BatchNorm back, also after an `apply` that failed half-way."""


def carry_out(
    model: Any,
    plan: Plan,
    swaps: Sequence[Swap],
    batch_norms: Callable[[], Iterable[str]],
    around: Callable[[], AbstractContextManager[None]] = nullcontext,
    copied: Callable[[Any], Any] = copy.deepcopy,
    lost: str = "no BatchNorm computes what they do: reload the original model",
) -> Report:
    """Apply ``swaps`` to ``model`` and return the report; if anything fails, the model is as it was.

    ``batch_norms()`` names the BatchNorms that are left, among which no replaced one may be. Changes are made within
    ``around()``, copies by ``copied``. ``lost`` says why what was trained since cannot be undone.
    """
    done: list[Swap] = []
    others: list[Swap] = []
    try:
        with around():
            for swap in swaps:
                done.append(swap)
                swap.apply()
            if leftover := sorted(set(batch_norms()) & {swap.name for swap in swaps}):
                raise RuntimeError(f"expected no BatchNorm left at {', '.join(leftover)}")
    except BaseException:
        for swap in reversed(done):
            swap.restore()
        raise

    def require_untrained(reason: str) -> None:
        if trained := [swap.name for swap in done if swap.trained()]:
            raise UnsupportedError(
                f"expected untrained replacements, received {len(trained)} that have changed since the patch "
                f"(first: {trained[0]}); {reason}"
            )

    def undo() -> None:
        require_untrained(lost)
        with around():
            for swap in reversed(done):
                swap.restore()
        done.clear()

    def drift(example: Any) -> list[Drift]:
        require_untrained("what else has changed is not known: compare with the original model, loaded again")
        if swaps and not done:
            raise UnsupportedError("expected a patched model, received one whose patch was undone")
        return drift_from_original(model, done, example)

    def original() -> Any:
        require_untrained("no copy of the original can be made: load it again")
        keep = get_framework(model).snapshot(model)
        with around():
            for swap in reversed(done):
                swap.restore()
        try:
            return copied(model)
        finally:
            with around():
                for swap in done:
                    swap.apply()
            keep()
            accept({}, ())

    def accept(found: Mapping[str, Equalized], more: Sequence[Swap]) -> None:
        for swap in done:
            swap.accept(found.get(swap.name))
        others.extend(more)
        done.extend(more)

    return Report(model, plan, undo, drift, original, accept)
