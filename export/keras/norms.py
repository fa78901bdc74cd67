"""The norms of a Keras model, each call of which stands for itself in the traced graph until a form takes its place.

Traced like any other layer, a norm would be up to 31 operators, in the framework's own layout.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from ...frameworks.keras import is_symbolic, named_layers, watching
from ...layers.keras import BatchRenormalization, SwitchNormalization
from ...patchers.keras.swap import MARK
from ..norms import BATCH, LAYER, Gates, Norm, amplification_of, three
from .graph import mark

_KINDS = (
    keras.layers.BatchNormalization,
    keras.layers.GroupNormalization,
    BatchRenormalization,
    SwitchNormalization,
)


class StandIns:
    """The calls of a model's norms in one trace; the n-th left the mark n."""

    def __init__(self, model: Any) -> None:
        self.calls: list[Norm] = []
        self._layers: dict[str, Any] = {}
        for name, layer in named_layers(model):
            if _has_form(layer) and all(layer is not other for other in self._layers.values()):
                self._layers[name] = layer
        self._norms = {name: _norm(name, layer) for name, layer in self._layers.items()}

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Note for each norm without running statistics how far its input's means are above its deviation."""
        seen: dict[str, float] = {}

        def note(name: str, inputs: Any, outputs: Any) -> None:
            if not is_symbolic(inputs):
                norm, x = self._norms[name], np.moveaxis(_double(inputs), self._layers[name].axis, 1)
                seen[name] = max(seen.get(name, 0.0), amplification_of(x, norm.groups, norm.eps))

        plain = {name: self._layers[name] for name, norm in self._norms.items() if norm.mean is None}
        with watching(plain, note):
            yield
        self._norms |= {name: replace(self._norms[name], seen=value) for name, value in seen.items()}

    @contextmanager
    def standing_in(self, within: Callable[[Any], bool]) -> Iterator[None]:
        """Let every norm return a mark in place of its own output for tensors that are ``within`` the graph itself.

        Those of a loop's body are not: a norm stays there what it is.
        """
        self.calls.clear()
        before = [vars(layer).get("call") for layer in self._layers.values()]
        for name, layer in self._layers.items():
            vars(layer)["call"] = self._stand_in(self._norms[name], layer, layer.call, within)
        try:
            yield
        finally:
            for layer, call in zip(self._layers.values(), before, strict=True):
                vars(layer).pop("call")
                vars(layer).update({} if call is None else {"call": call})

    def _stand_in(
        self, norm: Norm, layer: Any, call: Callable[..., Any], within: Callable[[Any], bool]
    ) -> Callable[..., Any]:
        def stand_in(inputs: Any, *args: Any, **kwargs: Any) -> Any:
            rank = len(inputs.shape)
            training = kwargs.get("training") or any(arg is True for arg in args)
            if training or layer.axis not in {-1, rank - 1, 1} or not within(inputs):
                return call(inputs, *args, **kwargs)
            last = rank > 2 and layer.axis != 1
            x = keras.ops.moveaxis(inputs, -1, 1) if last else inputs
            y = mark(x, len(self.calls))
            self.calls.append(norm.call(x.shape, self.calls))
            return keras.ops.moveaxis(y, 1, -1) if last else y

        return stand_in


def _has_form(layer: Any) -> bool:
    """Whether a layer is a norm whose ``call`` is its class's own, which ``compat`` changes in training alone."""
    if "call" in vars(layer) and MARK not in vars(layer):
        return False
    return layer.built and any(type(layer).call is kind.call for kind in _KINDS)


def _norm(name: str, layer: Any) -> Norm:
    (channels,) = layer.input_spec.axes.values()
    mean, var = _statistics(layer)
    return Norm(
        name=name,
        spatial=(),
        gamma=np.ones(channels) if layer.gamma is None else _double(layer.gamma),
        beta=np.zeros(channels) if layer.beta is None else _double(layer.beta),
        eps=float(layer.epsilon),
        gates=_gates(layer),
        mean=mean,
        var=var,
        groups=int(layer.groups) if isinstance(layer, keras.layers.GroupNormalization) else 1,
    )


def _gates(layer: Any) -> tuple[Gates, Gates]:
    if isinstance(layer, keras.layers.GroupNormalization):
        return LAYER, LAYER
    if not isinstance(layer, SwitchNormalization):
        return BATCH, BATCH
    mean, var = layer.gates()
    return three(_double(mean).tolist()), three(_double(var).tolist())


def _statistics(layer: Any) -> tuple[NDArray[np.float64] | None, NDArray[np.float64] | None]:
    if getattr(layer, "moving_mean", None) is None:
        return None, None
    return _double(layer.moving_mean), _double(layer.moving_variance)


def _double(tensor: Any) -> NDArray[np.float64]:
    return np.asarray(keras.ops.convert_to_numpy(tensor), np.float64)
