"""How far fine-tuning takes each replacement: 100 steps of distillation, and one epoch with labels.

Prints top-1 on test images of the published CIFAR-10 ResNet-20 before and after, mean and standard deviation over the
seeds, beside the BatchNorm network itself and what it comes to when it is trained the same way.

    python benchmarks/recovery.py [DATA]            # DATA/cifar10/{train,test}, DATA/torch/cifar10_resnet20.th
"""

import argparse
import copy
import fnmatch
from pathlib import Path
from statistics import mean, stdev

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import normswap
from normswap import BatchRenorm, GroupNorm, SwitchNorm
from normswap.bundles.source import load_model
from normswap.data.dataset import Data, open_data
from normswap.data.preprocessing import preprocessing_of
from normswap.finetune import Hooks, Momentum, RenormLimits
from normswap.finetune.calibration.calibrate import sample
from normswap.finetune.run.accuracy import accuracy
from normswap.finetune.run.torch.train import predict, train
from normswap.finetune.run.training import Training

TARGETS = {
    "bn": None,
    "sn": SwitchNorm(),
    "sn, anchored": SwitchNorm(batch_statistics="frozen"),
    "brn": BatchRenorm(),
    "gn auto": GroupNorm(),
    "gn auto, calibrated": GroupNorm(),
}
BATCH, STEPS, CALIBRATION = 64, 100, 256


def top1(model: nn.Module, data: Data) -> float:
    """Return the accuracy in percent."""
    return accuracy(lambda x: predict(model, x), data).top1


def trained(model: nn.Module, data: Data, training: Training, teacher: nn.Module | None) -> nn.Module:
    """Return a trained copy of the model."""
    model = copy.deepcopy(model)
    with Hooks(RenormLimits(model, training.steps), Momentum(model, BATCH)) as hooks:
        train(model, data, training, teacher=teacher, hooks=[hooks])
    return model


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="?", type=Path, default=Path("../shared/data"))
    parser.add_argument("--targets", default="*", metavar="GLOB", help="the targets whose names match")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--distill-lr", type=float, default=0.05)
    parser.add_argument("--label-lr", type=float, default=0.01)
    options = parser.parse_args()
    if not options.data.exists():
        print(f"recovery: skipped, no data at {options.data}")
        return
    torch.set_num_threads(1)
    console = Console(width=100)
    source = str(Path(__file__).parent.parent / "examples" / "resnet20.py") + ":resnet20"
    original = load_model(source, options.data / "torch" / "cifar10_resnet20.th").eval()
    preprocessing = preprocessing_of(original)
    assert preprocessing is not None
    images, test = (open_data(str(options.data / "cifar10" / name), preprocessing) for name in ("train", "test"))
    epoch = len(images) // BATCH
    table = Table(
        "target", "before", f"{STEPS} steps of distillation", "one epoch with labels",
        title=f"ResNet-20, batch {BATCH}, rates {options.distill_lr} and {options.label_lr}, {options.seeds} seeds",
    )  # fmt: skip
    for name, target in TARGETS.items():
        if not fnmatch.fnmatch(name, options.targets):
            continue
        model = copy.deepcopy(original) if target is None else normswap.patch(original, target, inplace=False).model
        if "calibrated" in name:
            normswap.calibrate(model, original, sample(images, CALIBRATION))
        cells = []
        for lr, steps, teacher in ((options.distill_lr, STEPS, original), (options.label_lr, epoch, None)):
            runs = [
                top1(trained(model, images, Training(steps, BATCH, lr, seed=seed), teacher), test)
                for seed in range(options.seeds)
            ]
            cells.append(f"{mean(runs):.2f} ± {stdev(runs):.2f}" if len(runs) > 1 else f"{runs[0]:.2f}")
            print(name, steps, *(f"{value:.2f}" for value in runs), flush=True)
        table.add_row(name, f"{top1(model, test):.2f}", *cells)
    console.print(table)


if __name__ == "__main__":
    main()
