"""A MODEL argument of the command line, opened: a bundle, or anything `normswap.sources.spec` knows."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..data.preprocessing import Preprocessing, preprocessing_of
from ..errors import InputError
from ..frameworks.detect import framework_of, get_framework
from . import bundle as bundles
from .manifest import is_bundle, is_unfinished
from .source import load_model


class Opened:
    """A model and what is known of its input.

    ``options`` may hold ``input_shape``, ``size``, ``mean`` and ``std``, which come before what the model or bundle
    says, and ``trust`` in files that can run code while they are read. ``bundle`` is None for a model that is not
    one; ``example`` is a batch of zeros, or None if no shape is known.
    """

    def __init__(
        self, spec: str, weights: Path | None, options: Mapping[str, Any], *, need_bundle: bool = False
    ) -> None:
        trust = bool(options.get("trust"))
        bundled = need_bundle or is_bundle(spec) or is_unfinished(spec)
        self.bundle = bundles.read(spec, trust=trust) if bundled else None
        self.model = self.bundle.model if self.bundle else load_model(spec, weights, trust=trust)
        self.framework = framework_of(self.model)
        shape = options.get("input_shape")
        known = self.bundle.preprocessing if self.bundle else preprocessing_of(self.model, input_shape=shape)
        self.preprocessing = _adjust(known, self.framework, options)
        shape = shape or (self.preprocessing.shape if self.preprocessing else None)
        self.example = None if shape is None else get_framework(self.model).zeros(self.model, shape)

    def require_preprocessing(self) -> Preprocessing:
        """Return how images become the model's input; raises `InputError` if the shape of one is not known."""
        if self.preprocessing is None:
            raise InputError("expected the shape of one image, received none: give --input-shape")
        return self.preprocessing


def _adjust(known: Preprocessing | None, framework: str, options: Mapping[str, Any]) -> Preprocessing | None:
    """Return the preprocessing with what the options say in place of what is known."""
    changes = {name: options[name] for name in ("mean", "std") if options.get(name) is not None}
    first = framework == "torch"
    if (shape := options.get("input_shape")) is not None and len(shape) == 3:
        changes["shape"] = shape
    elif (size := options.get("size")) is not None:
        height, width = size if len(size) == 2 else size * 2
        channels = 3 if known is None else known.channels
        changes["shape"] = (channels, height, width) if first else (height, width, channels)
    if known is not None:
        return replace(known, **changes)
    return (
        Preprocessing(layout="channels_first" if first else "channels_last", **changes) if "shape" in changes else None
    )
