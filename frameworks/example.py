"""The arguments a model is called with: what `example` means wherever somebody gives one."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError

Place = tuple[str | int, ...]


class Inputs:
    """The arguments of one call of a model, positional and by keyword.

    Wherever normswap takes an ``example``, a tensor or array stands for ``Inputs(x)``, a tuple for ``Inputs(*args)``,
    and a mapping with names for keys for ``Inputs(**kwargs)``. Lists, tuples, mappings, None, numbers and strings
    within an argument are the model's own and reach it as they are.

    Args:
        args: What the model takes by position; tensors and arrays have the batch first.
        kwargs: What it takes by keyword.

    Example:
        >>> import normswap
        >>> normswap.Inputs([1, 2], mask=None)
        Inputs([1, 2], mask=None)
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs

    @classmethod
    def of(cls, example: Any) -> "Inputs":
        """Return what an ``example`` stands for."""
        if isinstance(example, Inputs):
            return example
        if isinstance(example, tuple) and not hasattr(example, "_fields"):
            return cls(*example)
        if isinstance(example, Mapping) and example and all(isinstance(key, str) for key in example):
            return cls(**example)
        return cls(example)

    @property
    def arrays(self) -> dict[Place, Any]:
        """Every tensor and array by its place: an argument's number or name, then the way into it."""
        return dict(_arrays({**dict(enumerate(self.args)), **self.kwargs}, ()))

    def __len__(self) -> int:
        return len(self.arrays)

    @property
    def samples(self) -> int | None:
        """How many samples all arrays with dimensions have first, None where they differ: a graph's nodes and edges."""
        counts = {int(array.shape[0]) for array in self.arrays.values() if len(array.shape)}
        return counts.pop() if len(counts) == 1 else None

    def taken(self, rows: Any) -> "Inputs":
        """Return the same arguments of some samples alone; a number has none."""
        return self.map(lambda array: array[rows] if len(array.shape) else array)

    def map(self, function: Callable[[Any], Any]) -> "Inputs":
        """Return the same arguments with ``function`` of every tensor and array in its place."""
        args = [_mapped(value, function) for value in self.args]  # first, since order counts
        return Inputs(*args, **{name: _mapped(value, function) for name, value in self.kwargs.items()})

    def filled(self, arrays: Sequence[Any]) -> "Inputs":
        """Return the same arguments with ``arrays`` in place of their tensors and arrays, in order."""
        following = iter(arrays)
        return self.map(lambda _: next(following))

    def ordered(self, names: Sequence[str]) -> "Inputs":
        """Return the same arguments, those by keyword in the order of ``names`` and then of the alphabet."""
        order = {name: index for index, name in enumerate(names)}
        kwargs = sorted(self.kwargs.items(), key=lambda item: (order.get(item[0], len(order)), item[0]))
        return Inputs(*self.args, **dict(kwargs))

    def __repr__(self) -> str:
        return f"Inputs({', '.join([*map(repr, self.args), *(f'{k}={v!r}' for k, v in self.kwargs.items())])})"


def to_array(value: Any) -> NDArray[Any]:
    """Return a tensor or array of any library as NumPy's, which has no bfloat16."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = (value.float() if str(value.dtype) == "torch.bfloat16" else value).numpy()
    return np.asarray(value, order="C")


def not_taken(reason: str) -> InputError:
    """Return the error of an example on which the model fails."""
    return InputError(f"expected an example the model accepts, received one on which it fails: {reason}")


def is_array(value: Any) -> bool:
    """Return whether ``value`` is a tensor or array of any library."""
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _arrays(value: Any, place: Place) -> Iterator[tuple[Place, Any]]:
    if is_array(value):
        yield place, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _arrays(item, (*place, key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _arrays(item, (*place, index))


def _mapped(value: Any, function: Callable[[Any], Any]) -> Any:
    if is_array(value):
        return function(value)
    if isinstance(value, Mapping):
        items = {key: _mapped(item, function) for key, item in value.items()}
        return items if type(value) is dict else _like(value, items)
    if isinstance(value, list | tuple):
        parts = [_mapped(item, function) for item in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def _like(mapping: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    """Return a mapping of the same class with other values, or a plain one where the class cannot be made of items."""
    try:
        return type(mapping)(items)  # type: ignore[call-arg]
    except TypeError:
        return items
