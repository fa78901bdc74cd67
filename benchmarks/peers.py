"""The packages the benchmarks compare with, which are not normswap's: timm, torchvision and Opacus."""

import sys
from pathlib import Path

import torch

FOLDER = Path(__file__).parent.parent / "build" / "peers"
"""Where `make bench` installs them without their dependencies, which would bring another torch."""

_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library = torch.library.Library("torchvision", "DEF")


def make_importable() -> None:
    """Put the peers on the path; timm needs torchvision, whose compiled operators do not fit every build of torch.

    Declaring the two that it looks for at import is enough for all that timm uses.
    """
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
        for schema in _OPERATORS:
            _library.define(schema)
