"""What of a PyTorch model learns."""

from typing import Self

from torch import nn

from ....errors import InputError
from ...run.training import LAST, check_train
from .statistics import norm_parameters


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the parts of ``model`` that have parameters, in order: its children, those of a container one by one."""
    found: list[nn.Module] = []
    for child in model.children():
        if isinstance(child, nn.Sequential | nn.ModuleList):
            found += blocks(child)
        elif any(True for _ in child.parameters()):
            found.append(child)
    return found


class Learning:
    """Lets only the chosen parameters learn, those that are frozen already never; restores the flags at the end.

    Blocks before the last N are kept in eval mode, since nothing of them is to move, and have the model's in the end.
    """

    def __init__(self, model: nn.Module, which: str) -> None:
        check_train(which)
        self._model = model
        self._flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self._frozen: list[nn.Module] = []
        self._stilled: set[nn.Module] = set()
        if which == "norm":
            chosen = norm_parameters(model)
        elif match := LAST.fullmatch(which):
            parts, number = blocks(model), int(match[1])
            if number > len(parts):
                raise InputError(
                    f"expected last:N with N up to the model's {len(parts)} blocks, received train={which!r}"
                )
            self._frozen = parts[: len(parts) - number]
            chosen = {id(parameter) for part in parts[len(parts) - number :] for parameter in part.parameters()}
        else:
            chosen = {id(parameter) for parameter, _ in self._flags}
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag and id(parameter) in chosen)
        self.keep()

    def keep(self) -> None:
        """Keep frozen blocks in eval mode, which whoever puts the model in train mode has to be told again."""
        for part in self._frozen:
            self._stilled.update(module for module in part.modules() if module.training)
            part.eval()

    def close(self) -> None:
        """Let learn what did before."""
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
        for module in self._stilled:
            module.training = self._model.training

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
