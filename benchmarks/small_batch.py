"""How well each normalization fine-tunes a pretrained network with few images per batch.

Every method starts from the same trained network and takes the same number of steps: SGD with momentum 0.9, a linear
warm-up, then a cosine to 0 or a constant rate, cross-entropy with the labels, no augmentation. The loop is this file's
own, since `normswap.finetune` clips gradients, which hides part of what is measured: how far a rate can be missed
(``--clip 1`` clips as it does).

The rate is chosen for each method and batch size alone, by seed 0 and training images that are kept for it: on a ladder
of rates, each three times the one below, down until the best is not the lowest, and up until one is 2 points below the
best. Reported are the test images: for three orders of the data at that rate and at three times it, and the highest
rate that cost less than the 2 points.

Results are one JSON line a run; a run that is there is not repeated, so that the benchmark can be stopped at any time.

    python benchmarks/small_batch.py [DATA] --results FILE              # measure what FILE does not hold yet
    python benchmarks/small_batch.py --results FILE --table             # print what it holds
    python benchmarks/small_batch.py --results FILE --plot FILE.png     # draw it
"""

import argparse
import copy
import json
import multiprocessing
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, fields
from itertools import groupby, product
from math import cos, isfinite, log, pi
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from fine_tuned import METHODS, NETWORKS, Bench
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import nn

from normswap.data.dataset import Data
from normswap.finetune import Hooks, Momentum, RenormLimits

SEEDS = (0, 1, 2)
LASTING = " + Momentum"
"""What follows the name of a method whose moving statistics average over as many images however small the batches."""
NAMES = (*METHODS, *(name + LASTING for name in ("BN", "SN", "BRN")))
MOMENTUM, WARMUP = 0.9, 0.05
FALL = 2.0
"""By how many points a rate has to be worse than the best to be too high."""


class Cell(NamedTuple):
    """What one figure of the table is about."""

    network: str
    method: str
    batch: int
    steps: int
    schedule: str
    clip: float | None


class Run(NamedTuple):
    """One training: a cell, its peak rate as a rung of the ladder, and the seed of the data's order."""

    cell: Cell
    rung: int
    seed: int


@dataclass
class Outcome:
    """Top-1 in % on the images kept for choosing and on the test images, and the step at which the loss was lost."""

    selection: float
    test: float
    diverged: int | None
    seconds: float


Found = dict[Run, Outcome]


def rate(rung: int) -> float:
    """Return the learning rate of a rung."""
    return 3.0**rung / 10_000


LOOKS = {
    "BN": ("#000000", "o"),
    "frozen BN": ("#0072B2", "s"),
    "anchored SN": ("#D55E00", "o"),
    "SN": ("#E69F00", "^"),
    "BRN": ("#009E73", "D"),
    "GN": ("#CC79A7", "v"),
    "GN copied": ("#56B4E9", "P"),
    "GN reset": ("#888888", "X"),
}
"""Each method's colour and marker, dashed with `Momentum`; Okabe and Ito's, told apart without red or green, too."""
SMALL = 2
"""The batch size that accuracy is drawn over the rate for."""
Line = dict[float, list[float]]
"""The figures of all seeds at each point."""


# One training


def fine_tune(model: nn.Module, data: Data, run: Run) -> int | None:
    """Train the model in place; return the step whose loss was not finite, where it ends, or None."""
    steps, batch = run.cell.steps, run.cell.batch
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, momentum=MOMENTUM)
    lasting = [Momentum(model, batch)] if run.cell.method.endswith(LASTING) else []
    hooks = Hooks(RenormLimits(model, steps), *lasting)
    model.train()
    with hooks:
        for step in range(steps):
            epoch, position = divmod(step, len(data) // batch)
            order = np.random.default_rng([run.seed, epoch]).permutation(len(data))
            x, y = map(torch.from_numpy, data.batch(order[position * batch : (position + 1) * batch]))
            hooks.on_step(step)
            optimizer.param_groups[0]["lr"] = rate(run.rung) * SCHEDULES[run.cell.schedule]((step + 0.5) / steps)
            loss = F.cross_entropy(model(x), y)
            if not isfinite(loss.item()):
                return step
            optimizer.zero_grad()
            loss.backward()
            if run.cell.clip is not None:
                nn.utils.clip_grad_norm_(parameters, run.cell.clip)
            optimizer.step()
    return None


def _constant(progress: float) -> float:
    """Return the share of the peak rate: linear up to it, then all of it."""
    return min(1, progress / WARMUP)


def _cosine(progress: float) -> float:
    """Return the share of the peak rate: linear up to it, then a cosine to 0."""
    return min(progress / WARMUP, 0.5 * (1 + cos(pi * max(0, progress - WARMUP) / (1 - WARMUP))))


SCHEDULES = {"cosine": _cosine, "constant": _constant}


def top1(model: nn.Module, data: Data) -> float:
    """Return the share of images that the model has right, in %."""
    model.eval()
    with torch.no_grad():
        right = sum(int((model(torch.from_numpy(x)).argmax(1).numpy() == y).sum()) for x, y in data.batches(250))
    return 100 * right / len(data)


def measure(run: Run) -> Outcome:
    """Fine-tune and test."""
    begin = time.perf_counter()
    original, data = _bench.network(run.cell.network)
    model = copy.deepcopy(original)
    METHODS[run.cell.method.removesuffix(LASTING)](model)
    diverged = fine_tune(model, data, run)
    return Outcome(
        top1(model, _bench.selection), top1(model, _bench.test), diverged, round(time.perf_counter() - begin, 1)
    )


def _start(data: Path, folder: Path) -> None:
    """Make a process ready to measure."""
    global _bench
    torch.set_num_threads(1)
    _bench = Bench(data, folder)


# Which runs there are to do


def missing(cell: Cell, found: Found) -> list[Run]:
    """Return the runs that the cell is known to need and does not have.

    Seed 0 goes along the ladder: down until the best rate is not the lowest one, up until one is ``FALL`` points
    below the best.
    """
    search = _search(cell, found)
    if not search:
        return [Run(cell, 1 + round(log(cell.batch, 9)), SEEDS[0])]
    best, top = chosen(cell, found), max(search)
    if best == min(search):
        return [Run(cell, best - 1, SEEDS[0])]
    if search[top] > search[best] - FALL:
        return [Run(cell, top + 1, SEEDS[0])]
    runs = [Run(cell, rung, seed) for rung in (best, best + 1) for seed in SEEDS]
    return [run for run in runs if run not in found]


def chosen(cell: Cell, found: Found) -> int:
    """Return the rung that is best on the images kept for choosing, of equals the highest: low rates change nothing."""
    search = _search(cell, found)
    return max(search, key=lambda rung: (search[rung], rung))


def highest(cell: Cell, found: Found) -> int:
    """Return the highest rung that is less than ``FALL`` points below the best on the images kept for choosing."""
    search = _search(cell, found)
    return max(rung for rung in search if search[rung] > search[chosen(cell, found)] - FALL)


def _search(cell: Cell, found: Found) -> dict[int, float]:
    return {run.rung: found[run].selection for run in found if run.cell == cell and run.seed == SEEDS[0]}


def work(cells: list[Cell], results: Path, jobs: int, data: Path, folder: Path) -> None:
    """Do all runs that the cells need, ``jobs`` at a time, and write each to ``results`` when it is done."""
    found = read(results)
    _start(data, folder)  # decodes the images and trains the plain CNN before the processes want them
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, _start, (data, folder)) as pool:
        running: dict[Future[Outcome], Run] = {}
        while True:
            for run in (run for cell in cells for run in missing(cell, found)):
                if len(running) < jobs and run not in running.values():
                    running[pool.submit(measure, run)] = run
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run = running.pop(future)
                found[run] = future.result()
                write(results, run, found[run])


def write(results: Path, run: Run, outcome: Outcome) -> None:
    """Append a run to the results, and show it."""
    line = json.dumps(
        {**run.cell._asdict(), "rung": run.rung, "rate": rate(run.rung), "seed": run.seed, **asdict(outcome)}
    )
    print(line, flush=True)
    with results.open("a") as file:
        file.write(line + "\n")


def read(results: Path) -> Found:
    """Return the runs a file holds."""
    found: Found = {}
    for line in results.read_text().splitlines() if results.exists() else ():
        row = json.loads(line)
        cell = Cell(*(row[name] for name in Cell._fields))
        found[Run(cell, row["rung"], row["seed"])] = Outcome(*(row[field.name] for field in fields(Outcome)))
    return found


# What people look at


def figures(cell: Cell, rung: int, found: Found) -> list[float]:
    """Return the test images' top-1 of each seed at a rung."""
    return [found[Run(cell, rung, seed)].test for seed in SEEDS]


def table(cells: list[Cell], found: Found) -> Table:
    """Return the figures for people: mean over the seeds ± standard deviation."""
    shown = Table("network", "batch", "method", "rate", "top-1", "at 3 x the rate", "change", "highest rate")
    for _, rows in groupby(cells, lambda cell: (cell.network, cell.batch)):
        for cell in rows:
            rung = chosen(cell, found)
            best, above = figures(cell, rung, found), figures(cell, rung + 1, found)
            shown.add_row(
                cell.network,
                str(cell.batch),
                cell.method,
                f"{rate(rung):.1e}",
                *(f"{mean(values):.2f} ± {stdev(values):.2f}" for values in (best, above)),
                f"{mean(above) - mean(best):+.2f}",
                f"{rate(highest(cell, found)):.1e}",
            )
        shown.add_section()
    return shown


def plot(path: Path, cells: list[Cell], found: Found) -> None:
    """Draw top-1 over the batch size, each at its chosen rate, and beside it over the rate with ``SMALL`` images."""
    networks = [name for name in NETWORKS if any(cell.network == name for cell in cells)]
    figure = Figure(figsize=(12, 4.6 * len(networks)), layout="constrained")
    axes = figure.subplots(len(networks), 2, squeeze=False, sharey="row")
    for network, (left, right) in zip(networks, axes, strict=True):
        over_batch: dict[str, Line] = {}
        over_rate: dict[str, Line] = {}
        for cell in sorted((cell for cell in cells if cell.network == network), key=_order):
            rungs: Line = {}
            for run in found:
                if run.cell == cell:
                    rungs.setdefault(rate(run.rung), []).append(found[run].test)
            over_batch.setdefault(cell.method, {})[cell.batch] = rungs[rate(chosen(cell, found))]
            if cell.batch == SMALL:
                over_rate[cell.method] = rungs
        _draw(left, over_batch)
        _draw(right, over_rate)
        left.set_xscale("log", base=2)
        left.xaxis.set_major_formatter("{x:g}")
        left.set(xlabel="images per batch", ylabel="top-1 in % of the test images")
        left.set_title(f"{network}, each at its best rate", loc="left")
        right.set_xscale("log")
        right.set(xlabel="peak learning rate")
        right.set_title(f"{network}, {SMALL} images per batch", loc="left")
        means = [mean(values) for line in over_batch.values() for values in line.values()]
        left.set_yscale("function", functions=(lambda y: -np.log(100 - y), lambda v: 100 - np.exp(-v)))
        left.set_yticks([10, 30, 50, 60, 70, 75, 80, 85, 90])
        left.set_ylim(min(means) - 5, max(means) + 1)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=150)


def _order(cell: Cell) -> tuple[int, int]:
    return NAMES.index(cell.method), cell.batch


def _draw(ax: Axes, lines: dict[str, Line]) -> None:
    """Draw the mean and the standard deviation at each line's points."""
    for method, line in lines.items():
        colour, marker = LOOKS[method.removesuffix(LASTING)]
        style = "--" if method.endswith(LASTING) else "-"
        xs = sorted(line)
        means, errors = [mean(line[x]) for x in xs], [stdev(line[x]) if len(line[x]) > 1 else 0 for x in xs]
        look = {"color": colour, "linestyle": style, "marker": marker, "markersize": 4, "capsize": 2}
        ax.errorbar(xs, means, errors, label=method, **look)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", alpha=0.3)


def main() -> None:
    """Measure, print or draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", default=Path("../shared/data"))
    parser.add_argument("--results", type=Path, required=True, metavar="FILE")
    parser.add_argument("--table", action="store_true", help="print what FILE holds, measure nothing")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw what FILE holds, measure nothing")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--methods", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--batches", nargs="+", type=int, default=[2, 1, 4, 8, 32])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--schedule", choices=SCHEDULES, default="cosine", help="of the rate, after a warm-up")
    parser.add_argument("--clip", type=float, help="clip gradients to this norm")
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--cache", type=Path, default=Path("build/bench/small_batch"), help="for images and a network")
    arguments = parser.parse_args()
    cells = [
        Cell(network, method, batch, arguments.steps, arguments.schedule, arguments.clip)
        for network, batch, method in product(arguments.networks, arguments.batches, arguments.methods)
    ]
    if not (arguments.table or arguments.plot):
        work(cells, arguments.results, arguments.jobs, arguments.data, arguments.cache)
        return
    found = read(arguments.results)
    cells = [cell for cell in cells if not missing(cell, found)]
    if arguments.table:
        clip = "not clipped" if arguments.clip is None else f"clipped to norm {arguments.clip:g}"
        print(
            f"top-1 in % of the test images after {arguments.steps} steps, {arguments.schedule} rate, gradients {clip}"
        )
        Console(width=110).print(table(cells, found))
    if arguments.plot:
        plot(arguments.plot, cells, found)


if __name__ == "__main__":
    main()
