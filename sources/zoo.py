"""Models by their names in a zoo."""

import importlib
from collections.abc import Callable
from inspect import signature
from typing import Any

from ..errors import InputError, MissingDependencyError, NormswapError
from .keras.model_file import import_keras


def load_from_zoo(zoo: str, name: str, *, pretrained: bool) -> Any:
    """Return the model called ``name`` in one of `ZOOS`, with its published weights if ``pretrained``.

    Raises `InputError` if there is no such model, `MissingDependencyError` if the zoo's package is not installed.
    """
    return ZOOS[zoo](name, pretrained)


def _timm(name: str, pretrained: bool) -> Any:
    timm = _import("timm", "pip install timm")
    return _from_zoo("timm", name, lambda: timm.create_model(name, pretrained=pretrained))


def _torchvision(name: str, pretrained: bool) -> Any:
    models = _import("torchvision.models", "pip install torchvision, built for the installed torch")

    def build() -> Any:
        if pretrained:
            return models.get_model(name, weights="DEFAULT")
        # A detector's backbone has weights of its own, which are fetched unless they are refused.
        parts = signature(models.get_model_builder(name)).parameters.keys() & {"weights", "weights_backbone"}
        return models.get_model(name, **dict.fromkeys(parts))

    return _from_zoo("torchvision", name, build)


def _keras_application(name: str, pretrained: bool) -> Any:
    applications = import_keras().applications
    factory = getattr(applications, name, None)
    if not callable(factory):
        raise InputError(f"expected a model of keras.applications, received keras:{name}")
    return _from_zoo("keras", name, lambda: factory(weights="imagenet" if pretrained else None))


ZOOS: dict[str, Callable[[str, bool], Any]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "keras": _keras_application,
}


def _from_zoo(zoo: str, name: str, build: Callable[[], Any]) -> Any:
    try:
        return build()
    except NormswapError:
        raise
    except Exception as error:
        raise InputError(f"expected a model {zoo} can load, received {zoo}:{name}: {error}") from error


def _import(name: str, remedy: str) -> Any:
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:
        package = name.partition(".")[0]
        raise MissingDependencyError(f"a {package}: model needs {package}: {remedy} ({error})") from None
