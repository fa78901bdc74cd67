"""What the small-batch benchmark fine-tunes: two trained networks, their images, and what becomes of the BatchNorms."""

from collections.abc import Callable
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from plain_cnn import trained
from torch import nn

import normswap
from normswap import BatchRenorm, GroupNorm, SwitchNorm
from normswap.bundles.source import load_model
from normswap.convert.targets import Target
from normswap.data.dataset import Data, from_arrays, open_data
from normswap.data.preprocessing import Preprocessing, preprocessing_of

RESNET, PLAIN = NETWORKS = ("resnet20", "plain_cnn")
SELECTION = 2000
"""Training images that are kept for choosing the rate."""


class Bench:
    """The trained networks, and the images they are fine-tuned with, chosen by and tested on."""

    def __init__(self, data: Path, folder: Path) -> None:
        source = str(Path(__file__).parent.parent / "examples" / "resnet20.py") + ":resnet20"
        self.resnet = load_model(source, data / "torch" / "cifar10_resnet20.th").eval()
        preprocessing = preprocessing_of(self.resnet)
        assert preprocessing is not None
        x, y, test_x, test_y = _decoded(data / "cifar10", folder)

        def part(indices: NDArray[np.int64]) -> Data:
            return from_arrays(x[indices], y[indices], preprocessing)

        order = np.random.default_rng(0).permutation(len(x))
        half = (SELECTION + len(x)) // 2
        self.test = from_arrays(test_x, test_y, preprocessing)
        self.selection, self.learning = part(order[:SELECTION]), part(order[SELECTION:])
        self.plain, self.unseen = trained(part(order[SELECTION:half]), folder), part(order[half:])

    def network(self, name: str) -> tuple[nn.Module, Data]:
        """Return a trained network and its images for fine-tuning.

        The published ResNet-20 is given all that are not kept for choosing. The plain CNN was trained here on one half
        of them and is given the other.
        """
        return (self.resnet, self.learning) if name == RESNET else (self.plain, self.unseen)


def _decoded(images: Path, folder: Path) -> list[NDArray[Any]]:
    path = folder / "cifar10.npz"
    if not path.exists():
        arrays = []
        for part in ("train", "test"):
            data = open_data(str(images / part), Preprocessing((32, 32, 3), "channels_last"))
            x, y = data.batch(range(len(data)))
            arrays += [np.rint(255 * x).astype(np.uint8), y]
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(path, *arrays)
    with np.load(path) as file:
        return [file[name] for name in file.files]


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm by its running statistics in training, too; γ and β learn."""

    def train(self, mode: bool = True) -> "FrozenBatchNorm2d":
        """Stay in eval mode."""
        return super().train(False)


def _frozen(norm: nn.BatchNorm2d) -> nn.Module:
    frozen = FrozenBatchNorm2d(norm.num_features, norm.eps)
    frozen.load_state_dict(norm.state_dict())
    return frozen.eval()


def _reset(norm: nn.BatchNorm2d) -> nn.Module:
    """Return what Opacus's `ModuleValidator.fix` puts in a BatchNorm's place."""
    return nn.GroupNorm(gcd(32, norm.num_features), norm.num_features)


def _copied(norm: nn.BatchNorm2d) -> nn.Module:
    copied = nn.GroupNorm(1, norm.num_features, norm.eps)
    copied.load_state_dict(dict(norm.named_parameters()))
    return copied


def _patched(model: nn.Module, target: Target) -> None:
    normswap.patch(model, target, example=torch.zeros(2, 3, 32, 32))


def _replaced(model: nn.Module, make: Callable[[nn.BatchNorm2d], nn.Module]) -> None:
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            model.set_submodule(name, make(module))


METHODS: dict[str, Callable[[nn.Module], None]] = {
    "BN": lambda model: None,
    "frozen BN": lambda model: _replaced(model, _frozen),
    "anchored SN": lambda model: _patched(model, SwitchNorm(batch_statistics="frozen")),
    "SN": lambda model: _patched(model, SwitchNorm()),
    "BRN": lambda model: _patched(model, BatchRenorm()),
    "GN": lambda model: _patched(model, GroupNorm()),
    "GN copied": lambda model: _replaced(model, _copied),
    "GN reset": lambda model: _replaced(model, _reset),
}
