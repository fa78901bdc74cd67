"""Run on one Keras backend what holds on each, and write what came of it to a folder, for `test_backends` to read.

``python -m tests.keras.on_backend FOLDER`` with KERAS_BACKEND set.
"""

import json
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers
from keras.src.applications.efficientnet import DEFAULT_BLOCKS_ARGS, EfficientNet

from normswap.convert.targets import BatchRenorm, GroupNorm, SwitchNorm
from normswap.errors import UnsupportedError
from normswap.export.onnx import to_onnx
from normswap.patchers.keras.patch import patch

from .exporting import graph_of, names, settled, small_net
from .parity import recorded


def sequential():
    """Return a Sequential model that reads a map channels last."""
    body = [layers.Conv2D(4, 3, name="conv"), layers.BatchNormalization(name="norm"), layers.ReLU(), layers.Flatten()]
    return settled(keras.Sequential([keras.Input((8, 8, 3), name="image"), *body, layers.Dense(2, name="scores")]))


def network():
    """Return an EfficientNet of the first three kinds of blocks."""
    photo = keras.Input((32, 32, 3), name="photo")
    return settled(EfficientNet(1.0, 1.0, 32, blocks_args=DEFAULT_BLOCKS_ARGS[:3], weights=None, input_tensor=photo))


MODELS = {
    "functional sn": (small_net, SwitchNorm()),
    "functional gn": (small_net, GroupNorm(2)),
    "functional brn": (small_net, BatchRenorm()),
    "sequential": (sequential, GroupNorm(2)),
    "network": (network, BatchRenorm()),
}


def exports(folder):
    """Return what the file of every model holds, or why there is none."""
    found = {}
    for name, (build, target) in MODELS.items():
        model = build()
        patch(model, target, mode=None)
        try:
            report = to_onnx(model, folder / f"{name}.onnx")
        except UnsupportedError as error:
            return str(error)
        graph = graph_of(folder / f"{name}.onnx")
        found[name] = {
            "names": [names(graph.input), names(graph.output)],
            "norms": [len(report.folded), len(report.kept)],
            "transposes": sum(node.op_type == "Transpose" for node in graph.node),
            "passed": bool(report.verdict),
        }
    return found


def main(folder):
    """On TensorFlow, where the other tests run, compute on replicas; elsewhere export, and run the marked tests."""
    if keras.backend.backend() == "tensorflow":
        from . import replicas

        strategy = replicas.two()
        np.savez(folder / "replicas.npz", **replicas.layers(strategy))
        (folder / "trainings.json").write_text(json.dumps(replicas.trainings(strategy)))
        np.savez(folder / "parity.npz", **recorded())
        return
    np.savez(folder / "parity.npz", **recorded())
    (folder / "exports.json").write_text(json.dumps(exports(folder)))
    here = Path(__file__).parent
    files = map(str, sorted([*here.glob("test_patch_*.py"), *here.glob("test_fit*.py")]))
    pytest.main(["-q", "-p", "no:cacheprovider", "-m", "backends", f"--junitxml={folder}/tests.xml", *files])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
