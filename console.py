"""How the command line reads numbers and shows results and errors: tables, bars, and one JSON object."""

import json
import logging
import math
import os
import signal
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from statistics import median
from time import monotonic
from types import FrameType
from typing import Any, TextIO

import click

from .errors import EXIT_INTERRUPTED, EXIT_IO, NormswapWarning, TerminatedError, command_line, explain
from .patchers.table import as_text

SCHEMA_VERSION = 1
_FIGURES: Mapping[str, Callable[[float], str]] = {
    "loss": "loss {:.4g}".format,
    "accuracy": "accuracy {:.1f} %".format,
    "eval_top1": "top-1 {:.2f} %".format,
    "images_per_second": lambda rate: f"{rate:.0f} images/s" if rate >= 10 else f"{rate:.2g} images/s",
}
"""What a bar shows of a training, and how; other figures it leaves to the journal."""

JSON = "normswap.json"
"""Where a context keeps whether --json was given, for an error to be told in kind."""


class Group(click.Group):
    """Turns errors into one message and the right exit code, and tells of each command in a whole sentence."""

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands in the order of the work."""
        rows = [(name, str(command.help).partition("\n\n")[0]) for name, command in self.commands.items()]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def invoke(self, context: click.Context) -> Any:
        """Run a command; an error ends it with its message and code, told as JSON too where that was asked for."""
        try:
            with command_line(), _notes(), warnings.catch_warnings(), _unwound():
                warnings.showwarning = _show_warning
                return super().invoke(context)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            click.echo("stopped", err=True)
            raise click.exceptions.Exit(EXIT_INTERRUPTED) from None
        except Exception as error:
            if context.find_root().params.get("debug"):
                raise
            code, message = explain(error)
            if context.meta.get(JSON):
                with suppress(OSError):  # which may be the error
                    show_json({"error": message, "exit_code": code})
            click.echo(f"error: {message}", err=True)
            raise click.exceptions.Exit(code) from None

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the command line; a result that cannot be printed is an error, what is told people beside it is not."""
        stderr = sys.stderr
        sys.stderr = _Unheard(stderr)
        try:
            return super().main(*args, **kwargs)
        except OSError as error:
            click.echo(f"error: {error}", err=True)
            raise SystemExit(EXIT_IO) from None
        finally:
            sys.stderr = stderr
            _leave_no_rest()


class _Unheard:
    """A stream to people, for whom work goes on when nobody reads of it any more."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write what can be written."""
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush what can be flushed."""
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _leave_no_rest() -> None:
    """Drop what stdout could not take, else Python would try again at its end, and tell of that."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except ValueError:  # closed
        pass


@contextmanager
def _unwound() -> Iterator[None]:
    """Have SIGTERM and SIGHUP leave a command as its own errors do, by what it cleans up."""

    def leave(number: int, frame: FrameType | None) -> None:
        click.echo("stopped", err=True)
        raise TerminatedError(128 + number)

    alone = threading.current_thread() is threading.main_thread()  # which signals belong to
    numbers = [each for each in (signal.SIGTERM, signal.SIGHUP) if alone and signal.getsignal(each) == signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def _notes() -> Iterator[None]:
    """Tell of each `note` once, on stderr."""
    told: set[str] = set()

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if (message := record.getMessage()) not in told:
                told.add(message)
                click.echo(f"note: {message}", err=True)

    logger, handler = logging.getLogger("normswap"), Handler(logging.INFO)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _show_warning(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    """Tell of a warning without the place in the code, which is of no use to whoever runs a command."""
    if issubclass(category, NormswapWarning):
        click.echo(f"warning: {message}", err=True)
    else:
        click.echo(warnings.formatwarning(message, category, *where[:2]), err=True)


def numbers(
    convert: type, *, above: float = -math.inf, most: int | None = None
) -> Callable[[click.Context, click.Parameter, str | None], tuple[Any, ...] | None]:
    """Return an option's callback that reads finite numbers of one type, separated by commas, ``most`` of them."""

    def parse(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[Any, ...] | None:
        if value is None:
            return None
        try:
            numbers = tuple(convert(part) for part in value.split(","))
        except ValueError:
            raise click.BadParameter(f"expected numbers separated by commas, received {value!r}") from None
        if not all(above < number < math.inf for number in numbers):
            limit = "" if above == -math.inf else f" above {above:g}"
            raise click.BadParameter(f"expected finite numbers{limit}, received {value!r}")
        if most is not None and len(numbers) > most:
            raise click.BadParameter(f"expected up to {most} numbers, received {value!r}")
        return numbers

    return parse


def groups(context: click.Context, parameter: click.Parameter, value: str | None) -> int | str | None:
    """Read the value of --groups: a positive number, or ``auto``."""
    if value is None or value == "auto":
        return value
    if not value.isdecimal() or int(value) < 1:
        raise click.BadParameter(f"expected 'auto' or a positive number, received {value!r}")
    return int(value)


def remember_json(context: click.Context, parameter: click.Parameter, value: bool) -> bool:
    """Keep the value of --json where the error handler finds it."""
    context.meta[JSON] = value
    return value


def option_set(*decorators: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return one decorator for several options."""

    def apply(function: Any) -> Any:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


def show(as_json: bool, data: Mapping[str, Any], text: Any, then: Sequence[str] = ()) -> None:
    """Print the result: one JSON object on stdout, or text for people on stderr and the commands to type next."""
    if as_json:
        show_json(data)
    else:
        from rich.console import Console

        console = Console(stderr=True, highlight=False, markup=False, soft_wrap=isinstance(text, str))
        if console.is_terminal:
            console.print(text)
        else:
            click.echo(text if isinstance(text, str) else as_text(text), err=True)
        for command in then:
            click.echo(f"next: {command}", err=True)


def show_json(data: Mapping[str, Any]) -> None:
    """Print one JSON object on stdout."""
    click.echo(json.dumps({"schema_version": SCHEMA_VERSION, **data}))


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[..., None]]:
    """Yield ``advance(done, note="", **figures)``, which shows how far the work is and the last of each figure.

    Of ``images_per_second``, which jumps from step to step, that is the median of the last ten. On a terminal it is a
    bar with the time left, elsewhere a line every tenth of the way; both go to stderr.
    """
    from rich.console import Console

    console = Console(stderr=True)
    known: dict[str, float] = {}
    rates: deque[float] = deque(maxlen=10)
    with (_bar if console.is_terminal else _lines)(title, total, console) as tell:

        def advance(done: int, note: str = "", **figures: float | None) -> None:
            known.update({name: value for name, value in figures.items() if value is not None})
            if (rate := figures.get("images_per_second")) is not None:
                rates.append(rate)
                known["images_per_second"] = median(rates)
            shown = [text(known[name]) for name, text in _FIGURES.items() if name in known]
            tell(done, ", ".join([*filter(None, [note]), *shown]))

        yield advance


@contextmanager
def _bar(title: str, total: int, console: Any) -> Iterator[Callable[[int, str], None]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn(title, markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, TextColumn("{task.fields[note]}", markup=False), console=console) as bar:
        task = bar.add_task("", total=total, note="")
        yield lambda done, note: bar.update(task, completed=done, note=note)


@contextmanager
def _lines(title: str, total: int, console: Any) -> Iterator[Callable[[int, str], None]]:
    tenth, first, begin = -1, 0, 0.0

    def tell(done: int, note: str) -> None:
        nonlocal tenth, first, begin
        now = monotonic()
        if tenth < 0:
            first, begin = done, now
        elif 10 * done // total == tenth:
            return
        tenth = 10 * done // total
        left = ""
        if first < done < total:
            left = f"{timedelta(seconds=round((total - done) * (now - begin) / (done - first)))} left"
        click.echo(", ".join(filter(None, [f"{title}: {done}/{total}", note, left])), err=True)

    yield tell
