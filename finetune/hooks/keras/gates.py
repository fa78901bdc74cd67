"""The gates of a Keras model, held and tempered."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import keras
from keras import ops

from ....frameworks.keras import distinct_layers, override
from ....layers.keras import SwitchNormalization
from .tracing import retrace, share


class Gates:
    """The gates of every SN of a model, while a schedule holds and tempers them.

    Raises `UnsupportedError` for gates that are to be held on the JAX backend.
    """

    def __init__(self, model: keras.Layer, *, held: bool, tempered: bool) -> None:
        self.layers: list[Any] = [layer for layer in distinct_layers(model) if isinstance(layer, SwitchNormalization)]
        self._model, self._tempers = model, tempered
        self._free = share("gates that are to be held", 1.0) if held and self.layers else None
        self._undo = ExitStack()

    def open(self) -> None:
        """Let the gates be held and tempered; what they compute stays."""
        if self._free is None:
            return
        self._undo.callback(retrace, self._model)
        for layer in self.layers:
            self._undo.callback(override(layer, "gates", self._passing))
        retrace(self._model)

    def _passing(self, gates: Callable[..., Any]) -> Callable[..., Any]:
        """Return the gates as ever, but with their gradients times a variable."""

        def passed() -> tuple[Any, ...]:
            constants = [(gate, ops.stop_gradient(gate)) for gate in gates()]
            return tuple(fixed + ops.cast(self._free, gate.dtype) * (gate - fixed) for gate, fixed in constants)

        return passed

    def hold(self, held: bool) -> None:
        """Let gradients reach the gates, or not."""
        if self._free is not None:
            self._free.assign(float(not held))

    def temper(self, temperature: float) -> None:
        """Set the temperature."""
        for layer in self.layers:
            layer.set_temperature(temperature)

    def fold(self) -> None:
        """Leave the temperature in the logits, which changes no gate."""
        for layer in self.layers if self._tempers else ():
            if float(layer.temperature) == 0:
                layer.harden()
            for logits in (layer.mean_weight, layer.var_weight):
                logits.assign(logits / ops.cast(layer.temperature, logits.dtype))
            layer.set_temperature(1.0)

    def close(self) -> None:
        """Leave plain gates of the same values."""
        self.hold(False)
        self._undo.close()
        self.fold()
