"""Options that several commands take, and how a command tells what to type next."""

import math
import shlex
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..console import numbers, option_set, remember_json

if TYPE_CHECKING:
    from ..bundles.opening import ModelOptions

json_option = click.option(
    "--json", "as_json", is_flag=True, callback=remember_json, help="Print one JSON object on stdout."
)
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace an output that exists.")
trust_option = click.option("--trust", is_flag=True, help="Read a .pt2 file, which can run code while it is read.")
trust_code_option = click.option(
    "--trust-code", is_flag=True, help="Run the code that a BUNDLE says its model is built by, whoever wrote it."
)
all_option = click.option("--all", "every", is_flag=True, help="Give every layer a row; else those alike share one.")

_MODEL = {
    "weights": click.option("--weights", type=Path, help="State dict to load: .safetensors, .pt, .pth, .th or .bin."),
    "input_shape": click.option(
        "--input-shape", callback=numbers(int, above=0), help="One sample's shape, such as 3,224,224."
    ),
    "example": click.option(
        "--example", type=Path, help="One batch as the model takes it: an .npz of arrays named like its arguments."
    ),
    "size": click.option(
        "--size",
        callback=numbers(int, above=0, most=2),
        help="Image height and width, if only they differ: 224 or 224,224.",
    ),
    "mean": click.option(
        "--mean", callback=numbers(float), help="Subtracted from images in 0..1; one number or one each."
    ),
    "std": click.option(
        "--std", callback=numbers(float, above=0), help="Images are divided by it; one number or one each."
    ),
    "trust": trust_option,
    "trust_code": trust_code_option,
}


def model_options(*without: str) -> Callable[[Any], Any]:
    """Return the decorator that gives a command ``known``: what is said of its MODEL, as `ModelOptions`."""
    names = [name for name in _MODEL if name not in without]

    def decorate(function: Any) -> Any:
        @wraps(function)
        def call(**options: Any) -> Any:
            from ..bundles.opening import ModelOptions

            if given("input_shape") != given("size"):
                decide(options, "input_shape", "size")
            known = ModelOptions(**{name: options.pop(name) for name in names})
            return function(known=known, **options)

        return option_set(*(_MODEL[name] for name in names))(call)

    return decorate


def read_from(model: str, *paths: str | Path | None) -> list[str | Path]:
    """Return the paths a command reads: that in MODEL, which may be ``file.py:callable``, and others it is given."""
    file, _, _ = model.rpartition(":")
    return [file if file.endswith(".py") else model, *(path for path in paths if path is not None)]


def positive(context: click.Context, parameter: click.Parameter, value: float | None) -> float | None:
    """Read a finite number above 0."""
    if value is not None and not 0 < value < math.inf:
        raise click.BadParameter(f"expected a finite number above 0, received {value}")
    return value


timeout_option = click.option(
    "--timeout",
    default=600.0,
    show_default=True,
    callback=positive,
    help="Seconds that an ONNX file may take to answer a batch.",
)


def given(name: str) -> bool:
    """Return whether an option stands on the command line."""
    return click.get_current_context().get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE


def decide(options: dict[str, Any], one: str, other: str) -> None:
    """Of two options that exclude each other take the one on the command line, whatever a file says of the other.

    Raises a usage error if both are there.
    """
    here = [name for name in (one, other) if given(name)]
    if len(here) == 2:
        flags = [f"--{name.replace('_', '-')}" for name in (one, other)]
        raise click.UsageError(f"expected one of {flags[0]} and {flags[1]}")
    if here:
        options[one if here == [other] else other] = None


def require_none(names: list[str], expected: str) -> None:
    """Raise a usage error that begins with ``expected`` if any of the options is on the command line."""
    parameters = click.get_current_context().command.params
    if found := [_typed(each)[0] for each in parameters if each.name in names and given(each.name)]:
        raise click.UsageError(f"expected {expected}, received {', '.join(found)}")


def typed(*without: str) -> list[str]:
    """Return the arguments of the command as they were given, without some, to be typed again."""
    parameters = click.get_current_context().command.params
    kept = [each for each in parameters if each.name not in without and given(str(each.name))]
    return [part for each in kept for part in _typed(each)]


def _typed(parameter: click.Parameter) -> list[str]:
    """Return one option or argument as it was given."""
    value = click.get_current_context().params[str(parameter.name)]
    if isinstance(parameter, click.Option) and parameter.is_flag:
        return [(parameter.opts if value else parameter.secondary_opts)[-1]]
    values = value if parameter.multiple else [value]
    texts = [",".join(map(str, each)) if isinstance(each, tuple) else str(each) for each in values]
    return texts if isinstance(parameter, click.Argument) else [part for t in texts for part in (parameter.opts[0], t)]


def command(*arguments: str | Path) -> str:
    """Return a command of normswap to type next."""
    return shlex.join(["normswap", *map(str, arguments)])


def trusting(known: "ModelOptions") -> list[str]:
    """Return the options that a bundle needs if the model it was made of needed them."""
    return [f"--{name.replace('_', '-')}" for name in ("trust", "trust_code") if getattr(known, name)]


def short_name(model: str) -> str:
    """Return a name for what is made of a MODEL: ``resnet50`` of timm:resnet50, ``net`` of dir/net.keras and hf://me/net."""
    return Path(model.partition("@")[0]).name if model.startswith("hf://") else Path(model.rpartition(":")[2]).stem
