"""Whether the verifier passes the file of model after model, and finds the faults that `planted` puts into it.

A correct file is verified with other seeds too, and on inputs a hundred times as large. A fault in weights or rows
that is not found is held against the correct file: where on valid inputs no output and no layer moves by more than
1e-5 of its scale, it is without effect. A model that cannot be exported is named with the reason.
"""

import itertools
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from fault_subjects import KERAS as OWN_KERAS
from fault_subjects import TORCH as OWN_TORCH
from fault_subjects import Subject, keras_subject, noise, torch_subject
from planted import CLASSES
from rich.console import Console
from rich.table import Table
from torch.nn.modules.batchnorm import _BatchNorm

import normswap
from normswap import Inputs
from normswap.errors import NormswapError, VerificationError
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


@dataclass
class Row:
    """One model as one target: the largest difference of its correct file, and what came of each fault.

    ``faults`` are class, name and place, and ``caught``, ``MISSED`` or ``without effect``. ``alarms`` say on which
    inputs the correct file failed, ``problem`` why there is none.
    """

    name: str
    target: str
    max_rel: float = float("nan")
    alarms: list[str] = field(default_factory=list)
    faults: list[tuple[str, str, str]] = field(default_factory=list)
    problem: str = ""
    seconds: float = 0.0

    def count(self, outcome: str, kind: str | None = None) -> int:
        """Return how many faults came out as ``outcome``, of one class or of all."""
        return sum(found == outcome and kind in (None, own) for own, _, found in self.faults)


CAUGHT, MISSED, IDLE = "caught", "MISSED", "without effect"


def listed() -> list[str]:
    """Return the sweep's models: our own, then those of others, of both frameworks in turn."""
    own = [*(f"torch:{name}" for name in OWN_TORCH), *(f"ours:{name}" for name in OWN_KERAS)]
    third = max(1, len(TIMM) // len(KERAS))
    parts = [[f"keras:{k}", *(f"timm:{t}" for t in TIMM[i * third : (i + 1) * third])] for i, k in enumerate(KERAS)]
    return [*own, *itertools.chain(*parts), *(f"timm:{t}" for t in TIMM[len(KERAS) * third :])]


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
    family, _, own = name.partition(":")
    try:
        subject = BUILDERS[family](own)
    except Exception as error:
        return [Row(name, "-", problem=f"not built: {type(error).__name__}: {error}"[:300])]
    for target in TARGETS:
        row, start = Row(name, target), time.perf_counter()
        report = None
        try:
            report = normswap.patch(subject.model, target, example=subject.draw(np.random.default_rng(1)))
            inject(subject, row)
        except Exception as error:
            row.problem = f"{type(error).__name__}: {error}"[:300]
        finally:
            if report is not None:
                report.undo()
        row.seconds = round(time.perf_counter() - start, 1)
        rows.append(row)
    return rows


def inject(subject: Subject, row: Row) -> None:
    """Verify the correct file of a model, and the file with each fault."""
    rng, example = random.Random(f"{row.name} {row.target}"), subject.draw(np.random.default_rng(1))
    with tempfile.TemporaryDirectory() as folder:
        good, bad = Path(folder) / "good.onnx", Path(folder) / "bad.onnx"
        try:
            written = normswap.to_onnx(subject.model, good, example=example, dynamic_size=subject.dynamic)
            row.max_rel = written.verdict.max_rel if written.verdict is not None else row.max_rel
        except VerificationError as error:
            row.alarms, row.problem = ["export"], str(error)
            return
        row.alarms = [how for how, inputs in elsewhere(subject).items() if not normswap.verify(
            subject.model, good, example=example, **inputs)]  # fmt: skip
        names = [value.name for value in read_model(good).inputs]
        feed = dict(zip(names, example.arrays.values(), strict=True))
        for kind, changes in CLASSES.items():
            for name, change in changes.items():
                proto = onnx.load(good)
                where = change(proto, rng, feed)
                if where is None:
                    continue
                onnx.save(proto, bad)
                outcome = CAUGHT
                if passes(subject.model, bad, example):
                    outcome = MISSED if differs(kind, good, bad, subject, feed) else IDLE
                row.faults.append((kind, f"{name}: {where}", outcome))


def passes(model: Any, path: Path, example: Inputs) -> bool:
    """Return whether a file is verified; one that is refused is not."""
    try:
        return bool(normswap.verify(model, path, example=example))
    except NormswapError:
        return False


def elsewhere(subject: Subject) -> dict[str, dict[str, Any]]:
    """Return on what else a correct file is verified: other seeds, and inputs of one's own, small and large."""
    rng = np.random.default_rng(2)

    def times(factor: float) -> Inputs:
        return subject.draw(rng).map(lambda x: x * np.float32(factor) if x.dtype == np.float32 else x)

    found: dict[str, dict[str, Any]] = {f"seed {seed}": {"seed": seed} for seed in (1, 2)}
    return found | {f"data x{factor:g}": {"data": [times(factor) for _ in range(3)]} for factor in (0.1, 1, 10, 100)}


def differs(kind: str, good: Path, bad: Path, subject: Subject, feed: Mapping[str, Any]) -> bool:
    """Return whether a fault can be observed: by what the file says of itself, or by what it computes."""
    if kind in ("outputs", "sizes"):
        first, second = (read_model(path).proto.graph for path in (good, bad))
        if [*first.input, *first.output] != [*second.input, *second.output]:
            return True
    return effect(good, bad, subject, feed) > TOLERANCE


def effect(good: Path, bad: Path, subject: Subject, feed: Mapping[str, Any]) -> float:
    """Return the largest difference of two files relative to scale, in any output and in any layer they tell of.

    They are run on other inputs that the model takes, and with every row of a table in turn.
    """
    file, rng = read_model(good), np.random.default_rng(3)
    names = sorted({*file.metadata["sites"].values(), *(value.name for value in file.proto.graph.output)})
    feeds = [dict(zip(feed, subject.draw(rng).arrays.values(), strict=True)) for _ in range(2)]
    for name, rows in subject.rows.items():
        numbers = np.arange(-(-rows // feed[name].size) * feed[name].size).reshape(-1, *feed[name].shape) % rows
        feeds += [{**feed, name: each.astype(feed[name].dtype)} for each in numbers]
    runners = [session(read_model(path).with_outputs(names), optimised=False) for path in (good, bad)]
    largest = 0.0
    for each in feeds:
        found = [runner.run(names, each) for runner in runners]
        for a, b in zip(*found, strict=True):
            apart = (
                np.abs(a.astype(np.float64) - b.astype(np.float64)).max(initial=0.0) if a.shape == b.shape else np.inf
            )
            largest = max(largest, float(apart / max(np.abs(a).max(initial=0.0), 1e-30)))
    return largest


def build_timm(name: str) -> Subject:
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
    return Subject(model.eval(), noise(2, 3, side, side))


def build_keras(name: str) -> Subject:
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
    return Subject(model, noise(2, side, side, 3))


BUILDERS: dict[str, Callable[[str], Subject]] = {
    "timm": build_timm,
    "keras": build_keras,
    "torch": torch_subject,
    "ours": keras_subject,
}


def report(rows: Iterable[Row], count: int) -> None:
    """Print each row as it comes, and what came of all, by target and by class of faults."""
    seen: list[Row] = []
    for row in rows:
        seen.append(row)
        number = len({each.name for each in seen})
        alarms = f"FALSE ALARM on {', '.join(row.alarms)}" if row.alarms else "passes"
        notes = [f"{outcome} {where}" for _, where, outcome in row.faults if outcome != CAUGHT]
        figures = f"{row.max_rel:.1e}  {alarms}, {row.count(CAUGHT)} caught"
        said = "; ".join([figures if row.max_rel == row.max_rel else "no file", *notes, *filter(None, [row.problem])])
        print(f"{number:3}/{count} {row.name:28} {row.target:4} {row.seconds:6.1f} s  {said}", flush=True)
    files = [row for row in seen if row.max_rel == row.max_rel or row.alarms]
    found = Table("target", "files", "false alarms", "largest difference")
    for target in TARGETS:
        own = [row for row in files if row.target == target]
        worst = max((row.max_rel for row in own if row.max_rel == row.max_rel), default=0.0)
        found.add_row(target, str(len(own)), str(sum(bool(row.alarms) for row in own)), f"{worst:.1e}")
    console = Console(width=110)
    console.print(found)
    found = Table("faults in", "planted", "caught", "missed", "no effect")
    for kind in (*CLASSES, None):
        counts = [sum(row.count(outcome, kind) for row in files) for outcome in (CAUGHT, MISSED, IDLE)]
        found.add_row(kind or "all", *map(str, (sum(counts), *counts)))
    console.print(found)
    for row in seen:
        if row not in files:
            print(f"no file: {row.name} {row.target}: {row.problem}")
    print(f"{sum(row.seconds for row in seen) / 60:.1f} minutes")
