"""The library's two verbs, `plan` and `patch`, for a model of either framework."""

from collections.abc import Callable, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

from ..convert.recipe import Recipe
from ..convert.targets import Target, as_target
from ..sources.framework import framework_of
from .plan import Plan, Report, Site


def plan(
    model: Any,
    target: str | Target | Recipe,
    *,
    example: Any = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    where: Callable[[Any, str], bool] | None = None,
) -> Plan:
    """Decide what `patch` would do to every BatchNorm of ``model``, touching nothing.

    ``target`` is a shorthand (``"sn" | "brn" | "gn" | "ln" | "in"``), a configuration, or a `Recipe` made from the
    same model. ``example`` is an input the model accepts: with it the plan knows every site's shape and can refuse
    what a shape rules out. ``include`` and ``exclude`` are name globs, or regular expressions after ``re:``;
    ``where(module, name)`` is asked last.

    Raises `InputError` for a target, pattern, recipe or example that does not fit the model.
    """
    adapter = _adapter(model)
    resolved = target if isinstance(target, Recipe) else as_target(target)
    decided: Plan = adapter.plan(model, resolved, example=example, include=include, exclude=exclude, where=where)
    return decided


def patch(
    model: Any,
    target: str | Target | Recipe,
    *,
    example: Any = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    where: Callable[[Any, str], bool] | None = None,
    inplace: bool = True,
) -> Report:
    """Replace the BatchNorms of ``model`` with the weights carried over, and return what was done.

    The arguments are those of `plan`. The model is changed in place unless ``inplace=False``; either way it is
    ``report.model``. Patching again with the same target changes nothing. Either every planned site is replaced or,
    on any error, none.

    Raises `UnsupportedError` if a selected site cannot be replaced or there is none, `InputError` as `plan`.
    """
    adapter = _adapter(model)
    resolved = target if isinstance(target, Recipe) else as_target(target)
    report: Report = adapter.patch(
        model, resolved, example=example, include=include, exclude=exclude, where=where, inplace=inplace
    )
    return report


def sites(model: Any, *, example: Any = None) -> list[Site]:
    """Return every BatchNorm of ``model``, and every one replaced before, with its shape if an example is given."""
    adapter = _adapter(model)
    found: list[Site] = adapter.find_sites(model, example)[1]
    return found


def _adapter(model: Any) -> ModuleType:
    return import_module(f".{framework_of(model)}", __package__)
