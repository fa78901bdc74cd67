"""What is asked of labels before a model learns from them, or is measured by them."""

import warnings
from collections.abc import Sequence

import numpy as np

from ..errors import InputError, NormswapWarning
from .dataset import Data

_SHOWN = 5


def check_labels(data: Data, classes: int) -> None:
    """Raise `InputError` if a model has fewer outputs, ``classes``, than ``data`` has classes.

    Warns if classes with names are fewer: labels number them in order, which need not be the model's.
    """
    count = max(int(data.labels.max()) + 1, len(data.classes or ()))
    if count > classes:
        raise InputError(f"expected labels for a model of {classes} classes, received {count} classes{_in(data)}")
    if data.classes is not None and count < classes:
        labels = ", ".join(f"{label} is {name!r}" for label, name in enumerate(data.classes[:_SHOWN]))
        warnings.warn(
            f"expected {classes} classes, as many as the model has scores, received {count}: label {labels}"
            f"{', ...' if count > _SHOWN else ''}",
            NormswapWarning,
            stacklevel=2,
        )


def several_classes(data: Data) -> None:
    """Raise `InputError` if all of ``data`` is of one class, of which nothing can be learnt."""
    if len(labels := np.unique(data.labels)) == 1:
        raise InputError(
            f"expected images of two classes or more to learn from, received label={labels[0]} alone{_in(data)}"
        )


def same_classes(data: Data, eval_data: Data) -> None:
    """Raise `InputError` if a label of ``eval_data`` may mean another class than in ``data``; only names can tell."""
    known, received = data.classes, eval_data.classes
    if known is None or received is None or known == received:
        return
    differences = {
        "without": [name for name in known if name not in received],
        "with": [name for name in received if name not in known],
    }
    text = " and ".join(f"{word} {_listed(names)}" for word, names in differences.items() if names)
    raise InputError(f"expected the classes trained on to evaluate on, received them {text or 'in another order'}")


def _in(data: Data) -> str:
    return data.name and f" in {data.name}"


def _listed(names: Sequence[str]) -> str:
    more = [f"{len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
    return ", ".join([*names[:_SHOWN], *more])
