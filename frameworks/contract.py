"""What may be asked of a model whichever framework it is of: the contract that `torch` and `keras` implement."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

from numpy.typing import NDArray

from .example import Inputs

Array = NDArray[Any]
Arrays = dict[str, Array]
Key = TypeVar("Key")

ROUNDING = 2.0**-24
"""What rounding to float32 moves a number by at most, relative to it."""


class Framework(Protocol):
    """A framework, as the rest of the library sees it; each of its modules here has these functions."""

    def named_layers(self, model: Any) -> Iterator[tuple[str, Any]]:
        """Yield the model itself and every layer below it, one that is held twice under each of its names."""

    def call(self, model: Any, example: Any) -> Any:
        """Call ``model`` on an example, arrays as its own tensors where it computes; in Keras as at inference."""

    def is_built(self, model: Any) -> bool:
        """Return whether all weights of a model are there; those of some layers come with the first input."""

    def inference(self, model: Any, *, compiled: bool = True) -> AbstractContextManager[None]:
        """Let ``model`` compute as at inference within the context, without gradients, and leave its state be.

        With ``compiled=False`` it runs as it is written even where it is compiled, for watchers to see its layers.
        """

    def watching(
        self, layers: Mapping[Key, Any], see: Callable[[Key, Any, Any], object], *, first: bool = False
    ) -> AbstractContextManager[None]:
        """Tell ``see(key, input, output)`` of every call of the layers within the context.

        With ``first`` the output is what the layer itself returns, before other hooks of a PyTorch module change it.
        """

    def snapshot(self, model: Any) -> Callable[[], None]:
        """Return what gives the model back all parameters and buffers that it has now."""

    def in_double(self, model: Any) -> Any:
        """Return a copy of ``model`` that computes in float64; raises `UnsupportedError` if none can be made."""

    def round_weights(self, model: Any, seed: int) -> None:
        """Move every weight of a model in float64 as rounding it to float32 may, up or down as ``seed`` has it."""

    def record(self, model: Any, example: Inputs) -> tuple[Arrays, Arrays]:
        """Return the model's outputs at inference by name, and those of its layers with weights in call order.

        The second call of a layer is ``"name#2"``. Layers with channels return them as dimension 1.
        """

    def input_names(self, model: Any, example: Inputs) -> list[str]:
        """Return a name for each array of an example, in order."""

    def ordered(self, model: Any, example: Inputs) -> Inputs:
        """Return the arguments of an example, those by name in the model's own order, whatever order they come in."""

    def input_shapes(self, model: Any) -> list[tuple[int | None, ...]] | None:
        """Return the shape of each input without the batch, None for a model that does not tell."""

    def input_types(self, model: Any) -> list[str] | None:
        """Return the type of each input, such as "float32" or "string", None for a model that does not tell."""

    def tables(self, model: Any) -> dict[str, tuple[Any, int, Any]]:
        """Return every layer that looks up rows by whole numbers, how many, and these (R, ...) or None."""

    def zeros(self, model: Any, shape: tuple[int, ...]) -> Any:
        """Return two samples of zeros of ``shape``, or as many as the model was traced for."""

    def unusable(self, model: Any) -> dict[str, str]:
        """Return which weights a model cannot compute with, by name, and what is wrong with them.

        They are parameters and running statistics that are not finite, and running variances below 0 or of no channels.
        Other state, such as a mask, may well be infinite.
        """

    def to_numpy(self, value: Any) -> Array:
        """Return a tensor as an array, in float32 where it is narrower."""
