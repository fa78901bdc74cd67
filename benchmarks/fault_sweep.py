"""Whether the verifier passes the file of model after model, and finds a fault in a random layer of it.

A fault that is not found is held against the correct file: where no layer moves by more than 1e-5 of its scale, it is
without effect. A model that cannot be exported is named with the reason.
"""

import itertools
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import normswap
from normswap.errors import VerificationError
from normswap.verification.file import read_model
from normswap.verification.runtime import session
from normswap.verification.verdict import TOLERANCE

TARGETS = ("sn", "brn", "gn")
SIDE = 64
TIMM = (
    "resnet10t", "resnet18", "resnet18d", "skresnet18", "legacy_seresnet18", "mobilenetv1_100", "mobilenetv2_050",
    "mobilenetv3_small_050", "mobilenetv3_large_100", "mobilenetv4_conv_small", "efficientnet_b0",
    "efficientnet_lite0", "tf_efficientnetv2_b0", "mnasnet_small", "semnasnet_075", "fbnetc_100", "spnasnet_100",
    "mixnet_s", "tinynet_e", "lcnet_050", "hardcorenas_a", "ghostnet_050", "repghostnet_050", "rexnet_100",
    "regnetx_002", "regnety_002", "gernet_s", "repvgg_a0", "mobileone_s0", "dla34", "dla46_c", "selecsls42",
    "ese_vovnet19b_dw", "hgnetv2_b0", "starnet_s1", "mobilevit_xxs", "levit_128s", "repvit_m0_9", "fastvit_t8",
    "visformer_tiny", "dpn48b", "densenet121",
)  # fmt: skip
KERAS = (
    "MobileNet", "MobileNetV2", "MobileNetV3Small", "EfficientNetB0", "EfficientNetV2B0", "ResNet50", "ResNet50V2",
    "DenseNet121", "Xception", "NASNetMobile", "InceptionV3",
)  # fmt: skip
LEAST = {"InceptionV3": 75, "Xception": 71, "visformer_tiny": 224, "levit_128s": 224}
"""Side of the images for those that do not take `SIDE`."""

Change = Callable[[onnx.ModelProto, random.Random], str | None]
"""Puts a fault into a file and returns which tensor or node has it, or None if the file has nothing of the kind."""


@dataclass
class Row:
    """One model as one target: the largest difference of its correct file, what was found in the others, and why not.

    ``missed`` are faults with effect that passed, ``without_effect`` those that had none. ``problem`` says why there
    is no file, or why a correct one failed.
    """

    name: str
    target: str
    max_rel: float = float("nan")
    false_alarm: bool = False
    caught: int = 0
    missed: list[str] = field(default_factory=list)
    without_effect: list[str] = field(default_factory=list)
    problem: str = ""
    seconds: float = 0.0


def listed() -> list[str]:
    """Return the sweep's models, those of both frameworks in turn."""
    third = max(1, len(TIMM) // len(KERAS))
    parts = [[f"keras:{k}", *(f"timm:{t}" for t in TIMM[i * third : (i + 1) * third])] for i, k in enumerate(KERAS)]
    return [*itertools.chain(*parts), *(f"timm:{t}" for t in TIMM[len(KERAS) * third :])]


def sweep(names: Iterable[str], results: Path | None) -> Iterator[Row]:
    """Yield a row for each model and target, from ``results`` where they are there, and add them there if not."""
    done: dict[str, list[Row]] = {}
    if results is not None and results.exists():
        for line in results.read_text().splitlines():
            rows = [Row(**row) for row in json.loads(line)]
            done[rows[0].name] = rows
    for name in names:
        if name not in done:
            done[name] = examine(name)
            if results is not None:
                with results.open("a") as lines:
                    lines.write(json.dumps([asdict(row) for row in done[name]]) + "\n")
        yield from done[name]


def examine(name: str) -> list[Row]:
    """Build a model and go through every target and fault; each fault's place is drawn anew, and the same every run."""
    rows = []
    framework, _, own = name.partition(":")
    try:
        model, x = BUILDERS[framework](own)
    except Exception as error:
        return [Row(name, "-", problem=f"not built: {type(error).__name__}: {error}"[:300])]
    for target in TARGETS:
        row, start = Row(name, target), time.perf_counter()
        report = None
        try:
            report = normswap.patch(model, target, example=x)
            inject(model, x, row)
        except Exception as error:
            row.problem = f"{type(error).__name__}: {error}"[:300]
        finally:
            if report is not None:
                report.undo()
        row.seconds = round(time.perf_counter() - start, 1)
        rows.append(row)
    return rows


def inject(model: Any, x: Any, row: Row) -> None:
    """Verify the correct file of a model, and the file with each fault."""
    rng = random.Random(f"{row.name} {row.target}")
    with tempfile.TemporaryDirectory() as folder:
        good, bad = Path(folder) / "good.onnx", Path(folder) / "bad.onnx"
        try:
            verdict = normswap.to_onnx(model, good, example=x).verdict
            row.max_rel = verdict.max_rel if verdict is not None else row.max_rel
        except VerificationError as error:
            row.false_alarm, row.problem = True, str(error)
            return
        for name, change in CHANGES.items():
            proto = onnx.load(good)
            where = change(proto, rng)
            if where is None:
                continue
            onnx.save(proto, bad)
            if not normswap.verify(model, bad):
                row.caught += 1
            elif effect(good, bad) > TOLERANCE:
                row.missed.append(f"{name}: {where}")
            else:
                row.without_effect.append(f"{name}: {where}")


def effect(good: Path, bad: Path) -> float:
    """Return the largest difference of two files in any layer the verifier knows, relative to its scale."""
    file = read_model(good)
    names = sorted({*file.metadata["sites"].values(), *(value.name for value in file.proto.graph.output)})
    entry = file.inputs[0]
    sizes = [size.dim_value or 2 for size in entry.type.tensor_type.shape.dim]
    feed = {entry.name: np.random.default_rng(0).standard_normal(sizes, np.float32)}
    found = [session(read_model(path).with_outputs(names), optimised=False).run(names, feed) for path in (good, bad)]
    return max(float(np.abs(a - b).max() / max(np.abs(a).max(), 1e-30)) for a, b in zip(*found, strict=True))


def change(draw: Callable[[Any, random.Random], Any], *endings: str) -> Change:
    """Return a fault that puts ``draw`` of it in the place of a random float tensor, of a name that ends like one."""

    def apply(proto: onnx.ModelProto, rng: random.Random) -> str | None:
        tensors = [t for t in proto.graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
        tensors = [t for t in tensors if t.name.endswith(endings) and numpy_helper.to_array(t).any()]
        if not tensors:
            return None
        tensor = rng.choice(tensors)
        array = draw(numpy_helper.to_array(tensor).copy(), rng)
        tensor.CopyFrom(numpy_helper.from_array(array.astype(np.float32), tensor.name))
        return str(tensor.name)

    return apply


def nan_somewhere(array: Any, rng: random.Random) -> Any:
    """Make one value NaN."""
    array.flat[rng.randrange(array.size)] = np.nan
    return array


def eps_a_hundredfold(proto: onnx.ModelProto, rng: random.Random) -> str | None:
    """Raise ε of one norm that has it as an attribute or within a constant, by the 9.9e-4 that a hundredfold is."""
    nodes = [node for node in proto.graph.node if node.op_type == "InstanceNormalization"]
    if not nodes:
        return change(lambda array, _: array + 9.9e-4, "/var_of_batch", "/eps")(proto, rng)
    node = rng.choice(nodes)
    for attribute in node.attribute:
        if attribute.name == "epsilon":
            attribute.f += 9.9e-4
    return str(node.name)


WEIGHTS = ("weight", "kernel", "/gamma")
CHANGES: dict[str, Change] = {
    "weight x1.01": change(lambda array, _: array * 1.01, *WEIGHTS),
    "weight in float16": change(lambda array, _: array.astype(np.float16), *WEIGHTS),
    "running variance x0.99": change(lambda array, _: array * 0.99, "/var_of_batch", "/var"),
    "ε + 9.9e-4": eps_a_hundredfold,
    "NaN": change(nan_somewhere, *WEIGHTS, "/beta", "bias"),
}


def build_timm(name: str) -> tuple[nn.Module, Tensor]:
    """Return a network with random weights, γ and β, its running statistics those of the batches it was given."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False)
    side = LEAST.get(name, SIDE)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = None
            if module.affine:
                module.weight.data.uniform_(0.5, 1.5)
                module.bias.data.normal_(0, 0.1)
    with torch.no_grad():
        model.train()(torch.randn(16, 3, side, side))
    return model.eval(), torch.randn(2, 3, side, side)


def build_keras(name: str) -> tuple[Any, None]:
    """Return the same in Keras."""
    import keras

    keras.backend.clear_session()
    keras.utils.set_random_seed(0)
    rng, side = np.random.default_rng(0), LEAST.get(name, SIDE)
    model = getattr(keras.applications, name)(weights=None, input_shape=(side, side, 3), classes=10)
    for layer in model._flatten_layers():
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.0
            if layer.scale:
                layer.gamma.assign(rng.uniform(0.5, 1.5, layer.gamma.shape))
            layer.beta.assign(rng.normal(0, 0.1, layer.beta.shape))
    model(rng.normal(size=(16, side, side, 3)).astype("float32"), training=True)
    return model, None


BUILDERS: dict[str, Callable[[str], tuple[Any, Any]]] = {"timm": build_timm, "keras": build_keras}


def report(rows: Iterable[Row], count: int) -> None:
    """Print each row as it comes, and what came of all."""
    seen: list[Row] = []
    for row in rows:
        seen.append(row)
        number = len({each.name for each in seen})
        figures = f"{row.max_rel:.1e}  {'FALSE ALARM' if row.false_alarm else 'passes'}, {row.caught} caught"
        notes = [f"MISSED {what}" for what in row.missed] + [f"without effect: {what}" for what in row.without_effect]
        said = "; ".join([figures if row.max_rel == row.max_rel else "no file", *notes, *filter(None, [row.problem])])
        print(f"{number:3}/{count} {row.name:28} {row.target:4} {row.seconds:6.1f} s  {said}", flush=True)
    found = Table("target", "files", "false alarms", "largest difference", "faults", "caught", "missed", "no effect")
    for target in TARGETS:
        own = [row for row in seen if row.target == target and row.max_rel == row.max_rel]
        missed, idle = (sum(len(getattr(row, kind)) for row in own) for kind in ("missed", "without_effect"))
        caught = sum(row.caught for row in own)
        worst = max((row.max_rel for row in own), default=0.0)
        alarms = sum(row.false_alarm for row in own)
        figures = len(own), alarms, f"{worst:.1e}", caught + missed + idle, caught, missed, idle
        found.add_row(target, *map(str, figures))
    Console(width=110).print(found)
    for row in seen:
        if row.max_rel != row.max_rel:
            print(f"no file: {row.name} {row.target}: {row.problem}")
