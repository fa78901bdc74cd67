"""What of a Keras model learns, by what rule, and what that keeps."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

from ....errors import InputError
from ....frameworks.keras import distinct_layers
from ....layers.keras import BatchRenormalization, SwitchNormalization
from ....layers.keras.norm import MovingNorm
from ..training import LAST, MAX_GRADIENT_NORM, MOMENTUM, State, Training, check_train

Array = NDArray[Any]

NORMS = (
    keras.layers.BatchNormalization,
    keras.layers.GroupNormalization,
    keras.layers.LayerNormalization,
    keras.layers.RMSNormalization,
    BatchRenormalization,
    SwitchNormalization,
)

_POLICIES = {"no": "float32", "bf16": "mixed_bfloat16"}


def blocks(model: keras.Model) -> list[keras.Layer]:
    """Return the layers of ``model`` that have weights, in order, those of models inside it one by one."""
    return [layer for layer in distinct_layers(model) if layer.weights and not hasattr(layer, "layers")]


class SGD(keras.optimizers.SGD):  # type: ignore[misc]
    """SGD in which chosen variables learn at a multiple of the rate, and replicas clip what they have together."""

    def __init__(self, *args: Any, scaled: Sequence[Any], scale: float, **options: Any) -> None:
        super().__init__(*args, **options)
        self._scaled, self._scale = {id(variable) for variable in scaled}, scale
        self._scales: list[float] = []

    def build(self, variables: list[Any]) -> None:
        """Create the optimizer's variables."""
        super().build(variables)
        self._scales = [self._scale if id(variable) in self._scaled else 1.0 for variable in variables]

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Move one variable."""
        super().update_step(gradient, variable, learning_rate * self._scales[self._get_variable_index(variable)])

    def _clip_gradients(self, grads: list[Any]) -> list[Any]:
        return super()._clip_gradients(_summed(grads))  # type: ignore[no-any-return]

    def _all_reduce_sum_gradients(self, grads_and_vars: Any) -> list[tuple[Any, Any]]:
        return list(grads_and_vars)  # Keras would sum here, after each replica had clipped its part


def sgd(model: keras.Model, training: Training) -> SGD:
    """Return the optimizer of a training."""
    norms = [layer for layer in distinct_layers(model) if isinstance(layer, NORMS)]
    switches = [layer for layer in norms if isinstance(layer, SwitchNormalization)]
    spared = [v for layer in norms for v in layer.trainable_variables]
    spared += [v for v in model.trainable_variables if len(v.shape) <= 1]
    optimizer = SGD(
        training.lr,
        momentum=MOMENTUM,
        global_clipnorm=MAX_GRADIENT_NORM,
        weight_decay=training.weight_decay / (1 - MOMENTUM) or None,
        gradient_accumulation_steps=training.accumulate if training.accumulate > 1 else None,
        scaled=[v for layer in switches for v in (layer.mean_weight, layer.var_weight)],
        scale=training.gate_lr,
    )
    if training.weight_decay:
        optimizer.exclude_from_weight_decay(var_list=spared)
    return optimizer


def replicas() -> int:
    """Return among how many replicas the active strategy divides a batch."""
    if keras.backend.backend() != "tensorflow":
        return 1
    import tensorflow as tf

    return int(tf.distribute.get_strategy().num_replicas_in_sync)


def _summed(grads: list[Any]) -> list[Any]:
    """Return the sums of gradients over all replicas."""
    if replicas() == 1:
        return grads
    import tensorflow as tf

    context = tf.distribute.get_replica_context()
    return list(context.all_reduce(tf.distribute.ReduceOp.SUM, grads))


@contextmanager
def synchronized(model: keras.Model) -> Iterator[None]:
    """Take the batch statistics of SN and BRN over all replicas."""
    found = [layer for layer in distinct_layers(model) if isinstance(layer, MovingNorm)] if replicas() > 1 else []
    flags = [layer.synchronized for layer in found]
    for layer in found:
        layer.synchronized = True
    try:
        yield
    finally:
        for layer, flag in zip(found, flags, strict=True):
            layer.synchronized = flag


class Precision:
    """The policies of a model's layers: in a training's passes those of its precision, else their own.

    Layers with a policy of their choice keep it, and so do those that end in a softmax, of which too little is left.
    """

    def __init__(self, model: keras.Model, precision: str) -> None:
        self._policy = _POLICIES[precision]
        layers = [layer for layer in distinct_layers(model) if layer.dtype_policy.name == "float32"]
        self._layers = [] if precision == "no" else [layer for layer in layers if not _is_softmax(layer)]

    def narrow(self) -> None:
        """Give the layers the training's policy."""
        self._give(self._policy)

    def restore(self) -> None:
        """Give the layers their own."""
        self._give("float32")

    def _give(self, policy: str) -> None:
        for layer in self._layers:
            layer.dtype_policy = policy


def _is_softmax(layer: keras.Layer) -> bool:
    return isinstance(layer, keras.layers.Softmax) or getattr(layer, "activation", None) is keras.activations.softmax


class Average:
    """An exponential moving average of variables; none with a decay of 0."""

    def __init__(self, variables: Sequence[Any], decay: float) -> None:
        self.variables, self.decay = variables, decay
        self.values = [copied(variable) for variable in variables] if decay else []

    def update(self) -> None:
        """Move towards the variables."""
        for value, variable in zip(self.values, self.variables, strict=False):
            value += (1 - self.decay) * (ops.convert_to_numpy(variable) - value)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the variables the average's values for a while."""
        kept = [copied(variable) for variable in self.variables] if self.values else []
        assign(self.variables, self.values)
        try:
            yield
        finally:
            assign(self.variables, kept)


class Learning:
    """Lets only the chosen variables learn, those that are frozen already never; restores the flags at the end.

    Layers before the last N are frozen as layers, statistics and all.
    """

    def __init__(self, model: keras.Model, which: str) -> None:
        check_train(which)
        self._layers = [(layer, layer.trainable) for layer in distinct_layers(model)]
        self._flags = [(variable, variable.trainable) for variable in model.weights]
        frozen: list[keras.Layer] = []
        if which == "norm":
            norms = [layer for layer in distinct_layers(model) if isinstance(layer, NORMS)]
            chosen = {id(variable) for norm in norms for variable in norm.trainable_variables}
        elif match := LAST.fullmatch(which):
            parts, number = blocks(model), int(match[1])
            if number > len(parts):
                raise InputError(
                    f"expected last:N with N up to the model's {len(parts)} layers with weights, "
                    f"received train={which!r}"
                )
            frozen = parts[: len(parts) - number]
            chosen = {id(v) for part in parts[len(parts) - number :] for v in part.trainable_variables}
        else:
            chosen = {id(variable) for variable in model.trainable_variables}
        for layer in frozen:
            layer.trainable = False
        for variable, _ in self._flags:
            variable.trainable = id(variable) in chosen

    def keep(self) -> None:
        """Keep what is frozen so, which in Keras it is."""

    def close(self) -> None:
        """Let learn what did before."""
        for layer, flag in self._layers:
            layer._trainable = flag  # what is public would set all layers below it
        for variable, flag in self._flags:
            variable.trainable = flag

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def save_state(optimizer: Any, average: Average) -> dict[str, Array]:
    """Return the values of the optimizer's variables and of the average."""
    found = {f"optimizer.{index}": copied(variable) for index, variable in enumerate(optimizer.variables)}
    return found | {f"average.{index}": value.copy() for index, value in enumerate(average.values)}


def load_state(optimizer: Any, average: Average, state: State) -> None:
    """Take what `save_state` returned."""
    assign(optimizer.variables, [state[f"optimizer.{index}"] for index in range(len(optimizer.variables))])
    average.values = [np.array(state[f"average.{index}"]) for index in range(len(average.values))]


def assign(variables: Sequence[Any], values: Sequence[Array]) -> None:
    """Give each variable its value."""
    for variable, value in zip(variables, values, strict=False):
        variable.assign(value)


def copied(variable: Any) -> Array:
    """Return the value of a variable, which on the torch backend would go on changing."""
    return np.array(ops.convert_to_numpy(variable))
