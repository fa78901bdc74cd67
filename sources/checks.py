"""What is asked of labelled images before a model learns from them."""

from collections.abc import Sequence

import numpy as np

from ..errors import InputError
from .data import Data

_SHOWN = 5


def check_labels(data: Data, classes: int) -> None:
    """Raise `InputError` if a model of ``classes`` outputs cannot learn the labels of ``data``."""
    labels = np.unique(data.labels)
    if len(labels) == 1:
        raise InputError(f"expected images of two classes or more to learn from, received label={labels[0]} alone")
    count = max(int(labels[-1]) + 1, len(data.classes or ()))
    if count > classes:
        raise InputError(f"expected labels for a model of {classes} classes, received {count} classes")


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


def _listed(names: Sequence[str]) -> str:
    more = [f"{len(names) - _SHOWN} more"] if len(names) > _SHOWN else []
    return ", ".join([*names[:_SHOWN], *more])
