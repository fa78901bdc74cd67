"""MONAI: networks for medical volumes, with BatchNorm where they let one choose."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import Network, of

SMALL = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2}


def networks() -> dict[str, Callable[[], Network]]:
    """Return the builders by their names."""
    volume, plane = torch.randn(2, 1, 32, 32, 32), torch.randn(2, 3, 64, 64)
    return {
        "UNet": _of(volume, "UNet", **SMALL, channels=(4, 8, 16), strides=(2, 2), num_res_units=1, norm="batch"),
        "UNet 2-D": _of(plane, "UNet", 2, 3, 2, channels=(8, 16, 32), strides=(2, 2), norm="batch"),
        "AttentionUnet": _of(volume, "AttentionUnet", **SMALL, channels=(4, 8, 16), strides=(2, 2)),
        "BasicUNet": _of(volume, "BasicUNet", **SMALL, features=(4, 4, 8, 16, 32, 4), norm="batch"),
        "BasicUNetPlusPlus": _of(volume, "BasicUNetPlusPlus", **SMALL, features=(4, 4, 8, 16, 32, 4), norm="batch"),
        "DynUNet": _of(
            volume,
            "DynUNet",
            **SMALL,
            kernel_size=(3, 3, 3),
            strides=(1, 2, 2),
            upsample_kernel_size=(2, 2),
            filters=(4, 8, 16),
            norm_name="batch",
        ),
        "VNet": _of(torch.randn(2, 1, 32, 32, 32), "VNet"),
        "SegResNet": _of(volume, "SegResNet", **SMALL, init_filters=8, norm="batch"),
        "SegResNetDS": _of(volume, "SegResNetDS", **SMALL, init_filters=8, norm="batch"),
        "HighResNet": _of(volume, "HighResNet", **SMALL),
        "AHNet": _of(
            torch.randn(2, 1, 32, 64, 64),
            "AHNet",
            **SMALL,
            layers=(1, 1, 1, 1),
            psp_block_num=2,
            upsample_mode="trilinear",
        ),
        "FlexibleUNet": _of(plane, "FlexibleUNet", 3, 2, "efficientnet-b0"),
        "EfficientNetBN": _of(
            plane, "EfficientNetBN", "efficientnet-b0", spatial_dims=2, num_classes=3, pretrained=False
        ),
        "DenseNet121": _of(volume, "DenseNet121", **SMALL),
        "SEResNet50": _of(volume, "SEResNet50", spatial_dims=3, in_channels=1, num_classes=2),
        "ResNet": _of(volume, "resnet18", spatial_dims=3, n_input_channels=1, num_classes=2),
        "HoVerNet": _of(torch.randn(2, 3, 256, 256), "HoVerNet", mode="fast", out_classes=3),
        "AutoEncoder": _of(volume, "AutoEncoder", **SMALL, channels=(4, 8), strides=(2, 2), norm="batch"),
        "RegUNet": _of(
            volume, "RegUNet", spatial_dims=3, in_channels=1, num_channel_initial=4, depth=2, out_channels=3
        ),
        "Quicknat": _of(torch.randn(2, 1, 64, 64), "Quicknat", num_classes=2, num_channels=1, num_filters=8),
        "Discriminator": _of(torch.randn(2, 1, 32, 32), "Discriminator", (1, 32, 32), (4, 8), (2, 2), norm="batch"),
        "PatchDiscriminator": _of(
            plane, "PatchDiscriminator", spatial_dims=2, channels=8, in_channels=3, num_layers_d=2
        ),
        "VISTA-like SegResNetVAE": _of(
            volume, "SegResNetVAE", (32, 32, 32), init_filters=8, in_channels=1, norm="batch"
        ),
    }


def _of(x: Tensor, name: str, *args: Any, **options: Any) -> Callable[[], Network]:
    return of(f"monai.networks.nets:{name}", x, *args, **options)
