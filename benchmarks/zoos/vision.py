"""Other libraries of images: timm, pretrainedmodels, docTR, EasyOCR, kornia, faces, X-rays, transformers."""

from collections.abc import Callable

import torch
from torch import Tensor

from normswap import Inputs

from . import Network, of

TIMM = (
    "resnet26t resnetv2_50d_gn seresnext26d_32x4d regnetz_c16 repvgg_a0 mobileone_s0 fastvit_t8 efficientvit_b0"
    " ghostnetv2_100 rexnet_100 tf_efficientnet_lite0 mixnet_s hrnet_w18_small dla34 cspdarknet53 repghostnet_050"
    " levit_128s efficientformerv2_s0 tiny_vit_5m_224 coatnet_0_rw_224 inception_next_atto mobilenetv4_conv_small"
)
PRETRAINED = "bninception dpn68 xception se_resnet50"
DOCTR = "resnet18 resnet31 vgg16_bn_r mobilenet_v3_small textnet_tiny"
OWN_SIDES = {
    "levit_128s": 224,
    "tiny_vit_5m_224": 224,
    "coatnet_0_rw_224": 224,
    "efficientformerv2_s0": 224,
    "xception": 299,
    "bninception": 224,
    "se_resnet50": 224,
    "dpn68": 224,
}


def networks() -> dict[str, Callable[[], Network]]:
    """Return the builders by their names."""
    found = {f"timm {name}": of("timm:create_model", _images(name), name) for name in TIMM.split()}
    found |= {
        f"pretrainedmodels {name}": of(f"pretrainedmodels:{name}", _images(name), pretrained=None)
        for name in PRETRAINED.split()
    }
    found |= {
        f"doctr {name}": of(f"doctr.models.classification:{name}", _images(), pretrained=False)
        for name in DOCTR.split()
    }
    return found | {
        "easyocr CRAFT": of("easyocr.craft:CRAFT", _images(), pretrained=False),
        "kornia HardNet": of("kornia.feature:HardNet", torch.rand(2, 1, 32, 32), pretrained=False),
        "kornia KeyNet": of("kornia.feature:KeyNet", torch.rand(2, 1, 64, 64), pretrained=False),
        "kornia LoFTR": _loftr,
        "kornia XFeat": of("kornia.feature:XFeatModel", torch.rand(2, 1, 64, 64)),
        "facenet": of("facenet_pytorch:InceptionResnetV1", torch.randn(2, 3, 160, 160)),
        "X-ray DenseNet": of("torchxrayvision.models:DenseNet", torch.randn(2, 1, 64, 64), num_classes=3),
        "EfficientNet of lukemelas": of("efficientnet_pytorch:EfficientNet.from_name", _images(), "efficientnet-b0"),
        "torchreid OSNet": of("torchreid.reid.models.osnet:osnet_x0_25", torch.randn(2, 3, 256, 128), **OSNET),
        "vit_pytorch LeViT": of("vit_pytorch.levit:LeViT", torch.randn(2, 3, 64, 64), **LEVIT),
        "vit_pytorch MobileViT": of("vit_pytorch.mobile_vit:MobileViT", torch.randn(2, 3, 64, 64), **MOBILE),
        "vit_pytorch CvT": of("vit_pytorch.cvt:CvT", torch.randn(2, 3, 64, 64), num_classes=4),
    }


OSNET = {"num_classes": 4, "pretrained": False}
LEVIT = {
    "image_size": 64,
    "num_classes": 4,
    "stages": 2,
    "dim": (32, 64),
    "depth": 1,
    "heads": (2, 4),
    "mlp_mult": 2,
}
MOBILE = {
    "image_size": (64, 64),
    "dims": [24, 32, 48],
    "channels": [8, 8, 16, 16, 24, 24, 32, 32, 48, 48, 64],
    "num_classes": 4,
}


def _images(name: str = "") -> Tensor:
    side = OWN_SIDES.get(name, 96)
    return torch.randn(2, 3, side, side)


def _loftr() -> Network:
    from kornia.feature import LoFTR

    return Network(
        LoFTR(pretrained=None), Inputs({"image0": torch.rand(2, 1, 64, 64), "image1": torch.rand(2, 1, 64, 64)})
    )
