"""What patching a PyTorch model is worth beside other converters, over timm's architectures, and at scale.

Prints the scorecard (`scorecard.py`), the zoo (`zoo_timm.py`) and time and memory (`scaling.py`), and writes them to a
JSON file. The quick form takes a minute or two; `--full` takes every architecture and 10,000 layers, half an hour. The
zoo's rows are kept as they are found: `--resume` goes on where a run was stopped.

    python benchmarks/patching.py [--full] [--resume] [--only PART] [--zoo GLOB] [--limit N] [-o FOLDER]
"""

import argparse
import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import scaling
import scorecard
import torch
import zoo_timm
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table

import normswap

QUICK_LIMIT = 30
console = Console(width=170)


def main() -> None:
    """Measure what was asked for and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="every architecture, and 10,000 layers")
    parser.add_argument("--resume", action="store_true", help="keep the rows of the zoo that are there")
    parser.add_argument("--only", choices=PARTS, help="one part alone")
    parser.add_argument("--zoo", default="*", metavar="GLOB", help="the architectures whose names match")
    parser.add_argument("--limit", type=int, metavar="N", help=f"so many architectures ({QUICK_LIMIT} if not --full)")
    parser.add_argument("-o", "--output", type=Path, default=Path("build/bench"), metavar="FOLDER")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    results: dict[str, Any] = {"normswap": normswap.__version__, "torch": torch.__version__}
    for name in [arguments.only] if arguments.only else PARTS:
        results[name] = PARTS[name](arguments)
    (arguments.output / "patching.json").write_text(json.dumps(results, indent=1))


def print_scorecard(arguments: argparse.Namespace) -> Any:
    """Put every case before every converter."""
    try:
        converters = scorecard.converters()
    except ImportError as error:
        console.print(f"scorecard: skipped, a peer is missing: {error}; `make bench` installs them")
        return None
    found = {name: scorecard.verdicts(convert) for name, convert in converters.items()}
    table = Table(Column("case", no_wrap=True), *converters, title="Scorecard")
    for case in scorecard.CASES:
        table.add_row(case, *(verdicts[case] for verdicts in found.values()))
    scores = [f"{Counter(verdicts.values())['ok']} of {len(verdicts)}" for verdicts in found.values()]
    table.add_section()
    table.add_row("score", *scores, style="bold")
    console.print(table)
    return found


def print_zoo(arguments: argparse.Namespace) -> Any:
    """Sweep timm's architectures."""
    limit = arguments.limit or (None if arguments.full or arguments.zoo != "*" else QUICK_LIMIT)
    try:
        names = zoo_timm.architectures(arguments.zoo, limit)
    except ImportError as error:
        console.print(f"zoo: skipped, timm is missing: {error}; `make bench` installs it")
        return None
    results = arguments.output / "zoo.jsonl"
    if not arguments.resume:
        results.unlink(missing_ok=True)
    rows = list(track(zoo_timm.sweep(names, results), "timm", len(names), console=console))
    having = [row for row in rows if row.batch_norms or row.problems]
    table = Table("target", "architectures", "BatchNorms", "replaced", "skipped with a reason", title="timm")
    for target in zoo_timm.TARGETS:
        done = [row for row in having if target in row.replaced]
        skipped = sum(line.startswith(f"{target}:") for row in done for line in row.skipped)
        counts = (len(done), sum(row.batch_norms for row in done), sum(row.replaced[target] for row in done), skipped)
        table.add_row(target, *map(str, counts))
    console.print(table)
    failed = [row for row in having if row.problems]
    console.print(
        f"{len(rows)} architectures built, {len(having)} with BatchNorm, {len(having) - len(failed)} without a problem"
    )
    for row in failed:
        console.print(f"  {row.name}: {'; '.join(row.problems)}", markup=False)
    return [asdict(row) for row in rows]


def print_scaling(arguments: argparse.Namespace) -> Any:
    """Measure time and memory."""
    layers = scaling.LAYERS if arguments.full else scaling.LAYERS[:-1]
    sizes = scaling.MEGABYTES if arguments.full else scaling.MEGABYTES[:-1]
    rows = [*scaling.by_layers(layers), *scaling.by_size(sizes)]
    table = Table(
        *(
            "target",
            "layers",
            "model, MiB",
            "CPU time, s",
            "ms a layer",
            "peak extra memory, MiB",
            "weights copied, bytes",
        ),
        title="Time and memory",
    )
    for row in rows:
        figures = (f"{row.megabytes:.1f}", f"{row.seconds:.3f}", f"{row.per_layer:.3f}", f"{row.extra:.1f}")
        table.add_row(row.target, str(row.layers), *figures, str(row.copied))
    console.print(table)
    return [asdict(row) | {"per_layer": row.per_layer} for row in rows]


PARTS = {"scorecard": print_scorecard, "zoo": print_zoo, "scaling": print_scaling}

if __name__ == "__main__":
    main()
