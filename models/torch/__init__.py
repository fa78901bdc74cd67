"""Networks in PyTorch: ResNets as the switchablenorms checkpoints name them, and a wide ResNet.

Each depth has a function without arguments that are asked for, which the command line takes as a MODEL:
``normswap.models.torch:resnet50_v1``.
"""

from functools import partial

from .resnet import resnet_v1, resnet_v2
from .wide_resnet import wide_resnet

resnet18_v1, resnet34_v1, resnet50_v1, resnet101_v1, resnet152_v1 = (
    partial(resnet_v1, depth) for depth in (18, 34, 50, 101, 152)
)
resnet18_v2, resnet34_v2, resnet50_v2, resnet101_v2, resnet152_v2 = (
    partial(resnet_v2, depth) for depth in (18, 34, 50, 101, 152)
)

__all__ = [
    "resnet18_v1",
    "resnet18_v2",
    "resnet34_v1",
    "resnet34_v2",
    "resnet50_v1",
    "resnet50_v2",
    "resnet101_v1",
    "resnet101_v2",
    "resnet152_v1",
    "resnet152_v2",
    "resnet_v1",
    "resnet_v2",
    "wide_resnet",
]
