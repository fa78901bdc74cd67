"""Whether networks of many libraries can be patched to every target, compute, train, be undone, stored and exported.

Each network is built with random weights and running statistics in a process of its own, then for every target planned,
patched, run, trained for one step, undone, saved and loaded as a bundle, and written to a proven ONNX file
(`zoo_checks`). The results file has a line of JSON a network and lets a sweep go on where it was left.

    make build/zoo                                      # the libraries, beside .venv
    python benchmarks/zoo.py --results zoo.jsonl        # all of them
    python benchmarks/zoo.py --results zoo.jsonl monai "torchvision:r*"
    python benchmarks/zoo.py --results zoo.jsonl --checks export  # this alone, where it was not asked yet
    python benchmarks/zoo.py --results zoo.jsonl --table
"""

import argparse
import fnmatch
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.pool import ThreadPool
from pathlib import Path

import zoos
from rich.console import Console
from rich.progress import track

CHECKS = ("plan", "patch", "eval", "train", "undo", "bundle", "export")
TARGETS = ("sn", "sn frozen", "brn", "gn")
SECONDS = 900


@dataclass
class Row:
    """What was found for one network.

    ``checks`` says by target and check what went wrong: "" where nothing did; a check that the network itself does not
    pass with its BatchNorms is left out. ``asked`` are the checks that were tried. ``error`` is why the network could
    not be built or run as it is.
    """

    library: str
    name: str
    batch_norms: int = 0
    replaced: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    checks: dict[str, dict[str, str]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    error: str = ""
    seconds: float = 0.0

    @property
    def tried(self) -> bool:
        """Whether there was anything to patch."""
        return not self.error and any(self.replaced.values())

    def joined(self, other: "Row | None") -> "Row":
        """Return this row with what ``other``, an older one of the same network, says of the checks not asked here."""
        if other is None or self.error or other.error:
            return self
        targets = dict.fromkeys([*other.checks, *self.checks])
        old = {
            target: {c: p for c, p in other.checks.get(target, {}).items() if c not in self.asked} for target in targets
        }
        return replace(
            self,
            checks={target: old[target] | self.checks.get(target, {}) for target in targets},
            asked=sorted({*self.asked, *other.asked}),
            seconds=round(self.seconds + other.seconds, 1),
        )

    @property
    def failures(self) -> list[str]:
        """What went wrong, a line each."""
        return [
            f"{self.library}:{self.name} {target} {check}: {problem}"
            for target, checks in self.checks.items()
            for check, problem in checks.items()
            if problem
        ]


def main() -> None:
    """Sweep the networks whose names match, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("patterns", nargs="*", metavar="LIBRARY[:NAME]", help="which networks, as globs (default: all)")
    parser.add_argument(
        "--results", type=Path, default=Path("zoo.jsonl"), help="where to write, and what to go on from"
    )
    parser.add_argument("--table", action="store_true", help="print the table of what is there, and run nothing")
    parser.add_argument("--jobs", type=int, default=1, help="how many at once")
    parser.add_argument("--checks", type=_checks, default=[*CHECKS], help=f"what to ask: {','.join(CHECKS)} (default)")
    parser.add_argument("--again", action="store_true", help="run what failed once more")
    parser.add_argument("--one", metavar="LIBRARY:NAME", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        import zoo_checks

        zoo_checks.run(arguments.one, arguments.checks)
        return
    console = Console()
    rows = read(arguments.results)
    if not arguments.table:
        left = {}
        for key in listed(arguments.patterns or ["*"]):
            row = rows.get(key)
            if row is None or (arguments.again and (row.failures or row.error)):
                left[key] = arguments.checks
            elif not row.error and row.replaced:
                left[key] = [check for check in arguments.checks if check not in row.asked]
        wanted = {key: checks for key, checks in left.items() if checks}
        with ThreadPool(arguments.jobs) as pool:
            for row in track(pool.imap_unordered(examined, wanted.items()), "networks", len(wanted), console=console):
                key = f"{row.library}:{row.name}"
                rows[key] = row.joined(rows.get(key))
                write(rows, arguments.results)
                for line in [*row.failures, *([f"{row.library}:{row.name}: {row.error}"] if row.error else [])]:
                    console.print(line, markup=False, soft_wrap=True)
    for line in table(list(rows.values())):
        print(line)
    sys.exit(any(row.failures for row in rows.values()))


def _checks(text: str) -> list[str]:
    if unknown := sorted({*text.split(",")} - {*CHECKS}):
        raise argparse.ArgumentTypeError(f"expected some of {','.join(CHECKS)}, received {','.join(unknown)}")
    return text.split(",")


def listed(patterns: list[str]) -> list[str]:
    """Return the networks whose library, or library and name, match a pattern, in the order of the patterns."""
    keys = [f"{library}:{name}" for library in zoos.LIBRARIES for name in zoos.networks(library)]
    matching = (
        key for p in patterns for key in keys if fnmatch.fnmatchcase(key, p) or fnmatch.fnmatchcase(key, f"{p}:*")
    )
    return list(dict.fromkeys(matching))


def examined(asked: tuple[str, Sequence[str]]) -> Row:
    """Return what a process of its own says of one network, of the checks alone that are asked of it."""
    key, checks = asked
    library, _, name = key.partition(":")
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--one", key, "--checks", ",".join(checks)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=environment)
    except subprocess.TimeoutExpired:
        return Row(library, name, error=f"took over {SECONDS} s")
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"library"')]
    if not lines:
        return Row(library, name, error=f"exit {done.returncode}: {done.stderr.strip()[-500:]}")
    return Row(**json.loads(lines[-1]))


def read(results: Path) -> dict[str, Row]:
    """Return the rows in a results file by network."""
    lines = results.read_text().splitlines() if results.exists() else []
    rows = [Row(**json.loads(line)) for line in lines]
    return {f"{row.library}:{row.name}": row for row in rows}


def write(rows: dict[str, Row], results: Path) -> None:
    """Write the rows, whole or not at all."""
    part = results.with_suffix(".part")
    part.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows.values()))
    part.replace(results)


def table(rows: list[Row]) -> Iterator[str]:
    """Yield the lines of a table in Markdown: passed of tried, for every library and check."""
    yield f"| library (networks) | {' | '.join(CHECKS)} |"
    yield "|---" * (len(CHECKS) + 1) + "|"
    libraries = dict.fromkeys(row.library for row in rows)
    for library in [*libraries, "all"]:
        tried = [row for row in rows if row.tried and library in (row.library, "all")]
        cells = []
        for check in CHECKS:
            found = [checks[check] for row in tried for checks in row.checks.values() if check in checks]
            cells.append(f"{sum(not problem for problem in found)}/{len(found)}")
        yield f"| {library} ({len(tried)}) | {' | '.join(cells)} |"
    if idle := [row.name for row in rows if not row.tried and not row.error]:
        yield f"\nNothing to replace: {', '.join(idle)}."
    if broken := [f"{row.library}:{row.name}" for row in rows if row.error]:
        yield f"\nNot run: {', '.join(broken)}."


if __name__ == "__main__":
    main()
