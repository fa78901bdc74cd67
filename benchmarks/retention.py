"""How much of a trained network's accuracy each replacement keeps before any training.

Prints top-1 on a test folder for gamma and beta reset, copied, carried over by algebra, and calibrated on unlabelled
training images, in one run. Needs the published CIFAR-10 ResNet-20 weights and CIFAR-10 as class folders:

    python benchmarks/retention.py DATA        # DATA/cifar10/{train,test}, DATA/torch/cifar10_resnet20.th
"""

import argparse
import copy
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import normswap
from normswap import BatchRenorm, GroupNorm, SwitchNorm
from normswap.finetune.torch import predict
from normswap.finetune.torch_sites import get_affine, set_affine, site_layers
from normswap.sources.data import open_data
from normswap.sources.models import load_model, preprocessing_of

TARGETS = {
    "brn": BatchRenorm(),
    "sn exact": SwitchNorm("exact"),
    "sn warm": SwitchNorm(),
    "sn even": SwitchNorm("even"),
    "sn warm, no batch statistics": SwitchNorm(batch_statistics="none"),
    "gn auto (1 group)": GroupNorm(),
    "gn 2 groups": GroupNorm(groups=2),
    "gn 4 groups": GroupNorm(groups=4),
    "gn 8 groups": GroupNorm(groups=8),
    "gn 16 groups": GroupNorm(groups=16),
    "in": GroupNorm(channels_per_group=1),
}
IMAGES, SEED = 256, 0


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, nargs="?", default=Path("../shared/data"))
    data = parser.parse_args().data
    if not data.exists():
        print(f"retention: skipped, no data at {data}")
        return
    torch.manual_seed(SEED)
    source = str(Path(__file__).parent.parent / "examples" / "resnet20.py") + ":resnet20"
    original = load_model(source, data / "torch" / "cifar10_resnet20.th").eval()
    preprocessing = preprocessing_of(original)
    assert preprocessing is not None
    test = open_data(str(data / "cifar10" / "test"), preprocessing)
    train = open_data(str(data / "cifar10" / "train"), preprocessing)
    chosen = train.sample(IMAGES, SEED)
    batches = [train.batch(chosen[start : start + 64])[0] for start in range(0, IMAGES, 64)]
    held = list(test.batches(250))

    def top1(model: torch.nn.Module) -> str:
        found = sum(int((predict(model, x).argmax(1) == y).sum()) for x, y in held)
        return f"{100 * found / len(test):.2f}"

    table = Table("target", "reset", "copied", "carry-over", f"calibrated on {IMAGES}")
    for name, target in TARGETS.items():
        model = normswap.patch(copy.deepcopy(original), target, example=batches[0]).model
        carried, sites = top1(model), site_layers(model)
        if not sites:
            table.add_row(name, "", "", carried, "")
            continue
        affine = {site: get_affine(layer) for site, layer in sites.items()}
        for site, layer in sites.items():
            gamma, beta = affine[site]
            set_affine(layer, gamma * 0 + 1, beta * 0)
        reset = top1(model)
        for site, layer in sites.items():
            set_affine(layer, *get_affine(original.get_submodule(site)))
        copied = top1(model)
        for site, layer in sites.items():
            set_affine(layer, *affine[site])
        normswap.calibrate(model, original, batches)
        table.add_row(name, reset, copied, carried, top1(model))
    print(f"CIFAR-10 ResNet-20, top-1 in % of {len(test)} test images; with BatchNorm {top1(original)}; seed {SEED}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
