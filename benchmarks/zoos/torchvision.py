"""torchvision: classification, segmentation, detection, video and optical flow."""

from collections.abc import Callable

import torch

from normswap import Inputs

from . import Network, each

IMAGES = (
    "resnet18 resnet50 resnext50_32x4d densenet121 mobilenet_v2 mobilenet_v3_large mobilenet_v3_small"
    " mnasnet0_5 shufflenet_v2_x0_5 efficientnet_b0 efficientnet_v2_s regnet_x_400mf regnet_y_400mf vgg11_bn"
    " googlenet inception_v3 maxvit_t quantized_mobilenet_v2 quantized_resnet18 convnext_tiny"
)
MAPS = "deeplabv3_mobilenet_v3_large deeplabv3_resnet50 fcn_resnet50 lraspp_mobilenet_v3_large"
DETECTORS = (
    "fasterrcnn_mobilenet_v3_large_320_fpn fasterrcnn_resnet50_fpn fasterrcnn_resnet50_fpn_v2 fcos_resnet50_fpn"
    " retinanet_resnet50_fpn maskrcnn_resnet50_fpn_v2"
    " ssdlite320_mobilenet_v3_large"
)
VIDEO = "r3d_18 mc3_18 r2plus1d_18 s3d"
OWN_SIDES = {"inception_v3": 96, "googlenet": 96, "maxvit_t": 224}


def networks() -> dict[str, Callable[[], Network]]:
    """Return the builders by their names."""
    return (
        each(IMAGES, _image)
        | each(MAPS, _map)
        | each(DETECTORS, _detector)
        | each(VIDEO, _video)
        | each("raft_small raft_large", _flow)
    )


def _image(name: str) -> Network:
    side = OWN_SIDES.get(name, 64)
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return Network(_built(name, **options), Inputs(torch.randn(2, 3, side, side)))


def _map(name: str) -> Network:
    return Network(_built(name, weights_backbone=None), Inputs(torch.randn(2, 3, 64, 64)))


def _detector(name: str) -> Network:
    # A backbone without weights is built with BatchNorms that train, as people do who fine-tune all of it.
    options = {"min_size": 96, "max_size": 96} if "ssd" not in name else {}
    model = _built(name, weights_backbone=None, num_classes=4, **options)
    return Network(model, Inputs([torch.rand(3, 96, 96), torch.rand(3, 80, 96)]))


def _video(name: str) -> Network:
    return Network(_built(name), Inputs(torch.randn(2, 3, 16 if name == "s3d" else 4, 64, 64)))


def _flow(name: str) -> Network:
    return Network(_built(name), Inputs(torch.rand(2, 3, 128, 128), torch.rand(2, 3, 128, 128), num_flow_updates=2))


def _built(name: str, **options: object) -> torch.nn.Module:
    import torchvision

    return torchvision.models.get_model(name, weights=None, **options)
