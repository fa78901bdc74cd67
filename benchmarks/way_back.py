"""What the way back keeps: networks fine-tuned without BatchNorm for 300 steps at two images a batch, then made "bn".

Prints top-1 on test images when fine-tuned and as BatchNorm, its share of that, and how long either file takes as a
multiple of the original BatchNorm network's (least times of one run in which the files take turns). Lines are fitted to
256 training images.

    python benchmarks/way_back.py [DATA] [--seeds 0,1,2]    # DATA/cifar10/{train,test}, DATA/torch/cifar10_resnet20.th
"""

import argparse
import copy
from collections.abc import Mapping
from pathlib import Path
from statistics import mean, stdev
from tempfile import TemporaryDirectory

import numpy as np
import torch
from fine_tuned import NETWORKS, Bench
from rich.console import Console
from rich.table import Table
from small_batch import Cell, Run, fine_tune, top1
from torch import nn

import normswap
from normswap import GroupNorm, SwitchNorm
from normswap.convert.targets import Target
from normswap.verification.latency import latencies

TARGETS: dict[str, Target] = {
    "gn": GroupNorm(),
    "gn, 8 groups": GroupNorm(groups=8),
    "in": GroupNorm(channels_per_group=1),
    "sn, anchored": SwitchNorm(batch_statistics="frozen"),
    "sn, no batch statistics": SwitchNorm(batch_statistics="none"),
}
STEPS, BATCH, RUNG, IMAGES = 300, 2, 2, 256
"""The rate of that rung, 9e-4, is the ladder's nearest to half of what `normswap finetune` takes."""
EXAMPLE = torch.zeros(2, 3, 32, 32)


def multiples(models: Mapping[str, nn.Module]) -> list[float]:
    """Return how long a run on eight images takes in each model's file, as a multiple of the first's."""
    with TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{number}.onnx" for number, name in enumerate(models)}
        for name, model in models.items():
            normswap.to_onnx(model, files[name], example=torch.randn(EXAMPLE.shape), check=False)
        least = [times[8][1] for times in latencies(files, [tuple(EXAMPLE.shape[1:])]).values()]
    return [each / least[0] for each in least]


def row(bench: Bench, network: str, name: str, seeds: list[int]) -> list[str]:
    """Fine-tune, go back, and return a row of the table."""
    original, data = bench.network(network)
    tuned, back, shares = [], [], []
    for seed in seeds:
        model = copy.deepcopy(original)
        normswap.patch(model, TARGETS[name], example=EXAMPLE)
        fine_tune(model, data, Run(Cell(network, name, BATCH, STEPS, "cosine", 1.0), RUNG, seed))
        tuned.append(top1(model, bench.test))
        images = np.random.default_rng([seed, 1]).permutation(len(data))[:IMAGES]
        batches = [torch.from_numpy(x) for x, _ in data.batches(64, images)]
        report = normswap.patch(model, "bn", data=batches, inplace=False)
        back.append(top1(report.model, bench.test))
        shares.append(100 * back[-1] / tuned[-1])
    _, before, after = multiples({"original": original, "tuned": model.eval(), "bn": report.model.eval()})
    told = (tuned, back, shares)
    return [network, name, *(f"{mean(v):.2f} ± {stdev(v):.2f}" if len(v) > 1 else f"{v[0]:.2f}" for v in told),
            f"{before:.2f}", f"{after:.2f}"]  # fmt: skip


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", type=Path, default=Path("../shared/data"))
    parser.add_argument("--cache", type=Path, default=Path("build/bench/small_batch"), help="for images and a network")
    parser.add_argument("--seeds", type=lambda text: [int(part) for part in text.split(",")], default=[0, 1, 2])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(arguments.data, arguments.cache)
    columns = ("network", "fine-tuned as", "top-1", "as bn", "share, %", "time", "time as bn")
    table = Table(*columns, title=f"{STEPS} steps at {BATCH} images a batch, then bn from {IMAGES} images")
    for network in NETWORKS:
        for name in TARGETS:
            table.add_row(*(found := row(bench, network, name, arguments.seeds)))
            print("; ".join(found), flush=True)
    Console().print(table)


if __name__ == "__main__":
    main()
