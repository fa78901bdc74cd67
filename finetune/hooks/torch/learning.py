"""What of a PyTorch model learns."""

from contextlib import ExitStack
from typing import Self

from torch import nn

from ....errors import InputError
from ..freeze import check_train
from .norms import norm_parameters


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the parts of ``model`` that have parameters, in order: its children, those of a container one by one."""
    found: list[nn.Module] = []
    for child in model.children():
        if isinstance(child, nn.Sequential | nn.ModuleList):
            found += blocks(child)
        elif any(True for _ in child.parameters()):
            found.append(child)
    return found


def check_part(model: nn.Module, train: str) -> None:
    """Raise `InputError` unless ``train`` names a part of ``model``."""
    number = check_train(train)
    if number is not None and number > (count := len(blocks(model))):
        raise InputError(f"expected last:N with N up to the model's {count} blocks, received train={train!r}")


class Learning:
    """Lets only the parameters that ``train`` names learn, those that are frozen already never.

    Blocks before the last N are kept in eval mode, since nothing of them is to move, and have the model's in the end.
    It changes nothing before it is opened or entered, and restores the flags when it is closed.

    Raises `InputError` where ``train`` names no part of the model.
    """

    def __init__(self, model: nn.Module, train: str) -> None:
        check_part(model, train)
        self._model, self._train = model, train
        self._frozen: list[nn.Module] = []
        self._stilled: set[nn.Module] = set()
        self._undo = ExitStack()

    def open(self) -> None:
        """Freeze the rest."""
        number = check_train(self._train)
        chosen = {id(parameter) for parameter in self._model.parameters()}
        if self._train == "norm":
            chosen = norm_parameters(self._model)
        elif number is not None:
            parts = blocks(self._model)
            self._frozen = parts[: len(parts) - number]
            chosen = {id(parameter) for part in parts[len(parts) - number :] for parameter in part.parameters()}
        for parameter in self._model.parameters():
            self._undo.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(parameter.requires_grad and id(parameter) in chosen)
        self.keep()

    def keep(self) -> None:
        """Keep the rest in eval mode, which whoever puts the model in train mode has to be told again."""
        for part in self._frozen:
            self._stilled.update(module for module in part.modules() if module.training)
            part.eval()

    def close(self) -> None:
        """Let learn what did before."""
        self._undo.close()
        while self._stilled:
            self._stilled.pop().training = self._model.training
        self._frozen = []

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
