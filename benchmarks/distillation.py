"""What distillation adds to calibration: the course of the loss over 100 steps, and top-1 as a share of BatchNorm's.

For each network and target: patched, calibrated on its unlabelled images, then `normswap.finetune` with the defaults of
a model that is taught, for each seed. The loss is told of the calibrated model over the batches of the run, of its last
ten steps, and at its highest: the largest mean of ten steps, as a share of the calibrated model's on the same batches.

    python benchmarks/distillation.py [DATA]        # DATA/cifar10/{train,test}, DATA/torch/cifar10_resnet20.th
    python benchmarks/distillation.py --network efficientnet_lite0 --seeds 3 --json lite0.json

EfficientNet-Lite0 is taught on DATA/imagenet/calibrate and judged on evaluate, see `lite0`.
"""

import argparse
import copy
import fnmatch
import json
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from lite0 import PREPROCESSING, efficientnet_lite0, images
from rich.console import Console
from rich.table import Table
from torch import nn

import normswap
from normswap import GroupNorm, SwitchNorm
from normswap.bundles import bundle
from normswap.bundles.source import load_model
from normswap.convert.targets import Target
from normswap.data.dataset import Data, open_data
from normswap.data.preprocessing import preprocessing_of
from normswap.finetune import Distillation, Settings, finetune
from normswap.finetune.calibration.calibrate import sample
from normswap.finetune.run.accuracy import accuracy
from normswap.finetune.run.loading import StepBatches
from normswap.finetune.run.torch.train import predict

TARGETS: dict[str, Target] = {
    "gn": GroupNorm(),
    "gn 8 groups": GroupNorm(groups=8, indivisible="gcd"),
    "sn": SwitchNorm(),
}
RESNET, LITE = NETWORKS = ("resnet20", "efficientnet_lite0")
STEPS, BATCH, CALIBRATION, SMOOTH = 100, 16, 256, 10
HERE = Path(__file__).parent


@dataclass
class Row:
    """One run: losses, top-1 in % with BatchNorm, calibrated and taught, and the seconds the steps took.

    ``untaught`` are the losses of the calibrated model on the batches that ``losses`` are of.
    """

    network: str
    target: str
    seed: int
    batch_norm: float
    calibrated: float
    taught: float
    seconds: float
    losses: list[float]
    untaught: list[float]

    @property
    def start(self) -> float:
        """The loss of the calibrated model."""
        return mean(self.untaught)

    @property
    def highest(self) -> float:
        """The highest smoothed loss, as a share of the calibrated model's, in %."""
        return 100 * float((smooth(self.losses) / smooth(self.untaught)).max())

    @property
    def end(self) -> float:
        """The loss in the end."""
        return float(smooth(self.losses)[-1])

    @property
    def share(self) -> float:
        """Top-1 as a share of BatchNorm's, in %."""
        return 100 * self.taught / self.batch_norm


def smooth(losses: list[float]) -> Any:
    """Return the means of so many steps."""
    return np.convolve(losses, np.ones(SMOOTH) / SMOOTH, "valid")


def top1(model: nn.Module, data: Data) -> float:
    """Return the accuracy in percent."""
    return accuracy(lambda x: predict(model, x), data).top1


def losses_of(model: nn.Module, original: nn.Module, batches: Any) -> list[float]:
    """Return the losses of a model on batches, as it is taught: at inference."""
    distillation = Distillation(model.eval(), original)
    with torch.no_grad():
        return [distillation(x, model(x)).item() for x in (torch.from_numpy(batch[0]) for batch in batches)]


def mode(model: nn.Module) -> str:
    """Return which kinds of a model's layers are in train mode, and how many of each."""
    kinds = Counter(type(module).__name__ for module in model.modules() if module.training and module is not model)
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "none"


def run(
    name: str, spec: str, weights: Path | None, target: str, data: Data, test: Data, options: Any, seed: int
) -> Row:
    """Patch, calibrate and teach a network, and tell how it went."""
    original = load_model(spec, weights).eval()
    chosen = sample(data, min(CALIBRATION, len(data)))
    model = copy.deepcopy(original)
    report = normswap.patch(model, TARGETS[target], example=chosen[0][:1])
    normswap.calibrate(report, chosen)
    calibrated = top1(model, test)
    folder = Path(tempfile.mkdtemp())
    preprocessing = PREPROCESSING if name == LITE else preprocessing_of(original)
    bundle.save(report, folder / "patched", source=spec, original=original, preprocessing=preprocessing)
    opened = bundle.read(folder / "patched", trust=True)
    settings = Settings(
        steps=STEPS, batch_size=BATCH, lr=options.lr, stages="all", teacher="original", augment=options.augment,
        seed=seed,
    )  # fmt: skip
    losses: list[float] = []
    rates: list[float] = []
    modes: set[str] = set()

    def look(step: int, figures: Any) -> None:
        losses.append(figures["loss"])
        rates.append(figures["learning_rate"])
        modes.add(mode(opened.model))

    began = time.perf_counter()
    finetune(opened, folder / "taught", data, settings, draw=False, on_step=look)
    seconds = time.perf_counter() - began
    print(f"{name} {target} seed {seed}: in train mode {' / '.join(modes)}; peak rate {max(rates):.2g}", flush=True)
    figures = top1(original, test), calibrated, top1(opened.model, test)
    print(f"top-1 of BatchNorm, calibrated, taught: {figures}; {seconds:.0f} s", flush=True)
    untaught = losses_of(model, original, StepBatches(data, settings, first=0, steps=STEPS))
    return Row(name, target, seed, *figures, seconds, losses, untaught)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", type=Path, default=Path("../shared/data"))
    parser.add_argument("--network", choices=NETWORKS, help="one network alone")
    parser.add_argument("--targets", default="gn*", metavar="GLOB", help="the targets whose names match")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--augment", default="none")
    parser.add_argument("--lr", type=float, help="another rate than the default")
    parser.add_argument("--json", type=Path, help="write the figures here, after each run")
    options = parser.parse_args()
    data: Path = options.data
    if not data.exists():
        print(f"distillation: skipped, no data at {data}")
        return
    torch.set_num_threads(1)
    rows: list[Row] = []
    for name in [options.network] if options.network else NETWORKS:
        if name == LITE:
            try:
                efficientnet_lite0()
            except ModuleNotFoundError as error:
                print(f"distillation: {LITE} skipped, no {error.name}")
                continue
            spec, weights = f"{HERE / 'lite0.py'}:efficientnet_lite0", None
            learn, test = images(data)
        else:
            spec, weights = f"{HERE.parent / 'examples' / 'resnet20.py'}:resnet20", data / "torch/cifar10_resnet20.th"
            preprocessing = preprocessing_of(load_model(spec, weights))
            assert preprocessing is not None
            learn, test = (open_data(str(data / "cifar10" / part), preprocessing) for part in ("train", "test"))
        for target in fnmatch.filter(TARGETS, options.targets):
            for seed in range(options.seeds):
                rows.append(run(name, spec, weights, target, learn, test, options, seed))
                if options.json:
                    shown = ("start", "highest", "end", "share")
                    found = [{**asdict(row), **{each: getattr(row, each) for each in shown}} for row in rows]
                    options.json.write_text(json.dumps({"schema_version": 1, "runs": found}, indent=2) + "\n")
    table = Table("network", "target", "start", "highest, %", "end", "BatchNorm", "calibrated", "taught", "share", "s")
    for name, target in dict.fromkeys((row.network, row.target) for row in rows):
        of = [row for row in rows if (row.network, row.target) == (name, target)]
        figures = [
            mean(getattr(row, each) for row in of)
            for each in ("start", "highest", "end", "batch_norm", "calibrated", "taught", "share", "seconds")
        ]
        start, highest, end, *rest = figures
        table.add_row(name, target, f"{start:.3f}", f"{highest:.1f}", f"{end:.3f}", *(f"{each:.2f}" for each in rest))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
