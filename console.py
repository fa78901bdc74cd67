"""How the command line reads numbers and shows results: tables, bars, and one JSON object."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import click

SCHEMA_VERSION = 1
WIDTH_OF_A_FILE = 140

JSON = "normswap.json"
"""Where a context keeps whether --json was given, for an error to be told in kind."""


def numbers(convert: type) -> Callable[[click.Context, click.Parameter, str | None], tuple[Any, ...] | None]:
    """Return an option's callback that reads numbers of one type, separated by commas."""

    def parse(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[Any, ...] | None:
        if value is None:
            return None
        try:
            numbers = tuple(convert(part) for part in value.split(","))
        except ValueError:
            raise click.BadParameter(f"expected numbers separated by commas, received {value!r}") from None
        if convert is int and any(number < 1 for number in numbers):
            raise click.BadParameter(f"expected positive sizes, received {value!r}")
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


def show(as_json: bool, data: Mapping[str, Any], text: Any) -> None:
    """Print the result: one JSON object on stdout, or text for people on stderr."""
    if as_json:
        show_json(data)
    else:
        from rich.console import Console

        console = Console(stderr=True, highlight=False, markup=False, soft_wrap=isinstance(text, str))
        if not console.is_terminal:
            console.width = WIDTH_OF_A_FILE
        console.print(text)


def show_json(data: Mapping[str, Any]) -> None:
    """Print one JSON object on stdout."""
    click.echo(json.dumps({"schema_version": SCHEMA_VERSION, **data}))


def table(title: str, rows: list[dict[str, Any]]) -> Any:
    """Return a table of the rows, leaving out columns in which nothing stands."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    columns = [key for key in (rows[0] if rows else ()) if any(row[key] not in (None, "", []) for row in rows)]
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*("" if row[c] is None else f"{row[c]:.2f}" if isinstance(row[c], float) else str(row[c])
                        for c in columns))  # fmt: skip
    return table


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int, str], None]]:
    """Yield ``advance(done, note)``; a bar is drawn only on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total, note="")
        yield lambda done, note: bar.update(task, completed=done, note=note)
