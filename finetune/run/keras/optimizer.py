"""The rule by which a Keras model learns."""

from collections.abc import Sequence
from typing import Any

import keras

from ....frameworks.keras import distinct_layers
from ....layers.keras import SwitchNormalization
from ...hooks.keras.norms import norm_parameters
from ..training import EPSILON, Training
from .replicas import summed


class _Rule(keras.optimizers.Optimizer):  # type: ignore[misc]
    """What an optimizer is made to do besides, in front of one of Keras's in a class's bases.

    Chosen variables learn at a multiple of the rate, the gradient of others has a share ``pull`` of their value added,
    and replicas clip what they have together.
    """

    def __init__(
        self, *args: Any, scaled: Sequence[Any], scale: float, pulled: Sequence[Any], pull: float, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self._scaled, self._scale = {id(variable) for variable in scaled}, scale
        self._pulled, self._pull = {id(variable) for variable in pulled}, pull
        self._scales: list[float] = []
        self._pulls: list[float] = []

    def build(self, variables: list[Any]) -> None:
        """Create the optimizer's variables."""
        super().build(variables)
        self._scales = [self._scale if id(variable) in self._scaled else 1.0 for variable in variables]
        self._pulls = [self._pull if id(variable) in self._pulled else 0.0 for variable in variables]

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Move one variable."""
        index = self._get_variable_index(variable)
        if pull := self._pulls[index]:
            gradient = gradient + pull * variable
        super().update_step(gradient, variable, learning_rate * self._scales[index])

    def _clip_gradients(self, grads: list[Any]) -> list[Any]:
        return super()._clip_gradients(summed(grads))  # type: ignore[no-any-return]

    def _all_reduce_sum_gradients(self, grads_and_vars: Any) -> list[tuple[Any, Any]]:
        return list(grads_and_vars)  # Keras would sum here, after each replica had clipped its part


class _SGD(_Rule, keras.optimizers.SGD):  # type: ignore[misc]
    pass


class _Adam(_Rule, keras.optimizers.Adam):  # type: ignore[misc]
    pass


class _AdamW(_Rule, keras.optimizers.AdamW):  # type: ignore[misc]
    pass


def optimizer_of(model: keras.Model, training: Training) -> keras.optimizers.Optimizer:
    """Return the optimizer of a training, of all that can learn in ``model``."""
    decay, momentum = training.weight_decay, training.setting("momentum")
    switches = [layer for layer in distinct_layers(model) if isinstance(layer, SwitchNormalization)]
    norms = norm_parameters(model)
    spared = [v for v in model.trainable_variables if id(v) in norms or len(v.shape) <= 1]
    known = {id(variable) for variable in spared}
    # Keras's own decay is apart from the gradient in every optimizer.
    rule, own, pull = {
        "sgd": (_SGD, {"momentum": momentum, "weight_decay": decay / (1 - momentum) or None}, 0.0),
        "adam": (_Adam, {"epsilon": EPSILON}, decay),
        "adamw": (_AdamW, {"epsilon": EPSILON, "weight_decay": decay}, 0.0),
        "amsgrad": (_Adam, {"epsilon": EPSILON, "amsgrad": True}, decay),
    }[training.optimizer]
    optimizer = rule(
        training.lr,
        name=training.optimizer,
        global_clipnorm=training.max_grad_norm or None,
        gradient_accumulation_steps=training.accumulate if training.accumulate > 1 else None,
        scaled=[v for layer in switches for v in (layer.mean_weight, layer.var_weight)],
        scale=training.gate_lr,
        pulled=[v for v in model.trainable_variables if id(v) not in known],
        pull=pull,
        **own,
    )
    if decay and not pull:
        optimizer.exclude_from_weight_decay(var_list=spared)
    return optimizer
