"""The momentum of a Keras model's moving statistics."""

from collections.abc import Callable

import keras

from ....frameworks.keras import distinct_layers
from ....layers.keras import BatchRenormalization
from ....layers.keras.norm import MovingNorm
from .tracing import retrace


def scale_momentum(model: keras.Layer, share: float, renorm: float) -> Callable[[], None]:
    """Let a batch weigh as the ``share`` of one in all moving statistics, and return what undoes it.

    In those of BRN one weighs ``renorm`` at most.
    """
    found = [m for m in distinct_layers(model) if isinstance(m, MovingNorm | keras.layers.BatchNormalization)]
    kept = [(layer, layer.momentum) for layer in found]
    for layer, momentum in kept:
        # Here it is the weight of the old value.
        layer.momentum = (max(momentum, 1 - renorm) if isinstance(layer, BatchRenormalization) else momentum) ** share
    retrace(model)  # of which it is a constant

    def undo() -> None:
        for layer, momentum in kept:
            layer.momentum = momentum
        retrace(model)

    return undo
