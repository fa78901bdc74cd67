"""What of a Keras model learns."""

from contextlib import ExitStack
from typing import Self

import keras

from ....errors import InputError
from ....frameworks.keras import distinct_layers
from ..freeze import check_train
from .norms import norm_parameters
from .tracing import retrace


def blocks(model: keras.Layer) -> list[keras.Layer]:
    """Return the layers of ``model`` that have weights, in order, those of models inside it one by one."""
    return [layer for layer in distinct_layers(model) if layer.weights and not hasattr(layer, "layers")]


def check_part(model: keras.Layer, train: str) -> None:
    """Raise `InputError` unless ``train`` names a part of ``model``."""
    number = check_train(train)
    if number is not None and number > (count := len(blocks(model))):
        raise InputError(
            f"expected last:N with N up to the model's {count} layers with weights, received train={train!r}"
        )


class Learning:
    """Lets only the variables that ``train`` names learn, those that are frozen already never.

    Layers before the last N are frozen as layers, statistics and all. It changes nothing before it is opened or
    entered, and restores the flags when it is closed.

    Raises `InputError` where ``train`` names no part of the model.
    """

    def __init__(self, model: keras.Layer, train: str) -> None:
        check_part(model, train)
        self._model, self._train = model, train
        self._undo = ExitStack()

    def open(self) -> None:
        """Freeze the rest; raises `InputError` where an optimizer for all of it is there, which JAX cannot use."""
        number = check_train(self._train)
        frozen: list[keras.Layer] = []
        chosen = {id(variable) for variable in self._model.trainable_variables}
        if self._train == "norm":
            chosen = norm_parameters(self._model)
        elif number is not None:
            parts = blocks(self._model)
            frozen = parts[: len(parts) - number]
            chosen = {id(v) for part in parts[len(parts) - number :] for v in part.trainable_variables}
        self._require_optimizer_of(chosen)
        self._undo.callback(retrace, self._model)
        for variable in self._model.weights:
            self._undo.callback(setattr, variable, "trainable", variable.trainable)
        for layer in distinct_layers(self._model):
            # What is public would set all layers below it.
            self._undo.callback(setattr, layer, "_trainable", layer.trainable)
        for layer in frozen:
            layer.trainable = False
        for variable in self._model.weights:
            variable.trainable = id(variable) in chosen
        retrace(self._model)

    def _require_optimizer_of(self, chosen: set[int]) -> None:
        optimizer = getattr(self._model, "optimizer", None)
        if keras.backend.backend() != "jax" or optimizer is None or not optimizer.built:
            return  # elsewhere it passes over what it is given no gradients of
        built = optimizer._trainable_variables
        if {id(variable) for variable in built} != chosen:
            raise InputError(
                f"expected a model whose optimizer is not built yet, received one built for {len(built)} variables "
                f"where train={self._train!r} leaves {len(chosen)}; open the hook before compile and fit, as "
                "`with Freeze(...):` around both does"
            )

    def keep(self) -> None:
        """Keep the rest frozen, which in Keras it is."""

    def close(self) -> None:
        """Let learn what did before."""
        self._undo.close()

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
