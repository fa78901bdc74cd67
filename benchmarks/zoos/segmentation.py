"""segmentation_models_pytorch: every decoder, over encoders of several families."""

from collections.abc import Callable

import torch

from normswap import Inputs

from . import Network, each

NAMES = (
    "Unet/resnet18 UnetPlusPlus/resnet18 MAnet/resnet18 Linknet/resnet18 FPN/mobilenet_v2 PSPNet/resnet18"
    " PAN/resnet18 DeepLabV3/resnet18 DeepLabV3Plus/resnet18 UPerNet/resnet18 Segformer/mit_b0 Unet/efficientnet-b0"
    " Unet/densenet121 Unet/timm-regnetx_002 Unet/tu-mobilenetv3_small_100 Unet/se_resnet50 Unet/xception Unet/dpn68"
)


def networks() -> dict[str, Callable[[], Network]]:
    """Return the builders by their names."""
    return each(NAMES, _network)


def _network(name: str) -> Network:
    import segmentation_models_pytorch

    decoder, encoder = name.split("/")
    model = getattr(segmentation_models_pytorch, decoder)(encoder, encoder_weights=None, classes=3)
    side = 256 if decoder == "PAN" else 96  # its pyramid pools to single values below
    return Network(model, Inputs(torch.randn(2, 3, side, side)))
