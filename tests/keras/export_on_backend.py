"""Export models on one Keras backend and print as JSON what their files hold.

``python -m tests.keras.export_on_backend FOLDER`` with KERAS_BACKEND set; `test_export_backends` reads what is printed.
"""

import json
import sys
from pathlib import Path

import keras
from keras import layers

from normswap.convert.targets import BatchRenorm, GroupNorm, SwitchNorm
from normswap.errors import UnsupportedError
from normswap.export.onnx import to_onnx
from normswap.patchers.keras.patch import patch

from .exporting import graph_of, names, settled, small_net


def sequential():
    """Return a Sequential model that reads a map channels last."""
    body = [layers.Conv2D(4, 3, name="conv"), layers.BatchNormalization(name="norm"), layers.ReLU(), layers.Flatten()]
    return settled(keras.Sequential([keras.Input((8, 8, 3), name="image"), *body, layers.Dense(2, name="scores")]))


def network():
    """Return an EfficientNet."""
    return settled(keras.applications.EfficientNetB0(weights=None, input_shape=(32, 32, 3), classes=10))


MODELS = {
    "functional sn": (small_net, SwitchNorm()),
    "functional gn": (small_net, GroupNorm(2)),
    "functional brn": (small_net, BatchRenorm()),
    "sequential": (sequential, GroupNorm(2)),
    "network": (network, BatchRenorm()),
}


def main(folder: Path) -> None:
    """Export every model, or tell why not."""
    found = {}
    for name, (build, target) in MODELS.items():
        model = build()
        patch(model, target)
        try:
            report = to_onnx(model, folder / f"{name}.onnx")
        except UnsupportedError as error:
            print(json.dumps(str(error)))
            return
        graph = graph_of(folder / f"{name}.onnx")
        found[name] = {
            "names": [names(graph.input), names(graph.output)],
            "norms": [len(report.folded), len(report.kept)],
            "transposes": sum(node.op_type == "Transpose" for node in graph.node),
            "passed": bool(report.verdict),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
