"""The demo: a small BatchNorm network on 8x8 digits through every target, from patch to proven ONNX file."""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..convert.targets import BatchRenorm, GroupNorm, SwitchNorm, Target
from ..data.dataset import Data, from_arrays
from ..data.preprocessing import Preprocessing
from ..export.onnx import to_onnx
from ..finetune.calibration.contract import layers_of
from ..finetune.hooks.renorm_limits import RenormLimits
from ..finetune.run.accuracy import accuracy
from ..finetune.run.contract import trainer_of
from ..finetune.run.training import Training
from ..frameworks.detect import get_framework
from ..patchers.patch import patch
from ..verification.inference import open_onnx

COLUMNS: Mapping[str, str] = {
    "target": "target",
    "bn": "BatchNorm",
    "copied": "copied",
    "patched": "patched",
    "finetuned": "fine-tuned",
    "onnx": "ONNX file",
    "max_rel": "difference",
}

TARGETS: Mapping[str, Target] = {
    "brn": BatchRenorm(),
    "sn": SwitchNorm(),
    "sn (frozen)": SwitchNorm(batch_statistics="frozen"),
    "gn (1 group)": GroupNorm(),
    "gn (4 groups)": GroupNorm(groups=4),
    "in": GroupNorm(channels_per_group=1),
}

STEPS, BATCH_SIZE, LEARNING_RATE = 60, 64, 0.02


class Network(Protocol):
    """The demo's network in one framework."""

    def trained(self, data: Data, steps: int = 300) -> Any:
        """Return the network trained on ``data``."""


def network_of(framework: str) -> Network:
    """Return the demo's network in ``"torch"`` or ``"keras"``."""
    if framework == "torch":
        from . import torch

        return torch
    from . import keras

    return keras


def run(framework: str, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Run the demo in ``"torch"`` or ``"keras"`` and return a row of accuracies in percent for each target.

    ``copied`` is what copying gamma and beta by hand would give; ``finetuned`` follows a minute of distillation from
    the BatchNorm network, without labels; ``max_rel`` is the largest difference between the ONNX file and the model,
    relative to the output's scale.
    """
    network = network_of(framework)
    train, test = digits("channels_first" if framework == "torch" else "channels_last")

    def top1(model: Any) -> float:
        return accuracy(lambda x: trainer.predict(model, x), test).top1

    say(f"training a BatchNorm network on {len(train)} digits ({framework})")
    original = network.trained(train)
    trainer = trainer_of(original)
    rows = []
    for name, target in TARGETS.items():
        say(f"{name}: patch, distil {STEPS} steps, export, verify")
        model = patch(original, target, example=train.batch(range(2))[0], inplace=False).model
        row: dict[str, Any] = {"target": name, "bn": top1(original), "copied": None, "patched": top1(model)}
        sites = layers_of(model)
        carried = {site: sites.get_affine(layer) for site, layer in sites.site_layers(model).items()}
        if carried:
            reference = dict(get_framework(original).named_layers(original))
            for site, layer in sites.site_layers(model).items():
                sites.set_affine(layer, *sites.get_affine(reference[site]))
            row["copied"] = top1(model)
            for site, layer in sites.site_layers(model).items():
                sites.set_affine(layer, *carried[site])
        trainer.train(
            model,
            train,
            Training(STEPS, BATCH_SIZE, LEARNING_RATE),
            teacher=original,
            hooks=[RenormLimits(model, STEPS)],
        )
        row["finetuned"] = top1(model)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "digits.onnx"
            settings = {"preprocessing": train.preprocessing.to_dict()}
            report = to_onnx(model, path, example=train.batch(range(2))[0], metadata=settings)
            assert report.verdict is not None
            row["onnx"] = accuracy(open_onnx(path)[0], test).top1
            row["max_rel"] = f"{report.verdict.max_rel:.0e}"
        rows.append(row)
    return rows


def digits(layout: str) -> tuple[Data, Data]:
    """Return scikit-learn's 1,797 digits, split at random into 1,297 to train on and 500 to test on."""
    from sklearn.datasets import load_digits

    bundled = load_digits()
    images = (bundled.images / 16).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(images))
    shape = (1, 8, 8) if layout == "channels_first" else (8, 8, 1)
    preprocessing = Preprocessing(shape, layout, mean=(0.3,), std=(0.38,))  # type: ignore[arg-type]
    train, test = order[500:], order[:500]
    return (
        from_arrays(images[train], bundled.target[train], preprocessing),
        from_arrays(images[test], bundled.target[test], preprocessing),
    )
