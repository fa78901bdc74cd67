"""The hook that lets a part of the model learn, and how such a part is named."""

import re
from contextlib import ExitStack
from typing import Any

from ...errors import InputError
from .contract import adapter_of
from .hook import Hook

LAST = re.compile(r"last:([1-9]\d*)")


def check_train(train: str) -> int | None:
    """Return the N of ``"last:N"``, and None of ``"all"`` and ``"norm"``; raises `InputError` for any other text."""
    match = LAST.fullmatch(train) if isinstance(train, str) else None
    if match is None and train not in ("all", "norm"):
        raise InputError(f"expected `train` to be all, norm or last:N, received train={train!r}")
    return None if match is None else int(match[1])


class Freeze(Hook):
    """Let only a part of the model learn until the end: ``"norm"``, or ``"last:N"`` for its last N blocks.

    Norms are the normalization layers' own parameters. Blocks are a PyTorch model's children with parameters, those of
    a container one by one, and a Keras model's layers with weights; those before the last N keep their statistics too.
    What is frozen already stays so. Open it before the optimizer is built, and before `compile` in Keras::

        with Freeze(model, "last:2") as hook:
            optimizer = torch.optim.SGD(model.parameters(), 0.01)
            ...

    Args:
        model: a PyTorch or Keras model.
        train: ``"norm"``, ``"last:N"`` or ``"all"``.

    Raises `InputError` for another text, and for more blocks than the model has; when it is opened, on Keras's JAX
    backend, for a model whose optimizer is built for more.
    """

    def __init__(self, model: Any, train: str) -> None:
        self._learning = adapter_of(model).Learning(model, train)

    def change(self, undo: ExitStack) -> None:
        """Freeze the rest."""
        undo.callback(self._learning.close)
        self._learning.open()

    def on_step(self, step: int) -> None:
        """Keep frozen what is."""
        super().on_step(step)
        self._learning.keep()
