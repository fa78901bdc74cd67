"""Whether images arrive as fast as a network learns: how fast they are read, and how long a step waits for them.

The network is the CIFAR-10 ResNet-20 at batch 64 on one thread. The images are the shared CIFAR-10's, or JPEG files of
noise where there are none.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

from normswap.bundles.source import load_model
from normswap.data.dataset import CACHE_BYTES, open_data
from normswap.data.preprocessing import preprocessing_of
from normswap.finetune.run.loading import StepBatches
from normswap.finetune.run.training import Training

BATCH = 64
STEPS = 12
ROUNDS = 2
"""A figure is the best of so many: what else runs on the machine only takes away."""

CASES = (
    (CACHE_BYTES, "none", 0),
    (CACHE_BYTES, "crop,flip", 0),
    (CACHE_BYTES, "resized-crop,flip", 0),
    (CACHE_BYTES, "crop,flip", 2),
    (0, "none", 0),
    (0, "crop,flip", 0),
    (0, "crop,flip", 1),
    (0, "crop,flip", 2),
)
"""Bytes of decoded images to keep, augmentation and workers."""

Batches = Callable[[], Iterator[tuple[torch.Tensor, torch.Tensor]]]


def sources(folder: Path) -> Iterator[tuple[tuple[str, ...], Batches]]:
    """Yield what the batches come from and a function that gives ``STEPS`` of them."""
    preprocessing = preprocessing_of(network())
    assert preprocessing is not None
    images, labels = (torch.from_numpy(a) for a in open_data(str(folder), preprocessing).batch(range(BATCH * STEPS)))
    yield ("tensors in memory", "", ""), lambda: zip(images.split(BATCH), labels.split(BATCH), strict=True)

    def loader(cache_bytes: int, augment: str, workers: int) -> Batches:
        data = open_data(str(folder), preprocessing, cache_bytes=cache_bytes)
        data.check()
        steps = StepBatches(data, Training(batch_size=BATCH, augment=augment), first=0, steps=STEPS)
        return lambda: (tuple(batch[:2]) for batch in DataLoader(steps, batch_size=None, num_workers=workers))

    for cache_bytes, augment, workers in CASES:
        name = "files, kept decoded" if cache_bytes else "files"
        yield (name, augment, str(workers)), loader(cache_bytes, augment, workers)


def network() -> torch.nn.Module:
    """Return the ResNet-20 with random weights."""
    return load_model(f"{Path(__file__).parent.parent}/examples/resnet20.py:resnet20").train()  # type: ignore[no-any-return]


def reading(batches: Batches) -> float:
    """Return images a second from the first batch to the last, as workers take a while to start."""
    iterator = batches()
    next(iterator)
    start = time.perf_counter()
    for _ in iterator:
        pass
    return BATCH * (STEPS - 1) / (time.perf_counter() - start)


def learning(batches: Batches, model: torch.nn.Module) -> tuple[float, float]:
    """Return images a second of SGD alone, and the percentage of a step it waits for its batch."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    iterator = batches()
    next(iterator)
    waited = worked = 0.0
    for _ in range(STEPS - 1):
        start = time.perf_counter()
        x, y = next(iterator)
        read = time.perf_counter()
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        waited += read - start
        worked += time.perf_counter() - read
    return BATCH * (STEPS - 1) / worked, 100 * waited / (waited + worked)


@contextmanager
def images(folder: Path) -> Iterator[Path]:
    """Yield ``folder``, or where there is none a temporary one with files of noise in two classes."""
    if folder.is_dir():
        yield folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        random = np.random.default_rng(0)
        for index in range(2 * BATCH * STEPS):
            path = Path(temporary) / "ab"[index % 2]
            path.mkdir(exist_ok=True)
            Image.fromarray(random.integers(0, 256, (32, 32, 3), np.uint8)).save(path / f"{index:05}.jpg")
        yield Path(temporary)


def main() -> None:
    """Measure in turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("../shared/data/cifar10/train"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = network()
    with images(arguments.folder) as folder:
        found = dict(sources(folder))
        read = dict.fromkeys(found, 0.0)
        waits = dict.fromkeys(found, 100.0)
        step = 0.0
        for _ in range(ROUNDS):
            for name, batches in found.items():
                read[name] = max(read[name], reading(batches))
                rate, wait = learning(batches, model)
                step, waits[name] = max(step, rate), min(waits[name], wait)
    table = Table("images from", "augment", "workers", "images / s", "of a step's need", "a step waits")
    for name in found:
        table.add_row(*name, f"{read[name]:,.0f}", f"{read[name] / step:,.0f}x", f"{waits[name]:.1f} %")
    print(f"a step of ResNet-20 takes {step:.0f} images a second")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
