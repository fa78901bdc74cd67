"""The packages the benchmarks compare with, which are not normswap's: timm, torchvision and Opacus."""

import functools
import sys
from pathlib import Path

import torch
from torch import Tensor

FOLDER = Path(__file__).parent.parent / "build" / "peers"
"""Where `make bench` installs them without their dependencies, which would bring another torch."""
ZOO = FOLDER.with_name("zoo")
"""Where `make build/zoo` installs the libraries whose networks `zoo.py` sweeps, likewise."""

_library = torch.library.Library("torchvision", "DEF")


def make_importable(folder: Path = FOLDER) -> None:
    """Put the peers on the path; timm needs torchvision, whose compiled operators do not fit every build of torch.

    Declaring the two that it looks for at import is enough for all that timm uses; detectors ask one of them.
    """
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
        _declare()


@functools.cache
def _declare() -> None:
    for name in ("nms", "qnms"):
        _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.impl("nms", _suppressed, "CPU")


def run_detectors() -> None:
    """Let torchvision's `nms` reach the one that is declared here, though its compiled operators are missing."""
    import torchvision.ops.boxes

    torchvision.ops.boxes._assert_has_ops = lambda: None


def _suppressed(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """Return which boxes (x1, y1, x2, y2) to keep, best first: none overlaps a better one by more than that."""
    order, kept = scores.argsort(descending=True, stable=True), []
    areas = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1)
    while len(order):
        best, order = order[0], order[1:]
        kept.append(best)
        corners = torch.minimum(boxes[best, 2:], boxes[order, 2:]) - torch.maximum(boxes[best, :2], boxes[order, :2])
        common = corners.clamp(min=0).prod(1)
        order = order[common / (areas[best] + areas[order] - common) <= threshold]
    return torch.stack(kept) if kept else scores.new_zeros(0, dtype=torch.long)
