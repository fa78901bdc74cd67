"""The variables of a Keras model's normalization layers."""

import keras

from ....frameworks.keras import distinct_layers
from ....layers.keras.norm import MovingNorm

_NORMS = (
    keras.layers.BatchNormalization,
    keras.layers.GroupNormalization,
    keras.layers.LayerNormalization,
    keras.layers.RMSNormalization,
    MovingNorm,
)


def norm_parameters(model: keras.Layer) -> set[int]:
    """Return the ids of all normalization layers' own trainable variables."""
    norms = [layer for layer in distinct_layers(model) if isinstance(layer, _NORMS)]
    return {id(variable) for norm in norms for variable in norm.trainable_variables}
