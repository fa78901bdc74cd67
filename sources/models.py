"""Where models come from: a name in a model zoo, a callable in Python code, or a Keras file."""

import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import InputError, MissingDependencyError, NormswapError
from .data import Preprocessing
from .files import require_file
from .framework import framework_of, traced_shape

KERAS_SUFFIXES = (".keras", ".h5", ".hdf5")
PROGRAM_SUFFIX = ".pt2"
FORMS = (
    "timm:NAME, torchvision:NAME, keras:NAME, file.py:callable, package.module:callable, FILE.keras, FILE.h5 or "
    "FILE.pt2"
)


def load_model(spec: str, weights: str | Path | None = None, *, pretrained: bool = True, trust: bool = False) -> Any:
    """Return the model ``spec`` names, with ``weights`` (a state dict, or Keras weights) loaded if given.

    ``pretrained=False`` builds a zoo's architecture without fetching its weights. A callable is Python code and
    is run. A ``.pt2`` file can run code while it is read, and is read with ``trust`` only.

    Raises `InputError` if there is no such model, it is not trusted or the weights do not fit,
    `MissingDependencyError` if the zoo's package is not installed.
    """
    kind, _, name = spec.partition(":")
    pretrained = pretrained and weights is None
    if kind in _ZOOS and name:
        with _names_of_a_fresh_process():
            model = _ZOOS[kind](name, pretrained)
    elif spec.endswith(KERAS_SUFFIXES):
        model = _keras_file(Path(spec))
    elif spec.endswith(PROGRAM_SUFFIX):
        model = importlib.import_module(".programs", __package__).read_program(Path(spec), trust=trust)
    elif kind and name:
        with _names_of_a_fresh_process():
            model = _callable(kind, name)()
    else:
        raise InputError(f"expected a model as {FORMS}, received model={spec}")
    framework = framework_of(model)
    if weights is not None:
        _load_weights(model, framework, Path(weights))
    return model


def preprocessing_of(
    model: Any,
    *,
    input_shape: tuple[int, ...] | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> Preprocessing | None:
    """Return how images become the model's input, from the arguments or, where they are None, from the model.

    A torch model tells through ``pretrained_cfg`` (timm's convention: ``input_size``, ``mean``, ``std``,
    ``interpolation``, ``crop_pct``, ``crop_mode``) or its traced graph, a Keras model through its input shape. None if
    the input shape is not known or is not that of images.
    """
    keras = framework_of(model) == "keras"
    if keras:
        shape: Any = input_shape or _keras_shape(model)
        config: dict[str, Any] = {}
    else:
        config = dict(getattr(model, "pretrained_cfg", None) or {})
        shape = input_shape or config.get("input_size") or (traced_shape(model) or ())[1:]
    if shape is None or len(shape) != 3 or None in shape:
        return None
    return Preprocessing(
        tuple(int(size) for size in shape),
        "channels_last" if keras else "channels_first",
        tuple(mean or config.get("mean") or (0.0,)),
        tuple(std or config.get("std") or (1.0,)),
        config.get("interpolation") or "bilinear",
        config.get("crop_pct") or 1.0,
        config.get("crop_mode") or "center",
    )


def relative_spec(spec: str, directory: Path) -> str:
    """Return ``spec`` with a file's path made relative to ``directory``, so that both can move together."""
    file, colon, name = spec.rpartition(":")
    path = Path(file if file.endswith(".py") else spec)
    if path.suffix not in (".py", PROGRAM_SUFFIX, *KERAS_SUFFIXES):
        return spec
    relative = Path(os.path.relpath(path.resolve(), directory.resolve())).as_posix()
    return f"{relative}{colon}{name}" if path.suffix == ".py" else relative


def absolute_spec(spec: str, directory: Path) -> str:
    """Return ``spec`` with a relative file's path resolved against ``directory``."""
    file, colon, name = spec.rpartition(":")
    if file.endswith(".py"):
        return f"{(directory / file).resolve()}{colon}{name}"
    return str((directory / spec).resolve()) if spec.endswith((PROGRAM_SUFFIX, *KERAS_SUFFIXES)) else spec


def _callable(location: str, name: str) -> Callable[[], Any]:
    if location.endswith(".py"):
        path = Path(location)
        require_file(path)
        # The file's own folder comes first while it is imported, as when Python runs it.
        module_spec = importlib.util.spec_from_file_location(path.stem, path)
        assert module_spec is not None
        assert module_spec.loader is not None
        module = importlib.util.module_from_spec(module_spec)
        sys.path.insert(0, str(path.resolve().parent))
        sys.modules.setdefault(path.stem, module)
        try:
            module_spec.loader.exec_module(module)
        except Exception as error:
            raise InputError(f"expected Python code in {path}, received code that fails: {error!r}") from error
        finally:
            sys.path.remove(str(path.resolve().parent))
    else:
        try:
            module = importlib.import_module(location)
        except ModuleNotFoundError as error:
            raise InputError(
                f"expected a module to import or one of {FORMS}, received model={location}:{name} ({error})"
            ) from None
    found = getattr(module, name, None)
    if not callable(found):
        raise InputError(f"expected a callable {name} in {location}, received {found!r}")
    return found  # type: ignore[no-any-return]


def _timm(name: str, pretrained: bool) -> Any:
    timm = _import("timm", "pip install timm")
    return _from_zoo("timm", name, lambda: timm.create_model(name, pretrained=pretrained))


def _torchvision(name: str, pretrained: bool) -> Any:
    models = _import("torchvision.models", "pip install torchvision, built for the installed torch")
    return _from_zoo("torchvision", name, lambda: models.get_model(name, weights="DEFAULT" if pretrained else None))


def _keras_application(name: str, pretrained: bool) -> Any:
    applications = _import_keras().applications
    factory = getattr(applications, name, None)
    if not callable(factory):
        raise InputError(f"expected a model of keras.applications, received keras:{name}")
    return _from_zoo("keras", name, lambda: factory(weights="imagenet" if pretrained else None))


_ZOOS: dict[str, Callable[[str, bool], Any]] = {
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


def _import_keras() -> Any:
    """Import Keras without what TensorFlow's libraries write to stderr as they are loaded, past Python's."""
    if "keras" in sys.modules:
        return sys.modules["keras"]
    sys.stderr.flush()
    stderr = os.dup(2)
    try:
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 2)
            return _import("keras", "pip install 'normswap[keras]'")
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


@contextmanager
def _names_of_a_fresh_process() -> Iterator[None]:
    """Let Keras number the layer names it makes up from the start, so that a model has the same names each time."""
    state = sys.modules.get("keras.src.backend.common.global_state")
    if state is None:
        yield
        return
    numbers = state.get_global_attribute("object_name_uids")
    state.set_global_attribute("object_name_uids", None)
    try:
        yield
    finally:
        state.set_global_attribute("object_name_uids", numbers)


def _keras_file(path: Path) -> Any:
    require_file(path)
    keras = _import_keras()
    importlib.import_module("..layers.keras", __package__)  # registers the layers a saved model may hold
    try:
        return keras.models.load_model(path, compile=False)
    except Exception as error:
        raise InputError(
            f"expected a Keras model in {path}, received a file Keras refuses: {_reason(error)}"
        ) from error


def _keras_shape(model: Any) -> tuple[int, ...] | None:
    shape = getattr(model, "input_shape", None)
    if not isinstance(shape, tuple) or len(shape) < 2 or None in shape[1:]:
        return None
    return shape[1:]


def _load_weights(model: Any, framework: str, path: Path) -> None:
    if framework == "torch":
        from .weights import load_state_dict, read_state_dict

        load_state_dict(model, read_state_dict(path), str(path))
        return
    load_keras_weights(model, path)


def load_keras_weights(model: Any, path: Path) -> None:
    """Give a Keras model the weights in ``path``; raises `InputError` if they do not fit."""
    require_file(path)
    try:
        model.load_weights(path)
    except Exception as error:
        raise InputError(f"expected weights for this model in {path}, received: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Return what Keras says is wrong, and in which layer, without the configurations it quotes around that."""
    where, _, cause = str(error).strip().rpartition("Exception encountered: ")
    name = re.search(r"""'name': '([^']*)'""", where[where.rfind("config=") :]) if where else None
    lines = cause.strip().splitlines() or [type(error).__name__]
    return f"layer {name[1]}: {lines[0]}" if name else lines[0]
