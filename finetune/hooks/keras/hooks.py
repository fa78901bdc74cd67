"""What the hooks do to a Keras model."""

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import keras
from keras import ops

from ....errors import InputError, UnsupportedError
from ....frameworks.keras import distinct_layers, named_layers
from ....layers.keras import BatchRenormalization, SwitchNormalization
from ....layers.keras.norm import MovingNorm
from ....layers.keras.statistics import wide
from ....patchers.keras.sites import find_sites
from ....patchers.keras.swap import BatchNorm
from ...run.keras.optimizer import Learning
from .statistics import moving_layers, override, update_statistics

__all__ = [
    "Gates",
    "Learning",
    "blend",
    "layers",
    "moving_layers",
    "replaced",
    "scale_momentum",
    "set_limits",
    "update_statistics",
]


class Gates:
    """The gates of every SN of a model, while a schedule holds and tempers them."""

    def __init__(self, model: keras.Layer, *, held: bool, tempered: bool) -> None:
        self.layers = [layer for layer in distinct_layers(model) if isinstance(layer, SwitchNormalization)]
        self._tempered = tempered
        self._undo: list[Callable[[], None]] = []
        if held and self.layers:
            self._free = _share("gates that are to be held", 0.0)
            self._undo = [override(layer, "gates", self._passing(layer.gates)) for layer in self.layers]
            self._undo.append(_retracing(model))

    def _passing(self, gates: Callable[[], tuple[Any, ...]]) -> Callable[[], tuple[Any, ...]]:
        """Return the gates as ever, but with their gradients times a variable."""

        def passed() -> tuple[Any, ...]:
            constants = [(gate, ops.stop_gradient(gate)) for gate in gates()]
            return tuple(fixed + ops.cast(self._free, gate.dtype) * (gate - fixed) for gate, fixed in constants)

        return passed

    def hold(self, held: bool) -> None:
        """Let gradients reach the gates, or not."""
        if self._undo:
            self._free.assign(float(not held))

    def temper(self, temperature: float) -> None:
        """Set the temperature."""
        for layer in self.layers:
            layer.set_temperature(temperature)

    def fold(self) -> None:
        """Leave the temperature in the logits, which changes no gate."""
        for layer in self.layers if self._tempered else ():
            if float(layer.temperature) == 0:
                layer.harden()
            for logits in (layer.mean_weight, layer.var_weight):
                logits.assign(logits / ops.cast(layer.temperature, logits.dtype))
            layer.set_temperature(1.0)

    def close(self) -> None:
        """Leave plain gates of the same values."""
        self.hold(False)
        while self._undo:
            self._undo.pop()()
        self.fold()


class _Mix:
    """A call in place of a layer's own, which mixes a frozen BatchNorm into its output."""

    def __init__(self, layer: keras.Layer, norm: keras.Layer, retrace: Callable[[], None]) -> None:
        parts = (norm.moving_mean, norm.moving_variance, norm.gamma, norm.beta)
        mean, var, gamma, beta = (None if part is None else ops.convert_to_numpy(part) for part in parts)
        self._share = _share("a blend", 1.0)
        run = layer.call

        @wraps(run)
        def call(inputs: Any, *args: Any, **kwargs: Any) -> Any:
            output = run(inputs, *args, **kwargs)
            before = ops.batch_normalization(wide(inputs), mean, var, norm.axis, beta, gamma, norm.epsilon)
            share = ops.cast(self._share, output.dtype)
            return (1 - share) * output + share * ops.cast(before, output.dtype)

        self._undo = [override(layer, "call", call), retrace]

    def set(self, share: float) -> None:
        """Set the BatchNorm's share."""
        self._share.assign(share)

    def close(self) -> None:
        """Take the BatchNorm out."""
        self.set(0.0)
        while self._undo:
            self._undo.pop()()


def blend(model: keras.Layer, reference: keras.Layer) -> list[_Mix]:
    """Return what mixes the reference's BatchNorm into each replaced layer, in the order of the model."""
    found, known = replaced(model), dict(named_layers(reference))
    if not found:
        raise UnsupportedError("expected a patched model to blend, received one without replaced layers")
    if unfit := [name for name in found if not isinstance(known.get(name), BatchNorm)]:
        raise InputError(
            "expected a reference with the BatchNorms and running statistics of the model before the patch, "
            f"received one without them at {', '.join(unfit)}"
        )
    retrace = _retracing(model)
    return [_Mix(layer, known[name], retrace) for name, layer in found.items()]


def layers(model: keras.Layer) -> list[keras.Layer]:
    """Return ``model`` and every layer below it once."""
    return distinct_layers(model)


def set_limits(renorms: Iterable[Any], r_max: float, d_max: float) -> None:
    """Set the limits of every BRN."""
    values = ops.convert_to_tensor(r_max, "float32"), ops.convert_to_tensor(d_max, "float32")
    for layer in renorms:
        layer._take_limits((r_max, d_max), values)


def replaced(model: keras.Layer) -> dict[str, keras.Layer]:
    """Return the replaced layers, each by the first of its names."""
    found = zip(*find_sites(model), strict=True)
    return {site.name: layer for layer, site in found if site.kind is not None}


def _share(what: str, value: float) -> Any:
    """Return a variable that is no layer's; raises `UnsupportedError` where compiled code would not read it anew."""
    if keras.backend.backend() == "jax":
        raise UnsupportedError(f"expected the TensorFlow or PyTorch backend for {what}, received backend='jax'")
    return keras.Variable(value, trainable=False, autocast=False, name="share")


def _retracing(model: keras.Layer) -> Callable[[], None]:
    """Have every model within trace its functions anew, now and when what is returned is called."""
    models = [layer for layer in distinct_layers(model) if isinstance(layer, keras.Model)]

    def forget() -> None:
        for each in models:
            each.train_function = each.test_function = each.predict_function = None

    forget()
    return forget


def scale_momentum(model: keras.Layer, share: float, renorm: float) -> Callable[[], None]:
    """Let a batch weigh as the ``share`` of one in all moving statistics, and return what undoes it.

    In those of BRN one weighs ``renorm`` at most.
    """
    found = [m for m in distinct_layers(model) if isinstance(m, MovingNorm | keras.layers.BatchNormalization)]
    kept = [(layer, layer.momentum) for layer in found]
    for layer, momentum in kept:
        # Here it is the weight of the old value.
        layer.momentum = (max(momentum, 1 - renorm) if isinstance(layer, BatchRenormalization) else momentum) ** share

    def undo() -> None:
        for layer, momentum in kept:
            layer.momentum = momentum

    return undo
