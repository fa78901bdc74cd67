"""A model from its source, ready to be patched, trained and exported."""

from pathlib import Path
from typing import Any

from ..frameworks.detect import framework_of
from ..patchers.patch import as_module
from ..sources.spec import load_source
from ..sources.weights import load_weights


def load_model(spec: str, weights: str | Path | None = None, *, pretrained: bool = True, trust: bool = False) -> Any:
    """Return the model ``spec`` names, with ``weights`` (a state dict, or Keras weights) loaded if given.

    ``pretrained=False`` builds a zoo's architecture without fetching its weights. A callable is Python code and
    is run. A ``.pt2`` file can run code while it is read, and is read with ``trust`` only.

    Raises `InputError` if there is no such model, it is not trusted or the weights do not fit,
    `MissingDependencyError` if the zoo's package is not installed.
    """
    model = as_module(load_source(spec, pretrained=pretrained and weights is None, trust=trust))
    framework_of(model)
    if weights is not None:
        load_weights(model, Path(weights))
    return model
