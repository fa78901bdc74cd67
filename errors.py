"""The errors normswap raises on purpose, each with the exit code the command line gives it."""

import logging
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any


class NormswapError(Exception):
    """Base of every error that is an answer to the user rather than a defect of normswap."""

    exit_code = 1


class OutputExistsError(NormswapError, FileExistsError):
    """The output exists and overwriting it was not asked for, or another process is writing it."""

    exit_code = 2


class UsageError(NormswapError, ValueError):
    """An option that nothing reads, or two that do not go together."""

    exit_code = 2


class InputError(NormswapError, ValueError):
    """A file, array or checkpoint is malformed, unsafe or does not fit."""

    exit_code = 3


class UnsupportedError(NormswapError):
    """The model, layer or operator set is well-formed but cannot be handled, or there is nothing to do."""

    exit_code = 4


class VerificationError(NormswapError):
    """The exported file does not compute what the model computes, or training went non-finite."""

    exit_code = 5


class MissingDependencyError(NormswapError, ModuleNotFoundError):
    """A package or an execution provider that the call needs is not installed."""

    exit_code = 6


class TerminatedError(SystemExit):
    """The system told the process to end: whatever runs, the user's own code too, is left as by Ctrl-C."""


class NormswapWarning(UserWarning):
    """Something the user should know of a result that is given nevertheless."""


_on_command_line: ContextVar[bool] = ContextVar("on_command_line", default=False)


@contextmanager
def command_line() -> Iterator[None]:
    """Have messages name options as the command line does, within a ``with`` block."""
    token = _on_command_line.set(True)
    try:
        yield
    finally:
        _on_command_line.reset(token)


def spoken(command: str, python: str) -> str:
    """Return what a message says to someone at the command line, or to a caller in Python."""
    return command if _on_command_line.get() else python


def named(name: str) -> str:
    """Return what an option is called: ``--input-shape`` or ``input_shape``."""
    return spoken(f"--{name.replace('_', '-')}", name)


def option(name: str, value: Any = True) -> str:
    """Return how an option is given: ``--overwrite`` or ``overwrite=True``, ``--exclude bn1`` or ``exclude='bn1'``."""
    command = named(name) if value is True else f"{named(name)} {shlex.quote(str(value))}"
    return spoken(command, f"{name}={value!r}")


LISTED = 10
"""How many lines of a list a message shows."""


def listed(lines: Sequence[str], indent: str = "  ") -> str:
    """Return the first `LISTED` of the lines, one under the other, and how many more there are."""
    more = [f"and {len(lines) - LISTED} more"] if len(lines) > LISTED else []
    return "\n".join(f"{indent}{line}" for line in [*lines[:LISTED], *more])


_logger = logging.getLogger("normswap")


def note(message: str) -> None:
    """Tell what was done and is as it should be: a line at the command line, a log record of "normswap" in Python."""
    _logger.info(message)


def said(error: BaseException) -> str:
    """Return what another library's error says, without colours; Keras has it in bold within an account of the call."""
    text = str(error)
    _, _, bold = text.partition("\x1b[1m")
    return uncoloured(" ".join(bold.partition("\x1b[0m")[0].split()) or text).strip()


def uncoloured(text: str) -> str:
    """Return a text without the codes by which terminals colour it."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


EXIT_MISSING = MissingDependencyError.exit_code
EXIT_IO = 7
EXIT_INTERRUPTED = 130

_EXTRAS = {
    "PIL": "data",
    "accelerate": "torch",
    "h5py": "keras",
    "huggingface_hub": "hub",
    "jinja2": "plot",
    "keras": "keras",
    "markupsafe": "plot",
    "matplotlib": "plot",
    "onnx": "onnx",
    "onnx_ir": "onnx",
    "onnxruntime": "onnx",
    "onnxscript": "onnx",
    "sklearn": "demo",
    "tensorboardX": "plot",
    "tensorflow": "keras",
    "tf2onnx": "keras",
    "torch": "torch",
}


def missing(module: str, what: str = "this") -> str:
    """Return what says that ``what`` needs a module that is not installed, and how to install it where we know."""
    package = module.partition(".")[0]
    if package in _EXTRAS:
        return f"{what} needs {package}: pip install 'normswap[{_EXTRAS[package]}]'"
    return f"{what} needs {package}, which is not installed; install it"


def explain(error: Exception) -> tuple[int, str]:
    """Return the exit code and the message for any error a command ended with."""
    if isinstance(error, NormswapError):
        return error.exit_code, str(error)
    if isinstance(error, OSError) or "I/O error" in str(error):  # safetensors has a class of its own for it
        return EXIT_IO, str(error)
    if isinstance(error, ModuleNotFoundError):
        module = str(error.name)
        if module.partition(".")[0] in _EXTRAS:
            return EXIT_MISSING, missing(module)
    return 1, f"{type(error).__name__}: {error} (normswap --debug shows where)"
