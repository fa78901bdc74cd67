"""The page of bad inputs, `docs/bad_inputs.md`, as what commands are held to: what is typed, said, and left.

Each block of the page that begins with ``$`` is run by a test: `tests/torch`, `tests/keras` and `tests/test_bad_inputs`
make the files it names.
"""

import hashlib
import re
import shlex
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple

from click.testing import CliRunner

from normswap.cli import main

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "bad_inputs.md").read_text(encoding="utf-8")
ROWS = range(1, 69)
_HEADING = re.compile(r"^\*\*(\d+)\. ", re.MULTILINE)
_BLOCK = re.compile(
    r"```console\n# (?P<kind>any|torch|keras): (?P<title>.+)\n\$ normswap (?P<command>.+)\n"
    r"(?P<said>(?:.*\n)*?)exit code (?P<code>\d+)\n```"
)
_TEST = re.compile(r"`(tests/[\w/]+\.py)::([\w:]+)`")


class Case(NamedTuple):
    """A block of the page: a row of the table, what is wrong, what is typed, and what comes of it."""

    row: int
    kind: str
    title: str
    command: list[str]
    said: str
    code: int


def sections():
    """Each row's part of the page, by number."""
    parts = _HEADING.split(PAGE)
    return {int(number): text for number, text in zip(parts[1::2], parts[2::2], strict=True)}


def cases(kind):
    """The blocks of one kind, with what a test is called after."""
    found = [
        Case(row, block["kind"], block["title"], shlex.split(block["command"]), block["said"], int(block["code"]))
        for row, text in sections().items()
        for block in _BLOCK.finditer(text)
    ]
    return {f"row-{case.row}: {case.title}": case for case in found if case.kind == kind}


def named_tests(text):
    """The tests that a part of the page names, as file and name."""
    return _TEST.findall(text)


def _held(folder):
    """What a folder holds, to the byte."""
    return {
        path: hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() and not path.is_symlink() else ""
        for path in folder.rglob("*")
        if "__pycache__" not in path.parts
    }


def _old_output(command):
    """Put something in the place of a command's output that it may replace, and return the command that would."""
    if "-o" not in command or "--overwrite" in command:
        return command
    output = Path(command[command.index("-o") + 1])
    if output.exists() or not output.parent.is_dir():
        return command
    if output.suffix:
        output.write_bytes(b"old")
    else:
        output.mkdir()
        (output / "normswap.json").write_text("{}")
    return [*command, "--overwrite"]


def hold(case, make):
    """Make the files, run the command in the working folder, and hold it to the page.

    One that fails leaves the folder as it was to the byte, what it was to overwrite too. ``make`` may return a context
    to run it in.
    """
    context = make()
    command = _old_output(case.command) if case.code else case.command
    before = _held(Path())
    with context if isinstance(context, AbstractContextManager) else nullcontext():
        result = CliRunner().invoke(main, command)
    wanted = "".join(".*" if part == "…" else re.escape(part) for part in re.split("(…)", case.said.removesuffix("\n")))
    said = result.stderr.removesuffix("\n")

    assert (result.exit_code, bool(re.fullmatch(wanted, said, re.DOTALL))) == (case.code, True), said
    if case.code:
        assert _held(Path()) == before
