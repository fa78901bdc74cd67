"""What the code of the classes above a BatchNorm does with it, found by following what their methods call.

A detector's ``fuse`` folds BatchNorms in a helper of another module, a backbone's ``train`` puts them in eval mode by
their class: after a patch the one would fold what is none, the other pass it over without a word.
"""

import functools
import inspect
import re
import sys
from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

_STATISTICS = {"running_mean", "running_var", "fuse_conv_bn_eval", "fuse_conv_bn_weights"}
_FOLDS = re.compile("fus(e|ion)|fold|reparam|deploy|merge|equivalent")
_STARTS = re.compile("init|reset|load")
_BY_CLASS = re.compile("batch_?norm|norm_?eval|freeze_?bn|frozen_?bn", re.IGNORECASE)
_DEEPEST = 6


@functools.cache
def folding(cls: type) -> str:
    """Return the name of a method of ``cls`` that reads running statistics, "" if there is none.

    Methods that fold by their name are followed into what they call; those that initialize are none.
    """
    for name, function in _methods(cls):
        depth = _DEEPEST if _FOLDS.search(name.lower()) else 0
        if _STARTS.search(name.lower()):
            continue
        if not _STATISTICS.isdisjoint(_names(function, cls, depth)):
            return f"{cls.__name__}.{name}"
    return ""


@functools.cache
def choosing_mode(cls: type) -> str:
    """Return the name of a ``train`` of ``cls`` that tells BatchNorms by their class, "" if it has none."""
    for name, function in _methods(cls):
        if name == "train" and any(_BY_CLASS.search(each) for each in _names(function, cls, _DEEPEST)):
            return f"{cls.__name__}.train"
    return ""


def _methods(cls: type) -> Iterator[tuple[str, FunctionType]]:
    for base in cls.__mro__:
        if base is not object and not _of_torch(base.__module__):
            for name, value in vars(base).items():
                if function := _function(value):
                    yield name, function


def _names(function: FunctionType, cls: type, depth: int) -> set[str]:
    """Return the names that a function's code uses, and the code of the functions it calls, to a depth."""
    found: set[str] = set()
    seen: set[CodeType] = set()
    level = [function]
    for _ in range(depth + 1):
        following: list[FunctionType] = []
        for each in level:
            if each.__code__ not in seen:
                seen.add(each.__code__)
                used = set(_used(each.__code__))
                found |= used
                following += _called(each, used, cls)
        level = following
    return found


def _used(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    yield from code.co_freevars
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _used(constant)
        elif isinstance(constant, str) and constant.isidentifier():
            yield constant  # as getattr takes it


def _called(function: FunctionType, used: set[str], cls: type) -> Iterator[FunctionType]:
    """Yield what the names may stand for: functions of the module or of one it names, and methods of the class."""
    known = function.__globals__
    package = known.get("__package__") or ""
    modules = [value for name in used if isinstance(value := known.get(name), ModuleType)]
    for name in used:  # imports within the function
        modules += [sys.modules[path] for path in (name, f"{package}.{name}") if path in sys.modules]
    for name in used:
        for value in (known.get(name), getattr(cls, name, None), *(vars(module).get(name) for module in modules)):
            if (found := _function(value)) and not _of_torch(found.__module__):
                yield found


def _function(value: Any) -> FunctionType | None:
    if isinstance(value, staticmethod | classmethod):
        value = value.__func__
    found = inspect.unwrap(value) if callable(value) else None
    return found if isinstance(found, FunctionType) else None


def _of_torch(module: str | None) -> bool:
    return f"{module}.".startswith("torch.")
