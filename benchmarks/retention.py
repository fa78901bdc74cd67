"""How much of a trained network's accuracy each replacement keeps before any training.

Prints top-1 on test images for γ and β reset, copied, carried over by algebra, and calibrated on unlabelled training
images, with and without refitting the weights, in one run. Calibration is repeated on other images for each seed.

    python benchmarks/retention.py [DATA]           # DATA/cifar10/{train,test}, DATA/torch/cifar10_resnet20.th
    python benchmarks/retention.py --full           # every target, three seeds, and a second network trained here
"""

import argparse
import copy
import fnmatch
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
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
    "sn even": SwitchNorm("even"),
    "sn warm, no batch statistics": SwitchNorm(batch_statistics="none"),
    "gn auto, ln": GroupNorm(),
    "gn 2 groups": GroupNorm(groups=2),
    "gn 4 groups": GroupNorm(groups=4),
    "gn 8 groups": GroupNorm(groups=8),
    "gn 16 groups": GroupNorm(groups=16),
    "in": GroupNorm(channels_per_group=1),
}
QUICK = ("brn", "gn auto, ln", "gn 8 groups")
IMAGES, SEEDS = 256, 3
RESNET, PLAIN = "resnet20", "plain_cnn"


@dataclass
class Row:
    """What one target keeps: top-1 in %, without data, and for each seed with the weights refitted and without."""

    target: str
    carry_over: float
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


def without_data(original: nn.Module, model: nn.Module, target: str, test: Test) -> Row:
    """Return what the patched ``model`` keeps with γ and β carried over, and with them copied and reset instead."""
    row = Row(target, test.top1(model))
    if site_layers(model):
        other = copy.deepcopy(model)
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
    rows = [without_data(original, model, name, test) for name, model in models.items()]
    yield rows
    for seed in range(seeds):
        chosen = train.sample(IMAGES, seed)
        batches = [train.batch(part)[0] for part in np.split(chosen, range(64, IMAGES, 64))]
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

    found = Table("target", "reset", "copied", "carry-over", "calibrated", "without refit", "seeds")
    for row in rows:
        plain = [[] if value is None else [value] for value in (row.reset, row.copied, row.carry_over)]
        cells = [shown(values) for values in (*plain, row.calibrated, row.without_refit)]
        found.add_row(row.target, *cells, str(len(row.calibrated) or ""))
    return found


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", default=Path("../shared/data"))
    parser.add_argument("--full", action="store_true", help="every target, three seeds, both networks")
    parser.add_argument("--network", choices=(RESNET, PLAIN), help="one network alone")
    parser.add_argument("--targets", default="*", metavar="GLOB", help="the targets whose names match")
    parser.add_argument("--seeds", type=int, metavar="N", help=f"so many ({SEEDS} with --full, else 1)")
    parser.add_argument("--cache", type=Path, default=Path("build/bench"), help="where the second network is kept")
    parser.add_argument("--json", type=Path, help="write the figures here, after each that is found")
    arguments = parser.parse_args()
    data: Path = arguments.data
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
    networks = [arguments.network] if arguments.network else [RESNET, PLAIN] if arguments.full else [RESNET]
    targets = fnmatch.filter(TARGETS if arguments.full else QUICK, arguments.targets)
    seeds = arguments.seeds or (SEEDS if arguments.full else 1)
    results = []
    for name in networks:
        original = resnet if name == RESNET else trained(train, arguments.cache)
        batch_norm = test.top1(original)
        results.append({"network": name, "batch_norm": batch_norm, "test_images": test.size, "images": IMAGES})
        for rows in measure(original, targets, train, test, seeds):
            results[-1]["rows"] = [asdict(row) for row in rows]
            if arguments.json:
                arguments.json.write_text(json.dumps({"schema_version": 1, "networks": results}, indent=2) + "\n")
        print(
            f"{name} on CIFAR-10: top-1 in % of {test.size} test images, {batch_norm:.2f} with BatchNorm; "
            f"calibrated on {IMAGES} unlabelled images a seed"
        )
        Console(width=100).print(table(rows))


if __name__ == "__main__":
    main()
