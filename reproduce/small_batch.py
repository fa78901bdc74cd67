"""BatchNorm, Group Normalization and Switchable Normalization with fewer and fewer images a process.

The ImageNet table of Switchable Normalization (Luo et al., table 1 of "Differentiable Learning-to-Normalize via
Switchable Normalization"), its shape on CIFAR-10: each process has statistics of its own images alone.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.preprocessing import Preprocessing
from .data import cifar10
from .experiment import Curve, Experiment, Finding, Outcomes, Scale

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHAPES = (8, 32), (8, 16), (8, 8), (8, 4), (8, 2), (1, 16), (1, 32), (8, 1), (1, 8)
"""Processes, and images in each, in the order of the table."""

PUBLISHED = {
    "BN": (76.4, 76.3, 75.2, 72.7, 65.3, 76.2, 76.5, None, 75.4),
    "GN": (75.9, 75.8, 76.0, 75.8, 75.9, 75.9, 75.8, 75.5, 75.5),
    "SN": (76.9, 76.7, 76.7, 75.9, 75.6, 76.3, 76.6, 75.0, 75.9),
}
"""What ResNet-50 came to on ImageNet, top-1 in percent."""

GROUP = 8
"""How many channels of a map GN takes together: the 32 groups of ImageNet's widths would be one channel each here."""

LARGE, SMALL = (8, 32), (8, 2)
FALL = 3.0
"""By how many points a norm has to lose on GN, from 32 images a process to 2, to be said to fall."""

RATE, RATE_IMAGES = 0.1, 256
"""The published rate, of steps of 8 x 32 images, and in proportion for others."""


def _name(norm: str, shape: tuple[int, int]) -> str:
    return f"{norm}, {shape[0]} x {shape[1]}"


def curves(scale: Scale) -> list[Curve]:
    """Return each norm at each shape, the rate in proportion to the images of a step."""
    epochs, depth, width = (100, 16, 4) if scale == "full" else (2, 10, 1)
    found = []
    for processes, images in SHAPES:
        batch = processes * images
        settings: dict[str, Any] = {"lr": RATE * batch / RATE_IMAGES, "weight_decay": 1e-4, "augment": "crop,flip"}
        settings |= {"sync_statistics": False, "steady_statistics": False, "max_grad_norm": 0.0}
        for norm in PUBLISHED:
            build = partial(network, norm=norm, images=images, depth=depth, width=width)
            found.append(Curve(_name(norm, (processes, images)), build, epochs, batch, None, settings, processes))
    return found


def network(seed: int, norm: str, images: int, depth: int, width: int) -> Any:
    """Return a wide ResNet with a norm; with one image SN is the published one without batch statistics."""
    import torch

    from ..layers.torch import SwitchNorm2d
    from ..models.torch import wide_resnet

    torch.manual_seed(seed)
    layers: dict[str, Any] = {
        "BN": torch.nn.BatchNorm2d,
        "GN": lambda channels: torch.nn.GroupNorm(channels // GROUP, channels),
        "SN": partial(SwitchNorm2d, batch_statistics="none" if images == 1 else "moving"),
    }
    return wide_resnet(depth, width, layers[norm])


def judge(outcomes: Outcomes, scale: Scale) -> list[Finding]:
    """Compare BN and SN with GN, which does not look at the batch, with many images a process and with two."""
    lost = {norm: _ahead(outcomes, norm, LARGE) - _ahead(outcomes, norm, SMALL) for norm in ("BN", "SN")}
    said = {
        norm: " and ".join(
            f"{outcomes[_name(norm, shape)].last:.2f} % with {shape[0]} x {shape[1]}" for shape in (LARGE, SMALL)
        )
        for norm in PUBLISHED
    }
    return [
        Finding(
            "BN falls with two images a process (published: 76.4 to 65.3 where GN has 75.9 in both)",
            f"BN {said['BN']}, GN {said['GN']}: loses {lost['BN']:.2f} points on GN",
            lost["BN"] >= FALL,
        ),
        Finding(
            "SN does not (published: 76.9 to 75.6)",
            f"SN {said['SN']}: loses {lost['SN']:.2f} points on GN",
            lost["SN"] < FALL,
        ),
    ]


def _ahead(outcomes: Outcomes, norm: str, shape: tuple[int, int]) -> float:
    return outcomes[_name(norm, shape)].last - outcomes[_name("GN", shape)].last


def picture(outcomes: Outcomes) -> "Figure":
    """Return the accuracy of each norm by shape, beside the published ones."""
    from matplotlib.figure import Figure

    from ..finetune.run.plots import BLUE, GREEN, VERMILION, WIDTH, style

    found = {norm: [outcomes[_name(norm, shape)].last for shape in SHAPES] for norm in PUBLISHED}
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    tables: dict[str, Mapping[str, Sequence[float | None]]] = {"found": found, "published, ImageNet": PUBLISHED}
    for number, (title, table) in enumerate(tables.items(), 1):
        axes = figure.add_subplot(1, 2, number)
        for (norm, values), colour in zip(table.items(), (BLUE, GREEN, VERMILION), strict=True):
            axes.plot(np.array(values, float), "o-", color=colour, linewidth=1.5, markersize=4, label=norm)
        axes.set(title=title, ylabel="top-1, %", xlabel="processes x images in each")
        axes.set_xticks(range(len(SHAPES)), [f"{processes} x {images}" for processes, images in SHAPES], fontsize=8)
        axes.legend(frameon=False, fontsize=9)
        style(axes, share=False)
    return figure


EXPERIMENT = Experiment(
    name="small-batch",
    title="BN, GN and SN by processes and images in each",
    source="switchablenorms/Switchable-Normalization, the ImageNet table",
    preprocessing=Preprocessing((3, 32, 32), "channels_first", mean=(0.5,), std=(0.25,)),
    data=cifar10,
    curves=curves,
    judge=judge,
    differs={
        "full": ("CIFAR-10 and WRN-16-4 in place of ImageNet and ResNet-50",),
        "small": ("CIFAR-10, WRN-10-1 and 2 epochs in place of ImageNet, ResNet-50 and 100",),
    },
    picture=picture,
)
