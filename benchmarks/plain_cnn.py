"""A second network for the retention table: a plain CNN with BatchNorm, trained here from a fixed seed."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from normswap.data.dataset import Data
from normswap.sources.outputs import staged

WIDTHS = (32, 48, 48, 96, 96, 192)
POOLED = (0, 2, 4)
"""After which convolutions the map is halved."""
EPOCHS, BATCH, PEAK_RATE, SHIFT, SEED = 12, 100, 0.2, 2, 0


def plain_cnn(classes: int = 10) -> nn.Sequential:
    """Return six 3x3 convolutions in a row, like VGG's, each before a BatchNorm, and a linear head."""
    layers: list[nn.Module] = []
    inputs = 3
    for index, width in enumerate(WIDTHS):
        layers += [nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        if index in POOLED:
            layers.append(nn.MaxPool2d(2))
        inputs = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


def trained(train: Data, cache: Path) -> nn.Sequential:
    """Return the network as trained on ``train``, read from the folder ``cache`` if it was trained before."""
    path = cache / f"plain_cnn-seed{SEED}-epochs{EPOCHS}.pt"
    if not path.exists():
        model = _train(train)
        with staged(path) as temporary:
            torch.save(model.state_dict(), temporary)
    model = plain_cnn()
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()


def _train(data: Data) -> nn.Sequential:
    """Train by SGD with one cycle of the rate, on images flipped and shifted at random."""
    torch.manual_seed(SEED)
    images, labels = (torch.from_numpy(array) for array in data.batch(range(len(data))))
    model = plain_cnn().train()
    steps = EPOCHS * (len(images) // BATCH)
    optimizer = torch.optim.SGD(model.parameters(), PEAK_RATE, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=steps, pct_start=0.25)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(images)).split(BATCH)[: len(images) // BATCH]:
            x = _augmented(images[chosen])
            loss = F.cross_entropy(model(x), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model


def _augmented(x: torch.Tensor) -> torch.Tensor:
    """Return the images with half of them flipped, and all shifted alike by up to ``SHIFT`` pixels."""
    flipped = torch.rand(len(x), 1, 1, 1) < 0.5
    x = F.pad(torch.where(flipped, x.flip(3), x), (SHIFT,) * 4)
    down, right = torch.randint(2 * SHIFT + 1, (2,)).tolist()
    height, width = x.shape[2] - 2 * SHIFT, x.shape[3] - 2 * SHIFT
    return x[:, :, down : down + height, right : right + width]
