"""The demo's network in PyTorch."""

import torch
import torch.nn.functional as F
from torch import nn

from ..data.dataset import Data
from ..finetune.run.batches import batch_indices


def build() -> nn.Sequential:
    """Return three convolutions with BatchNorm, and a classifier, for (N, 1, 8, 8) images."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def trained(data: Data, steps: int = 300) -> nn.Module:
    """Return the network trained on ``data``."""
    model = build()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(steps):
        images, labels = data.batch(batch_indices(len(data), 64, step, seed=0))
        loss = F.cross_entropy(model(torch.from_numpy(images)), torch.from_numpy(labels))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model.eval()
