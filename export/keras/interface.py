"""The inputs and outputs of a Keras model: their names, shapes and order."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import keras

from ...errors import InputError, UnsupportedError
from .calls import unique

Shape = Sequence[int | None]
Specs = Mapping[str, tuple[tuple[int | None, ...], str]]
"""Shape without the batch, and dtype, of each input by name."""


class Inputs:
    """The inputs of a model: their names, shapes and dtypes, and how the model takes them."""

    def __init__(self, model: Any, shapes: Sequence[Shape]) -> None:
        if not model.built:
            raise UnsupportedError(
                f"expected a model that knows its weights, received {type(model).__name__} {model.name!r} that was "
                "never called; call it once on a batch"
            )
        self._model = model
        self._symbolic = getattr(model, "inputs", None) or None
        if self._symbolic is not None:
            own = [layer_name(tensor) for tensor in self._symbolic]
            dtypes = [tensor.dtype for tensor in self._symbolic]
            _require_fitting(shapes, dict(zip(own, input_shapes(model) or [], strict=True)))
        else:
            own = self._parameters(len(shapes))
            dtypes = ["float32"] * len(own)
        self.specs: dict[str, tuple[tuple[int | None, ...], str]] = {}
        for name, shape, dtype in zip(own, shapes, dtypes, strict=True):
            self.specs[unique(name, self.specs)] = (tuple(shape), dtype)
        self.names = list(self.specs)

    def pack(self, tensors: Sequence[Any]) -> tuple[Any, ...]:
        """Return ``tensors`` as the positional arguments of the model's ``call``."""
        if self._symbolic is None:
            return tuple(tensors) if self._one_each else (list(tensors),)
        if isinstance(self._model, keras.Sequential):
            return (tensors[0],)
        return (keras.tree.pack_sequence_as(self._model.input, list(tensors)),)

    def _parameters(self, count: int) -> list[str]:
        signature = inspect.signature(self._model.call)
        parameters = [
            parameter.name
            for parameter in signature.parameters.values()
            if parameter.kind in {parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD}
            and parameter.name not in {"training", "mask"}
        ]
        self._one_each = count == 1 or count <= len(parameters)
        if self._one_each:
            return parameters[:count]
        return [f"{parameters[0]}_{index}" for index in range(count)]


def input_shapes(model: Any) -> list[tuple[int | None, ...]] | None:
    """Return the shape of each input of ``model`` without the batch, or None where the model does not know."""
    inputs = getattr(model, "inputs", None)
    return None if not inputs else [tuple(tensor.shape[1:]) for tensor in inputs]


def opened(model: Any, shapes: Sequence[Shape]) -> list[tuple[int | None, ...]]:
    """Return ``shapes`` with every size left open that the model leaves open: without inputs of its own, all spatial.

    Raises `UnsupportedError` if the model leaves none open.
    """
    own = input_shapes(model)
    if own is None:
        last = keras.config.image_data_format() == "channels_last"
        return [
            tuple(size if axis == (len(shape) - 1 if last else 0) else None for axis, size in enumerate(shape))
            for shape in shapes
        ]
    if not any(size is None for shape in own for size in shape):
        inputs = ", ".join(f"{layer_name(tensor)}={shape}" for tensor, shape in zip(model.inputs, own, strict=True))
        raise UnsupportedError(
            f"expected a model that leaves height and width open, received one with inputs of {inputs}; "
            "build it with None for them"
        )
    return own


def named_outputs(result: Any, model: Any, taken: Sequence[str]) -> dict[str, Any]:
    """Return the tensors of ``result`` by name: the keys of a dictionary, or else the output layers."""
    flat = keras.tree.flatten_with_path(result)
    own = getattr(model, "output_names", None) or list(map(layer_name, getattr(model, "outputs", None) or []))
    if len(own) != len(flat):
        own = ["output"] if len(flat) == 1 else [f"output_{index}" for index in range(len(flat))]
    named: dict[str, Any] = {}
    for (path, tensor), name in zip(flat, own, strict=True):
        if any(isinstance(key, str) for key in path):
            name = "/".join(str(key) for key in path)
        named[unique(name, [*taken, *named])] = tensor
    return named


def layer_name(tensor: Any) -> str:
    """Return the layer behind a symbolic tensor; unlike the tensor's own name, it survives saving."""
    return str(tensor._keras_history.operation.name)


def _require_fitting(shapes: Sequence[Shape], own: Mapping[str, Shape]) -> None:
    def fits(given: Shape, expected: Shape) -> bool:
        return len(given) == len(expected) and all(b is None or a == b for a, b in zip(given, expected, strict=True))

    if len(shapes) != len(own) or not all(map(fits, shapes, own.values())):
        expected = ", ".join(f"{name}={tuple(shape)}" for name, shape in own.items())
        raise InputError(
            f"expected one input shape without the batch for each of {expected}, "
            f"received shapes={[tuple(shape) for shape in shapes]}"
        )
