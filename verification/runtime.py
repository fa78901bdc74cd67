"""Run ONNX models in onnxruntime, on the execution providers asked for and on no other."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from threading import TIMEOUT_MAX, Timer
from typing import Any

import onnxruntime

from ..errors import InputError, MissingDependencyError, named
from ..sources.files import is_text

_Level = onnxruntime.GraphOptimizationLevel

TIMEOUT = 600.0
"""How many seconds a file may take to answer one batch, unless it is said otherwise."""

# The option keeps CUDA from multiplying with ten bits where float32 has 23.
PROVIDERS: dict[str, tuple[str, dict[str, str], str]] = {
    "cpu": ("CPUExecutionProvider", {}, "onnxruntime"),
    "cuda": ("CUDAExecutionProvider", {"use_tf32": "0"}, "onnxruntime-gpu"),
    "tensorrt": ("TensorrtExecutionProvider", {}, "onnxruntime-gpu"),
    "openvino": ("OpenVINOExecutionProvider", {}, "onnxruntime-openvino"),
    "coreml": ("CoreMLExecutionProvider", {}, "onnxruntime (on macOS)"),
    "dml": ("DmlExecutionProvider", {}, "onnxruntime-directml"),
}
"""Each provider's short name: onnxruntime's name, options, and the package that brings it."""


def chosen_providers(names: Iterable[str]) -> list[str]:
    """Return short names of providers, each once; ``auto`` stands for all that are installed.

    Raises `InputError` for a name that is none or if there is none, `MissingDependencyError` if a provider is not
    installed.
    """
    installed = onnxruntime.get_available_providers()
    chosen: dict[str, None] = {}
    for name in names:
        if name == "auto":
            chosen |= dict.fromkeys(short for short, (full, *_) in PROVIDERS.items() if full in installed)
        elif name not in PROVIDERS:
            raise InputError(f"expected a provider of {', '.join(PROVIDERS)} or auto, received provider={name!r}")
        elif PROVIDERS[name][0] not in installed:
            raise _missing(name, f"an onnxruntime that has {', '.join(installed)}")
        else:
            chosen[name] = None
    if not chosen:
        raise InputError(f"expected a provider of {', '.join(PROVIDERS)} or auto, received none")
    return list(chosen)


def session(
    model: Path | bytes,
    *,
    optimised: bool = True,
    provider: str = "cpu",
    threads: int = 0,
    spinning: bool = True,
    folder: Path | None = None,
    settings: Mapping[str, str] | None = None,
) -> onnxruntime.InferenceSession:
    """Return an onnxruntime session of a file, or of a model's bytes whose external data lies in ``folder``.

    Threads that wait without ``spinning`` start later, and take nothing from others: on a busy machine a third less.
    ``settings`` of the provider stand in the place of those that have it compute in float32.

    Raises `InputError` if onnxruntime refuses the model, `MissingDependencyError` if the provider does not start:
    onnxruntime itself would go on, on the CPU.
    """
    if isinstance(model, Path) and not is_text(model):
        folder, model = model.parent, model.read_bytes()
    full, exact, _ = PROVIDERS[provider]
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = _Level.ORT_ENABLE_ALL if optimised else _Level.ORT_DISABLE_ALL
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
    options.log_severity_level = 3 if provider == "cpu" else 4
    if folder is not None:
        absolute = folder.absolute()
        entry: Any = str(absolute) if is_text(absolute) else os.fsencode(absolute)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", entry)
    source = str(model) if isinstance(model, Path) else model
    try:
        runner = onnxruntime.InferenceSession(
            source, options, providers=[(full, exact if settings is None else dict(settings))], enable_fallback=0
        )
    except Exception as error:
        told = str(error).strip().rstrip(".")
        raise InputError(
            f"expected a model onnxruntime can load, received one it refuses: {told}; update onnxruntime, or export "
            "the model again"
        ) from None
    if full not in runner.get_providers():
        raise _missing(provider, f"one that runs on {', '.join(runner.get_providers())} in its place")
    return runner


def answers(
    runner: onnxruntime.InferenceSession, names: Sequence[str] | None, feed: Mapping[str, Any], *, timeout: float
) -> list[Any]:
    """Return the outputs asked for, or with None all of them.

    Raises `InputError` if they take more than ``timeout`` seconds: a few bytes can ask for a loop without end.
    """
    options, late = onnxruntime.RunOptions(), []

    def stop() -> None:
        late.append(True)
        options.terminate = True

    timer = Timer(min(timeout, TIMEOUT_MAX), stop)
    timer.daemon = True
    timer.start()
    try:
        return list(runner.run(names, feed, options))
    except Exception:
        if not late:
            raise
        shapes = ", ".join(str(array.shape) for array in feed.values())
        raise InputError(
            f"expected the file's outputs for inputs of shape {shapes} within {timeout:g} s, received none; "
            f"allow more by {named('timeout')}"
        ) from None
    finally:
        timer.cancel()


def _missing(name: str, received: Any) -> MissingDependencyError:
    full, _, package = PROVIDERS[name]
    return MissingDependencyError(
        f"expected an onnxruntime with {full} for provider={name!r}, received {received}: pip install {package}"
    )
