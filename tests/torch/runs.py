"""What the tests of runs share: a bundle to start from, data to learn, and how to look at what came out."""

from functools import partial

import numpy as np
import safetensors.numpy
import torch

import normswap
from normswap.bundles import bundle
from normswap.bundles.source import load_model
from normswap.data.dataset import from_arrays
from normswap.data.preprocessing import Preprocessing
from normswap.finetune.run.run import finetune
from normswap.finetune.run.settings import Settings

PREPROCESSING = Preprocessing((3, 12, 12), "channels_first", mean=(0.5,), std=(0.3,))
SETTINGS = Settings(steps=6, batch_size=16, lr=0.05, checkpoint_every=3)
EVERYTHING = {
    "stages": "calibrate,norm=2,all",
    "teacher": "original",
    "early_stop": False,
    "features": 0.1,
    "ema": 0.9,
    "reestimate": 32,
    "accumulate": 2,
    "augment": "crop,flip",
    "blend": 0.5,
    "weight_decay": 1e-3,
}
NET = """
import torch
from torch import nn


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
"""


quick = partial(finetune, draw=False)


class HaltError(Exception):
    pass


def coloured():
    """Images whose class is the colour that is brightest, which a few steps can learn."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 96)
    images = rng.uniform(0, 0.6, (96, 12, 12, 3)).astype(np.float32)
    images[np.arange(96), :, :, labels] += 0.4
    return from_arrays(images, labels, PREPROCESSING)


def bundled(folder, target="brn", dropout=0.2):
    """The path of a bundle whose source is a Python file beside it."""
    path, spec = folder / f"in-{target}", f"{folder}/net.py:build"
    if not path.exists():
        (folder / "net.py").write_text(NET.replace("0.2", str(dropout)))
        report = normswap.patch(load_model(spec), target, example=torch.zeros(2, 3, 12, 12))
        bundle.save(report, path, source=spec, original=load_model(spec), preprocessing=PREPROCESSING)
    return path


def weights(path):
    """The weights of a bundle or checkpoint."""
    return safetensors.numpy.load_file(path / "model.safetensors")


def same(one, other):
    """Whether two sets of arrays are equal, bit for bit."""
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def halt_at(step):
    """What ends a run in the hard way after a step."""

    def look(now, figures):
        if now == step:
            raise HaltError

    return look


def checkpoints(output):
    """The names of a run's checkpoints."""
    return sorted(path.name for path in (output / "run" / "checkpoints").iterdir())
