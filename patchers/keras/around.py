"""Find the models that hold layers of another: a classifier around a backbone, a feature extractor over its layers.

What such a model has compiled and what it optimizes are of the layers as they were, and no layer knows who holds it.
All models that live are asked for theirs.
"""

import gc

import keras

from ...frameworks.keras import distinct_layers


def models_around(model: keras.Layer) -> list[keras.Model]:
    """Return the models beside ``model`` that hold it or a layer of it that has weights, none of those within it."""
    within = distinct_layers(model)
    known, shared = set(map(id, within)), {id(layer) for layer in within if layer is model or layer.weights}
    # The type is asked, since a proxy's `isinstance` may load what it stands for.
    alive = [each for each in gc.get_objects() if issubclass(type(each), keras.Model) and id(each) not in known]
    built = [each for each in alive if vars(each).get("built")]  # else it has compiled nothing, and may be half made
    return [each for each in built if shared.intersection(map(id, distinct_layers(each)))]
