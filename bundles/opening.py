"""A MODEL argument of the command line, opened: a bundle, or anything `normswap.sources.spec` knows."""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..data.dataset import Data, open_data
from ..data.named import NamedInputs
from ..data.preprocessing import Preprocessing, preprocessing_of
from ..errors import InputError, UnsupportedError, UsageError, named, option, said
from ..frameworks.detect import framework_of, get_framework
from ..frameworks.example import not_taken
from ..sources.hub import is_hub
from ..sources.memory import require_memory
from ..sources.named_arrays import read_inputs
from ..sources.spec import PROGRAM_SUFFIX, problem_of
from . import bundle as bundles
from .manifest import Drifts, is_bundle, is_unfinished
from .source import load_model


@dataclass(frozen=True)
class ModelOptions:
    """What is said of a model beside its name; None leaves it to what the model or the bundle says.

    ``weights`` is a file to load into what a source builds. ``input_shape`` is one sample's shape as the model takes
    it, ``example`` an ``.npz`` of named arrays in its place (see `sources.named_arrays`), ``size`` an image's height
    and width, or one number for both, where only they differ. ``mean`` is subtracted from images in 0..1 and ``std``
    divides them, one number or one for each channel. ``trust`` allows to read files that can run code while they are
    read, ``trust_code`` to run the code that a bundle's source names.

    Raises `UsageError` for two of ``input_shape``, ``example`` and ``size``.
    """

    weights: Path | None = None
    input_shape: tuple[int, ...] | None = None
    size: tuple[int, ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    trust: bool = False
    trust_code: bool = False
    example: Path | None = None

    def __post_init__(self) -> None:
        shapes = [name for name in ("input_shape", "size", "example") if getattr(self, name) is not None]
        if len(shapes) > 1:
            wanted = " and ".join(map(named, shapes[:2]))
            raise UsageError(f"expected one of {wanted}, received {self.told(*shapes)}")

    def given(self) -> list[str]:
        """Return the names of the options that say something."""
        return [field.name for field in fields(self) if getattr(self, field.name) not in (None, False)]

    def told(self, *names: str) -> str:
        """Return options as they were given, for a message."""
        values = {name: getattr(self, name) for name in names}
        texts = {name: ",".join(map(str, v)) if isinstance(v, tuple) else str(v) for name, v in values.items()}
        return ", ".join(option(name, True if values[name] is True else text) for name, text in texts.items())

    def only(self, *names: str) -> "ModelOptions":
        """Return these options without all but ``names``."""
        return ModelOptions(**{name: getattr(self, name) for name in names})


def is_onnx(spec: str) -> bool:
    """Return whether ``spec`` is an ONNX file in place of a model, which a repository can be called like."""
    return spec.endswith(".onnx") and not is_hub(spec)


def reads(spec: str) -> list[str]:
    """Return the names of the `ModelOptions` that what ``spec`` names has a use for."""
    if is_onnx(spec):
        return ["mean", "std"]
    bundle = _is_bundle(spec)
    unread = {"weights"} if bundle else {"trust_code"} if spec.endswith(PROGRAM_SUFFIX) else {"trust", "trust_code"}
    return [field.name for field in fields(ModelOptions) if field.name not in unread]


def require_read(options: ModelOptions, *specs: str) -> None:
    """Raise `UsageError` if an option says something that none of the models has a use for."""
    read = {name for spec in specs for name in reads(spec)}
    takes = {"trust": f"a {PROGRAM_SUFFIX} file, or a bundle,", "trust_code": "a bundle"}
    for name, kind in takes.items():
        if getattr(options, name) and name not in read:
            raise UsageError(f"expected {kind} for {option(name)}, received {' and '.join(specs)}; leave that out")
    if unread := [name for name in options.given() if name not in read]:
        models = " and ".join(f"{'the bundle' if _is_bundle(spec) else 'the ONNX file'} {spec}" for spec in specs)
        own = "which tells its own" if len(specs) == 1 else "which tell their own"
        raise _unread(options, unread, f"{models}, {own}")


def require_unread(options: ModelOptions, bundle: str) -> None:
    """Raise `UsageError` for any option beside a bundle whose files alone are read."""
    if told := [name for name in options.given() if name not in ("trust", "trust_code")]:
        raise _unread(options, told, f"the bundle {bundle}, which tells its own")
    if trusted := options.given():
        raise _unread(options, trusted, f"the bundle {bundle}, of which nothing is run")


def _unread(options: ModelOptions, names: list[str], models: str) -> UsageError:
    flags = ", ".join(map(named, names))
    return UsageError(f"expected no {flags} beside {models}, received {options.told(*names)}; leave that out")


class Opened:
    """A model and what is known of its input; ``options`` come before what the model or bundle says.

    ``bundle`` is None for a model that is not one; ``example`` is what the options say, or else a batch of
    zeros, or None if no shape is known.
    ``pretrained=False`` builds a zoo's architecture without fetching its weights.

    Raises `UsageError` for options that nothing reads, an example that memory does not hold, and what names no model.
    """

    def __init__(self, spec: str, options: ModelOptions, *, need_bundle: bool = False, pretrained: bool = True) -> None:
        require_read(options, spec)
        self.spec, self.options = spec, options
        bundled = need_bundle or _is_bundle(spec)
        self.bundle = bundles.read(spec, trust=options.trust, trust_code=options.trust_code) if bundled else None
        if self.bundle is not None:
            self.model = self.bundle.model
        else:
            if problem := problem_of(spec):
                raise UsageError(problem)
            self.model = load_model(spec, options.weights, pretrained=pretrained, trust=options.trust)
        self.framework = framework_of(self.model)
        shape = options.input_shape
        known = self.bundle.preprocessing if self.bundle else preprocessing_of(self.model, input_shape=shape)
        self.preprocessing = _adjust(known, self.framework, options)
        shape = shape or (self.preprocessing.shape if self.preprocessing else None)
        if options.example is not None:
            self.example: Any = read_inputs(options.example)
        elif shape is None:
            self.example = None
        else:
            require_memory(8 * math.prod(shape), f"two samples of shape {','.join(map(str, shape))}")
            self.example = get_framework(self.model).zeros(self.model, shape)

    def require_preprocessing(self, otherwise: str = "models of other inputs are trained in Python") -> Preprocessing:
        """Return how images become the model's input; raises `InputError` if the shape of one is not known.

        ``otherwise`` is what to do with a model that takes no images.
        """
        if self.preprocessing is None:
            shape = f"expected the shape of one image, received none: give {named('input_shape')}"
            raise InputError(f"{shape}; {otherwise}")
        return self.preprocessing

    def unlabelled(self, spec: str) -> Data | NamedInputs:
        """Return what ``spec`` names without labels: images, or the named arrays of an ``.npz`` for other models.

        Arrays are read as the example is, where that is a file or the model is not known to take images.
        """
        if Path(spec).suffix == ".npz" and (self.options.example is not None or self.preprocessing is None):
            inputs = read_inputs(Path(spec))
            if self.options.example is not None or inputs.args or inputs.kwargs.keys() != {"x", "y"}:  # images' own
                return NamedInputs(inputs)
        named_arrays = "models of other inputs read an .npz of named arrays"
        return open_data(spec, self.require_preprocessing(named_arrays), labelled=False)

    def shown(self, spec: str) -> list[Any]:
        """Return batches of what ``spec`` names: 16 images, or all named arrays of an ``.npz`` for other models."""
        data = self.unlabelled(spec)
        return [data.batch(data.sample(16) if isinstance(data, Data) else range(len(data)))[0]]

    def copy(self) -> Any:
        """Return another model with the same weights, for the one to be patched and the other to stay.

        Where Python cannot copy it, its source is built again. Raises `UnsupportedError` for a source that gives the
        same object again, and as `require_values` does.
        """
        if self.framework == "torch":
            from ..sources.torch.state_dict import require_values

            self._build(self.model)
            require_values(self.model)
            try:
                return copy.deepcopy(self.model)
            except (RuntimeError, TypeError, copy.Error):  # weights that a hook computes, a lock, a generator
                twin = self._built_again()
                twin.load_state_dict(self.model.state_dict())
                return twin
        twin = self._built_again()
        for model in (self.model, twin):
            self._build(model)
        twin.set_weights(self.model.get_weights())
        return twin

    def build_again(self) -> None:
        """Take another model from the source, of other weights where it draws them."""
        self.model = load_model(self.spec, trust=self.options.trust)

    def draws_weights(self) -> bool:
        """Return whether its source builds a model of other weights each time, so that elsewhere it is another one."""
        if self.bundle is not None or self.options.weights is not None:
            return False
        try:
            twin = load_model(self.spec, trust=self.options.trust)
        except UnsupportedError:  # one and the same each time
            return False
        pairs = zip(self._weights(self.model), self._weights(twin), strict=True)
        return any(not np.array_equal(one, other, equal_nan=True) for one, other in pairs)

    def save(
        self,
        report: Any,
        directory: Path,
        *,
        original: Any,
        overwrite: bool,
        measured: Mapping[str, float | None],
        calibrated: bool = False,
    ) -> None:
        """Write what became of the model as a bundle, which knows where it came from; raises as `bundle.save`.

        ``measured`` is the drift on images by layer and output, ``calibrated`` whether images chose the parameters.
        """
        expected = {decision.site.name: decision.drift for decision in report.replaced}
        drift = Drifts.of(expected, measured, calibrated=calibrated)
        bundles.write(
            report,
            directory,
            self.bundle.source if self.bundle else self.spec,
            original,
            self.preprocessing,
            own=self.bundle.trust.own if self.bundle else True,
            overwrite=overwrite,
            drift=drift.after(self.bundle.drift) if self.bundle else drift,
        )

    def _build(self, model: Any) -> None:
        """Show a model that waits for its first input the example, if there is one."""
        framework = get_framework(model)
        if framework.is_built(model) or self.example is None:
            return
        try:
            with framework.inference(model):
                framework.call(model, self.example)
        except Exception as error:
            raise not_taken(said(error)) from error

    def _weights(self, model: Any) -> list[Any]:
        if self.framework == "keras":
            return model.get_weights()  # type: ignore[no-any-return]
        return [get_framework(model).to_numpy(value) for value in model.state_dict().values()]

    def _built_again(self) -> Any:
        return load_model(self.spec, pretrained=False, trust=self.options.trust)


def _is_bundle(spec: str) -> bool:
    return is_bundle(spec) or is_unfinished(spec)


def _adjust(known: Preprocessing | None, framework: str, options: ModelOptions) -> Preprocessing | None:
    """Return the preprocessing with what the options say in place of what is known.

    Raises `UsageError` for mean or deviation of images where no shape of one is known.
    """
    changes: dict[str, Any] = {name: value for name in ("mean", "std") if (value := getattr(options, name)) is not None}
    first = framework == "torch"
    shape = options.input_shape
    if shape is not None and len(shape) == 3:
        changes["shape"] = shape
    elif options.size is not None:
        height, width = options.size if len(options.size) == 2 else options.size * 2
        channels = 3 if known is None else known.channels
        changes["shape"] = (channels, height, width) if first else (height, width, channels)
    if known is not None:
        return replace(known, **changes)
    if changes and "shape" not in changes:
        raise UsageError(
            f"expected the shape of one image beside {options.told(*changes)}, received "
            f"{'none' if shape is None else options.told('input_shape')}: give {named('input_shape')}"
        )
    return Preprocessing(layout="channels_first" if first else "channels_last", **changes) if changes else None
