"""What planning and patching need of a framework: the contract that `torch.patch` and `keras.patch` implement."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from ..convert.line import LineFit
from ..convert.recipe import Recipe, Rules
from ..convert.state import BatchNormState
from ..convert.targets import Mode, Target
from ..frameworks.detect import framework_of
from .plan import Decision, Plan, Report, Site

if TYPE_CHECKING:
    from .swap import Swap


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
        mode: Mode | None = "full",
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
        mode: Mode | None = "full",
        solve: bool = True,
    ) -> Report:
        """Replace the BatchNorms of ``model`` by ``target``: all that are planned or, if anything fails, none.

        ``mode`` says what layers in front take. With ``solve=False`` the values are those of the carry-over: for a
        model that gets its weights from elsewhere.
        """

    def make_room(self, model: Any, names: Sequence[str]) -> None:
        """Give the linear layers of these names that have no bias one of zeros, for weights to be loaded."""

    def layers_by_name(self, model: Any) -> AbstractContextManager[Mapping[str, Any]]:
        """Give every layer by name within the context, those that are calls in a traced graph as layers, too."""


def patcher_of(model: Any) -> Patcher:
    """Return what plans and patches ``model``; raises as `framework_of` does."""
    if framework_of(model) == "torch":
        from .torch import patch as torch_patch

        return torch_patch
    from .keras import patch as keras_patch

    return keras_patch


class NormPatcher(Protocol):
    """One framework's way of finding what can become a BatchNorm again, and of making it one."""

    def find_norms(self, model: Any, example: Any = None) -> tuple[list[Any], list[Site]]:
        """Return the norms of ``model`` and what is known of each, BatchNorms (``kind`` "bn") among them."""

    def channel_axis(self, layer: Any) -> int:
        """Return the axis of the channels in what a norm takes and returns."""

    def epsilon(self, layer: Any) -> float:
        """Return what a norm adds to its variance."""

    def exact_state(self, layer: Any) -> BatchNormState | None:
        """Return the BatchNorm that computes what a norm computes at inference, None where no BatchNorm does."""

    def by_the_batch(self, batch_norms: Mapping[str, Any], seen: Mapping[str, LineFit]) -> AbstractContextManager[None]:
        """Have BatchNorms normalize by what they are given within the context, and count that in ``seen``."""

    def swaps_back(
        self, model: Any, layers: Mapping[str, Any], decisions: Sequence[Decision], state_of: Callable[[str], Any]
    ) -> "list[Swap]":
        """Return what makes the norms BatchNorms as a plan has decided.

        ``state_of`` tells by name what one computes, when it is put in place; None for what will be loaded.
        """

    def copied(self, model: Any) -> Any:
        """Return a copy of ``model``; raises `UnsupportedError` if none can be made."""

    def around(self, model: Any) -> AbstractContextManager[None]:
        """Have the model know, after a body that replaces its layers, that it did."""

    def fitted(self, recipe: Recipe, names: Sequence[str]) -> Recipe:
        """Return a recipe with the names that the norms have in this model."""


def norm_patcher_of(model: Any) -> NormPatcher:
    """Return what takes ``model`` back to BatchNorm; raises as `framework_of` does."""
    if framework_of(model) == "torch":
        from .torch import way_back as torch_way_back

        return torch_way_back
    from .keras import way_back as keras_way_back

    return keras_way_back
