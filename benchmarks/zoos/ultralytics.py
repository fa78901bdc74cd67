"""ultralytics: YOLO of each generation and task, and RT-DETR, from their configurations."""

import os
from collections.abc import Callable

import torch

from normswap import Inputs

from . import Network, each

NAMES = (
    "yolov3-tiny yolov5n yolov6n yolov8n yolov8n-seg yolov8n-pose yolov8n-obb yolov8n-cls yolov8n-ghost yolov8n-p2"
    " yolov8n-world yolov9t yolov10n yolo11n yolo11n-seg yolo12n yolo26n yolo26n-seg yolo26n-pose yolo26n-cls rtdetr-l"
)


def networks() -> dict[str, Callable[[], Network]]:
    """Return the builders by their names."""
    return each(NAMES, _network)


def _network(name: str) -> Network:
    os.environ["YOLO_OFFLINE"] = "True"
    import ultralytics

    kind = ultralytics.RTDETR if name.startswith("rtdetr") else ultralytics.YOLO
    return Network(kind(f"{name}.yaml").model.float(), Inputs(torch.rand(2, 3, 128, 128)))
