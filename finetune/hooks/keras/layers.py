"""The layers of a Keras model, by name."""

import keras

from ....patchers.keras.sites import find_sites


def replaced(model: keras.Layer) -> dict[str, keras.Layer]:
    """Return the replaced layers, each by the first of its names."""
    found = zip(*find_sites(model), strict=True)
    return {site.name: layer for layer, site in found if site.kind is not None}
