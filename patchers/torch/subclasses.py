"""BatchNorm subclasses that do more than a BatchNorm, and what they do more."""

from collections.abc import Callable
from typing import Any

After = Callable[[Any, Any], Any]


def nothing_more(module: Any, y: Any) -> Any:
    """Return ``y``: what a subclass adds that normalizes and nothing else."""
    return y


def drop_and_act(module: Any, y: Any) -> Any:
    """Return ``y`` after the module's children ``drop`` and ``act``, where it has them: what timm's add."""
    for name in ("drop", "act"):
        y = getattr(module, name, lambda same: same)(y)
    return y


_AFTER: dict[str, After] = {
    "timm.layers.norm_act.BatchNormAct2d": drop_and_act,
    "timm.layers.norm_act.SyncBatchNormAct": drop_and_act,
    "timm.layers.norm_act.FrozenBatchNormAct2d": drop_and_act,
}


def register_batch_norm(cls: type | str, after: After = nothing_more) -> None:
    """Let `patch` replace a BatchNorm subclass that overrides ``forward``, keeping what it adds.

    Its forward must be the BatchNorm of its input followed by ``after(module, y)``. Subclasses that override no further
    are covered.

    Args:
        cls: The class that overrides ``forward``, or its qualified name (``"package.module.Class"``), so that the
            package need not be imported.
        after: What it adds: a function of the same module object, with its children and attributes, and of the
            normalized input. Give a function of a module, not a lambda, since a patched model is pickled with it.
            Without it the class adds nothing.

    Raises:
        TypeError: For anything else.

    Example:
        >>> import normswap, torch
        >>> class Clipped(torch.nn.BatchNorm2d):
        ...     def forward(self, x):
        ...         return super().forward(x).clamp(0, 6)
        >>> def clip(module, y):
        ...     return y.clamp(0, 6)
        >>> normswap.register_batch_norm(Clipped, clip)
        >>> model = torch.nn.Sequential(Clipped(8)).eval()
        >>> normswap.patch(model, "gn").summary
        '1 replaced, 0 already patched, 0 skipped'
        >>> bool((model(torch.randn(2, 8, 4, 4)) >= 0).all())
        True
    """
    if not isinstance(cls, type | str):
        raise TypeError(f"expected a class or its qualified name, received cls={cls!r}")
    if not callable(after):
        raise TypeError(f"expected a function of module and tensor, received after={after!r}")
    _AFTER[cls if isinstance(cls, str) else _name(cls)] = after


def after(cls: type) -> After | None:
    """Return what ``cls`` does after the normalization, None if it is not registered."""
    return _AFTER.get(_name(cls))


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
