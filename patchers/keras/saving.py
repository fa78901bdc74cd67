"""Let layers whose own code builds their BatchNorms be saved patched.

Keras saves a layer of a class of the user's as its constructor's arguments, from which its class builds BatchNorms
again, and linear layers without the bias that equalizing gave them, and the saved weights do not fit. While such
changes are in such a layer, its class is therefore a subclass that saves them too and makes them when it is loaded.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import keras

from ...convert.recipe import Recipe
from ...errors import InputError
from ...frameworks.keras import build_shape, distinct_layers, named_layers
from .equalized import BIASED, Absorbed
from .fronts import channels_of
from .loading import keep_whole
from .swap import FRONT, MARK, BatchNorm, Swap


def keep_rebuildable(model: keras.Layer) -> None:
    """Let every layer of ``model`` be saved with the replacements below it, or as ever where there are none."""
    for layer in distinct_layers(model):
        cls: Any = getattr(type(layer), "rebuilt", type(layer))
        if not cls.__module__.startswith("keras."):
            below = [each for each in distinct_layers(layer) if each is not layer]
            changed = any(MARK in each.__dict__ for each in below)
            changed |= any(BIASED in each.__dict__ for each in (layer, *below))
            layer.__class__ = _rebuilding(cls) if changed else cls


def mark(model: keras.Layer, recipe: Recipe) -> Recipe:
    """Mark the replaced layers of a loaded model, since a GroupNorm does not tell that it was a BatchNorm.

    Returns the recipe with the names that the layers have in this model. Raises `InputError` if a layer of the recipe
    is not there or is a BatchNorm again.
    """
    found, new = dict(named_layers(model)), _present_names(model)
    choices = [
        replace(each, name=new.get(each.name, each.name), front=new.get(each.front, each.front))
        for each in recipe.choices
    ]
    for choice in choices:
        layer = found.get(choice.name)
        if isinstance(layer, BatchNorm) and choice.target.kind == "bn":
            continue  # a layer like any other
        if layer is None or isinstance(layer, BatchNorm):
            kind = "no such layer" if layer is None else type(layer).__name__
            raise InputError(
                f"expected {choice.name} to be {choice.target.kind} in the bundle's model, received {kind}"
            )
        layer.__dict__[MARK] = choice.target.kind
        layer.__dict__.update({FRONT: choice.front} if choice.front else {})
    keep_whole(model)
    return replace(recipe, choices=tuple(choices))


def _present_names(model: keras.Layer) -> dict[str, str]:
    """Return for every layer that a class has built again, by its name when it was saved, the name that it has."""
    present = {id(layer): name for name, layer in reversed(list(named_layers(model)))}
    names: dict[str, str] = {}
    for name, layer in named_layers(model):
        if isinstance(layer, Rebuilt):
            inner: Any = layer
            prefix = "" if layer is model else f"{name}/"
            for saved, below in inner._saved_names().items():
                names.setdefault(f"{prefix}{saved}", present[id(below)])
    return names


class Rebuilt:
    """What a class gets in front that rebuilds its layers: replacements and new biases are saved and put back.

    ``rebuilt`` is the class it stands in for.
    """

    rebuilt: type[keras.Layer]

    def get_config(self) -> dict[str, Any]:
        """Return what the class would have saved, every replacement by its name, and what has a new bias."""
        layer: Any = self
        cls, replaced = self.rebuilt, {name: each for name, each in named_layers(layer) if MARK in each.__dict__}
        below = list(named_layers(layer))[1:]
        biased = [*([""] if BIASED in layer.__dict__ else []), *(n for n, each in below if BIASED in each.__dict__)]
        mine, layer.__class__ = type(self), cls  # Keras derives a config from the class that asks
        try:
            config = layer.get_config()
        finally:
            layer.__class__ = mine
        name = keras.saving.get_registered_name(cls)
        return {
            "layer": {"module": cls.__module__, "class_name": cls.__name__, "registered_name": name, "config": config},
            "replaced": {name: [each.__dict__[MARK], _serialized(each)] for name, each in replaced.items()},
            "biased": biased,
            "places": {name: list(place) for name, place, _ in _placed(layer)},
        }

    @staticmethod
    def from_config(config: dict[str, Any]) -> Any:
        """Return the layer that its class builds, with those replacements back that are built by then."""
        layer = keras.saving.deserialize_keras_object(config["layer"])
        cls: Any = type(layer)
        layer.__dict__["_replaced"], layer.__dict__["_biased"] = config["replaced"], config.get("biased", [])
        layer.__dict__["_places"] = config.get("places", {})
        layer.__class__ = _rebuilding(cls)
        layer._put_back()
        return layer

    def load_own_variables(self, store: Any) -> None:
        """Put the other replacements back, now that all is built, then load; the layers below load after this."""
        self._put_back()
        super().load_own_variables(store)  # type: ignore[misc]

    def _saved_names(self) -> dict[str, keras.Layer]:
        """Return the layers below, as far as they are built, by the names they had when this one was saved.

        Keras numbers the layers that it names itself through all models of a process, so that they have other names
        now; what stays is which layer of its parent each one is.
        """
        layer: Any = self
        places = {tuple(place): name for name, place in self.__dict__.get("_places", {}).items()}
        return {places.get(place, name): below for name, place, below in _placed(layer)}

    def _put_back(self) -> None:
        found = self._saved_names()
        for name in self.__dict__.get("_biased", []):
            layer: Any = found.get(name) if name else self
            if layer is not None and channels_of(layer) and layer.bias is None:
                Absorbed(name, layer, "full").apply(None)
        for name, (kind, config) in self.__dict__.get("_replaced", {}).items():
            layer = found.get(name)
            if isinstance(layer, BatchNorm) and build_shape(layer) is not None:
                Swap(layer, name, keras.saving.deserialize_keras_object(config), kind, {}).apply()


def _placed(layer: keras.Layer) -> Iterator[tuple[str, tuple[int, ...], keras.Layer]]:
    """Yield every layer below with its name and its place, which is a number in each layer on the way to it."""
    for (name, below), place in zip(list(named_layers(layer))[1:], _ways(layer), strict=True):
        yield name, place, below


def _ways(layer: Any, way: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    for number, child in enumerate(layer._layers):
        yield (*way, number)
        yield from _ways(child, (*way, number))


@cache
def _rebuilding(cls: Any) -> type[keras.Layer]:
    names = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    register: Callable[[type], type] = keras.saving.register_keras_serializable("normswap", "Rebuilt")
    return register(type(cls.__name__, (Rebuilt, cls), {**names, "rebuilt": cls}))


def _serialized(layer: keras.Layer) -> dict[str, Any]:
    config: dict[str, Any] = keras.saving.serialize_keras_object(layer)
    config.pop("build_config", None)
    return config


keras.saving.register_keras_serializable("normswap", "Rebuilt")(Rebuilt)
