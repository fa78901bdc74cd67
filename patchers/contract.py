"""What planning and patching need of a framework: the contract that `torch.patch` and `keras.patch` implement."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from ..convert.recipe import Recipe, Rules
from ..convert.targets import Target
from ..frameworks.detect import framework_of
from .plan import Plan, Report


class Patcher(Protocol):
    """One framework's way of finding BatchNorms and of replacing them."""

    def plans(
        self,
        model: Any,
        targets: Sequence[Target | Recipe | Rules],
        *,
        example: Any = None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        where: Callable[[Any, str], bool] | None = None,
    ) -> list[Plan]:
        """Return what `patch` would do to ``model`` for each target, touching nothing but what is not built yet."""

    def patch(
        self,
        model: Any,
        target: Target | Recipe | Rules,
        *,
        example: Any = None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        where: Callable[[Any, str], bool] | None = None,
        inplace: bool = True,
    ) -> Report:
        """Replace the BatchNorms of ``model`` by ``target``: all that are planned or, if anything fails, none."""

    def layers_by_name(self, model: Any) -> AbstractContextManager[Mapping[str, Any]]:
        """Give every layer by name within the context, those that are calls in a traced graph as layers, too."""


def patcher_of(model: Any) -> Patcher:
    """Return what plans and patches ``model``; raises as `framework_of` does."""
    if framework_of(model) == "torch":
        from .torch import patch as torch_patch

        return torch_patch
    from .keras import patch as keras_patch

    return keras_patch
