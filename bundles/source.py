"""A model from its source, ready to be patched, trained and exported."""

from pathlib import Path
from typing import Any

from ..frameworks.detect import framework_of
from ..patchers.patch import as_module
from ..sources.spec import load_source
from ..sources.weights import load_weights


def load_model(
    spec: str | Path, weights: str | Path | None = None, *, pretrained: bool = True, trust: bool = False
) -> Any:
    """Return the model that a name, a callable or a file stands for, ready to be patched, trained and exported.

    Args:
        spec: ``timm:NAME``, ``torchvision:NAME``, ``keras:NAME``, ``file.py:callable``, ``package.module:callable``, a
            ``.keras``, ``.h5`` or ``.hdf5`` file, or a ``.pt2`` file of `torch.export`. A callable is Python code and
            is run; it has to build a model each time.
        weights: A file with a state dict or Keras weights to load into it. Nothing in it is run.
        pretrained: False builds a zoo's architecture without fetching its weights.
        trust: Allows to read a ``.pt2`` file, which can run code while it is read.

    Raises:
        InputError: If there is no such model, it is not trusted, or the weights do not fit.
        UnsupportedError: If a callable returns the same model again.
        MissingDependencyError: If the zoo's package is not installed.

    Example:
        >>> import normswap
        >>> normswap.load_model("torch.nn:ReLU")
        ReLU()
    """
    model = as_module(load_source(spec, pretrained=pretrained and weights is None, trust=trust))
    framework_of(model)
    if weights is not None:
        load_weights(model, Path(weights))
    return model
