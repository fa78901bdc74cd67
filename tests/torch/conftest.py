"""Small PyTorch models with the running statistics and scales of a trained one."""

import hashlib
import re
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .runs import bundled, coloured

TARGETS = ["sn", "brn", "gn", "ln", "in"]


def trained_(model, seed=0):
    """Give every BatchNorm of ``model`` plausible statistics and scales, in place."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            for tensor, low, high in (
                (module.weight, 0.5, 2.0),
                (module.bias, -1.0, 1.0),
                (module.running_mean, -1.0, 1.0),
                (module.running_var, 0.2, 3.0),
            ):
                if tensor is not None:
                    tensor.data.uniform_(low, high, generator=generator)
    return model.eval()


def filled(cls, channels, **options):
    """A layer whose parameters and running statistics are not the initial ones."""
    layer = cls(channels, **options)
    generator = torch.Generator().manual_seed(3)
    for tensor in (*layer.parameters(), *(b for n, b in layer.named_buffers() if n.startswith("running"))):
        tensor.data.uniform_(0.3, 1.5, generator=generator)
    return layer


def fingerprint(model):
    """A hash of everything in the state dict, names and types included."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def batch_norms(model):
    """The names of the BatchNorms in ``model``."""
    return [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]


def refusal(*lines):
    """The whole message about sites that cannot be replaced, one line each."""
    return "\n".join(
        (
            f"expected BatchNorms that can be replaced, received {len(lines)} that cannot:",
            *(f"  {line}" for line in lines),
            "leave such a layer as it is with --exclude NAME (exclude=[NAME])",
        )
    )


def exactly(message):
    """A pattern that matches ``message`` and nothing else."""
    return f"^{re.escape(message)}$"


class Residual(nn.Module):
    """A network with a branch, so that call order and nesting matter."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8, eps=1e-3)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        """Return scores for (N, 3, H, W) images."""
        x = self.stem(x)
        return self.head(torch.relu(x + self.bn(self.conv(x))).mean((2, 3)))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def model():
    """A small trained network with two BatchNorms, ``stem.1`` and ``bn``."""
    torch.manual_seed(0)
    return trained_(Residual())


@pytest.fixture
def images():
    """Four images (N, C, H, W)."""
    return torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def data():
    """Images that a few steps can learn."""
    return coloured()


@pytest.fixture
def source(tmp_path):
    """The function that makes a bundle of a small network, patched to a target, and returns its path."""
    return partial(bundled, tmp_path)
