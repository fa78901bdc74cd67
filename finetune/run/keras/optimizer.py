"""The rule by which a Keras model learns."""

from collections.abc import Sequence
from typing import Any

import keras

from ....frameworks.keras import distinct_layers
from ....layers.keras import SwitchNormalization
from ...hooks.keras.norms import norm_parameters
from ..training import MAX_GRADIENT_NORM, MOMENTUM, Training
from .replicas import summed


class _SGD(keras.optimizers.SGD):  # type: ignore[misc]
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
        return super()._clip_gradients(summed(grads))  # type: ignore[no-any-return]

    def _all_reduce_sum_gradients(self, grads_and_vars: Any) -> list[tuple[Any, Any]]:
        return list(grads_and_vars)  # Keras would sum here, after each replica had clipped its part


def sgd(model: keras.Model, training: Training) -> _SGD:
    """Return the optimizer of a training, of all that can learn in ``model``."""
    switches = [layer for layer in distinct_layers(model) if isinstance(layer, SwitchNormalization)]
    norms = norm_parameters(model)
    spared = [v for v in model.trainable_variables if id(v) in norms or len(v.shape) <= 1]
    optimizer = _SGD(
        training.lr,
        name="sgd",
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
