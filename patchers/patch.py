"""The library's two verbs, `plan` and `patch`, for a model of either framework."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from ..convert.recipe import Recipe, Rules
from ..convert.targets import Target, as_target
from .contract import patcher_of
from .plan import Plan, Report


def plan(
    model: Any,
    target: str | Target | Recipe | Rules,
    *,
    example: Any = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    where: Callable[[Any, str], bool] | None = None,
) -> Plan:
    """Decide what `patch` would do to every BatchNorm of ``model``, touching nothing.

    ``target`` is a shorthand (``"sn" | "brn" | "gn" | "ln" | "in"``), a configuration, a `Recipe` made from the same
    model, or `Rules` for any. ``example`` is an input the model accepts: with it the plan knows every site's shape and
    can refuse what a shape rules out. ``include`` and ``exclude`` are name globs, or regular expressions after
    ``re:``; ``where(module, name)`` is asked last. Each decision says what the replacement is expected to change
    (``drift``) and whether an exported file is rid of it (``folds``).

    Raises `InputError` for a target, pattern, recipe or example that does not fit the model.
    """
    return plans(model, [target], example=example, include=include, exclude=exclude, where=where)[0]


def plans(
    model: Any,
    targets: Sequence[str | Target | Recipe | Rules],
    *,
    example: Any = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    where: Callable[[Any, str], bool] | None = None,
) -> list[Plan]:
    """Return what `plan` decides for each of ``targets``, on one look at the model."""
    model = as_module(model)
    resolved = [_resolved(target) for target in targets]
    return patcher_of(model).plans(model, resolved, example=example, include=include, exclude=exclude, where=where)


def patch(
    model: Any,
    target: str | Target | Recipe | Rules,
    *,
    example: Any = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    where: Callable[[Any, str], bool] | None = None,
    inplace: bool = True,
) -> Report:
    """Replace the BatchNorms of ``model`` with the weights carried over, and return what was done.

    The arguments are those of `plan`. The model is changed in place unless ``inplace=False``; either way it is
    ``report.model``. An exported program (`torch.export.ExportedProgram`) is not changed: ``report.model`` is a module
    made from it, which shares the weights that are no norm's unless ``inplace=False``. Patching again with the same
    target changes nothing. Either every planned site is replaced or, on any error, none.

    Raises `UnsupportedError` if a selected site cannot be replaced or there is none, `InputError` as `plan`.
    """
    model = as_module(model)
    return patcher_of(model).patch(
        model, _resolved(target), example=example, include=include, exclude=exclude, where=where, inplace=inplace
    )


def as_module(model: Any) -> Any:
    """Return the module that an exported program becomes, and any other model as it is."""
    exporting = sys.modules.get("torch.export")
    if exporting is None or not isinstance(model, exporting.ExportedProgram):
        return model
    from .torch import programs

    return programs.as_module(model)


def _resolved(target: str | Target | Recipe | Rules) -> Target | Recipe | Rules:
    return target if isinstance(target, Recipe | Rules) else as_target(target)
