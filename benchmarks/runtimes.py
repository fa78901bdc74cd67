"""Whether exported files compute in other runtimes what the model computes: architectures x norms x runtimes.

Each network of `zoos` is built with random weights and running statistics in a process of its own, patched to every
target, exported (in the portable form; of Keras to a TFLite file, too), and its files are verified in every runtime
asked for: equal to 1e-5 of scale in float32, or the reason why not. The results file has a line of JSON a network and
lets a sweep go on where it was left.

    make build/zoo                                                     # the libraries, beside .venv
    python benchmarks/runtimes.py --results runtimes.jsonl             # forty networks
    python benchmarks/runtimes.py --results runtimes.jsonl "monai:*"   # others of the zoo
    python benchmarks/runtimes.py --results runtimes.jsonl --table
"""

import argparse
import fnmatch
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import peers
import zoos
from rich.console import Console
from rich.progress import track

TARGETS = ("sn", "brn", "gn")
RUNTIMES = ("onnxruntime", "openvino", "web")
SECONDS = 1800
NETWORKS = (
    *(f"torchvision:{name}" for name in (
        "resnet18", "mobilenet_v2", "mobilenet_v3_small", "shufflenet_v2_x0_5", "mnasnet0_5", "efficientnet_b0",
        "densenet121", "regnet_y_400mf", "googlenet", "resnext50_32x4d", "lraspp_mobilenet_v3_large", "r3d_18")),
    *(f"monai:{name}" for name in ("UNet", "UNet 2-D", "AttentionUnet", "BasicUNet", "DynUNet")),
    *(f"vision:{name}" for name in (
        "timm resnet26t", "timm repvgg_a0", "timm mobileone_s0", "timm ghostnetv2_100", "timm rexnet_100",
        "timm tf_efficientnet_lite0", "timm mixnet_s", "timm dla34", "timm repghostnet_050",
        "timm mobilenetv4_conv_small", "kornia HardNet", "kornia XFeat", "X-ray DenseNet",
        "torchreid OSNet", "vit_pytorch LeViT", "vit_pytorch MobileViT")),
    *(f"segmentation:{name}" for name in ("Unet/resnet18", "FPN/mobilenet_v2", "Linknet/resnet18")),
    *(f"video_and_audio:{name}" for name in ("x3d_xs", "ECAPA-TDNN", "ContextNet")),
    *(f"keras_applications:{name}" for name in ("MobileNetV2", "EfficientNetB0", "DenseNet121", "ResNet50")),
)  # fmt: skip


@dataclass
class Row:
    """What was found for one network: by target and runtime, or ``error``, why it could not be built.

    A cell has ``max_rel``, the largest difference in float32 relative to scale, ``default``, that at the runtime's own
    precision where it is another, and ``problem``, which is empty where the file passed.
    """

    network: str
    cells: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    error: str = ""


def main() -> None:
    """Sweep the networks whose names match, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("patterns", nargs="*", metavar="LIBRARY:NAME", help="which networks, as globs (default: forty)")
    parser.add_argument("--results", type=Path, default=Path("runtimes.jsonl"), help="where to write and to go on from")
    parser.add_argument("--runtime", action="append", dest="runtimes", help=f"which (default: {' '.join(RUNTIMES)})")
    parser.add_argument("--table", action="store_true", help="print the table of what is there, and run nothing")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    runtimes = arguments.runtimes or RUNTIMES
    if arguments.one:
        print(json.dumps(asdict(examined(arguments.one, runtimes))))
        return
    rows, console = read(arguments.results), Console()
    wanted = [] if arguments.table else [key for key in listed(arguments.patterns) if key not in rows]
    for key in track(wanted, "networks", console=console):
        rows[key] = row = alone(key, runtimes)
        with arguments.results.open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")
        for line in reasons([row]):
            console.print(line, markup=False, soft_wrap=True)
    for line in [*table(list(rows.values())), "", *reasons(list(rows.values()))]:
        print(line)


def listed(patterns: Sequence[str]) -> list[str]:
    """Return the networks whose names match one of the patterns; without any those of `NETWORKS`."""
    if not patterns:
        return list(NETWORKS)
    keys = [f"{library}:{name}" for library in zoos.LIBRARIES for name in zoos.networks(library)]
    return list(dict.fromkeys(key for pattern in patterns for key in keys if fnmatch.fnmatchcase(key, pattern)))


def read(results: Path) -> dict[str, Row]:
    """Return the rows in a results file by network."""
    lines = results.read_text().splitlines() if results.exists() else []
    rows = [Row(**json.loads(line)) for line in lines]
    return {row.network: row for row in rows}


def alone(key: str, runtimes: Sequence[str]) -> Row:
    """Return what a process of its own says of one network."""
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--one", key, *(part for name in runtimes for part in ("--runtime", name))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=environment)
    except subprocess.TimeoutExpired:
        return Row(key, error=f"took over {SECONDS} s")
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"network"')]
    return Row(**json.loads(lines[-1])) if lines else Row(key, error=f"exit {done.returncode}: {done.stderr[-300:]}")


def examined(key: str, runtimes: Sequence[str]) -> Row:
    """Build, patch, export and verify one network."""
    warnings.simplefilter("ignore")
    peers.make_importable(peers.ZOO)
    from zoo_subjects import Keras, subject_of

    import normswap
    from normswap.export.devices import to_litert

    library, _, name = key.partition(":")
    row = Row(key)
    try:
        subject = subject_of(zoos.networks(library)[name], seed=0)
    except Exception as error:
        row.error = _said(error)
        return row
    for target in TARGETS:
        cells = row.cells[target] = {}
        report = normswap.patch(subject.model, target, example=subject.example)
        with tempfile.TemporaryDirectory() as folder:
            path, reference = Path(folder) / "net.onnx", Path(folder) / "reference.npz"
            try:
                normswap.to_onnx(subject.model, path, example=subject.example)
                own = normswap.verify(subject.model, path, example=subject.example, save_reference=reference)
                cells["onnxruntime"] = _cell(own)
            except Exception as error:
                cells["onnxruntime"] = {"problem": _said(error)}
            for runtime in runtimes if reference.exists() else ():
                if runtime != "onnxruntime":
                    cells[runtime] = _verified(normswap.verify_against, reference, path, runtime=runtime)
                if runtime == "web" and cells[runtime]["problem"]:
                    normswap.to_onnx(
                        subject.model, path, example=subject.example, runtime="web", check=False, overwrite=True
                    )
                    cells[runtime]["own form"] = _verified(normswap.verify_against, reference, path, runtime=runtime)
            if isinstance(subject, Keras):
                file = Path(folder) / "net.tflite"
                try:
                    to_litert(subject.model, file, example=subject.example, check=False)
                    cells["litert"] = _verified(
                        normswap.verify, subject.model, file, example=subject.example, runtime="litert"
                    )
                except Exception as error:
                    cells["litert"] = {"problem": _said(error)}
        report.undo()
    return row


def _verified(prove: Any, *arguments: Any, **options: Any) -> dict[str, Any]:
    try:
        return _cell(prove(*arguments, **options))
    except Exception as error:
        return {"problem": _said(error)}


def _cell(verdict: Any) -> dict[str, Any]:
    default = verdict.runtimes[0].default_max_rel if verdict.runtimes else None
    problem = "" if verdict else " ".join(str(verdict).split())[:300]
    excused = sum(check.max_rel > check.tolerance for check in verdict.checks) if verdict else 0
    return {"max_rel": verdict.max_rel, "default": default, "problem": problem, "excused": excused}


def _said(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the lines of a table in Markdown: for each network and target the largest difference in each runtime.

    Where it is above 1e-5 and allowed all the same, since the model itself is no more exact in float32, it is in
    brackets; what failed is a cross, with what a file in the runtime's own form comes to where there is such.
    """
    names = list(dict.fromkeys(name for row in rows for cells in row.cells.values() for name in cells))
    yield f"| network | {' | '.join(f'{name} {target}' for name in names for target in TARGETS)} |"
    yield "|---" * (1 + len(names) * len(TARGETS)) + "|"
    for row in (row for row in rows if not row.error):
        cells = [_shown(row.cells.get(target, {}).get(name)) for name in names for target in TARGETS]
        yield f"| {row.network} | {' | '.join(cells)} |"
    counts = []
    for name in names:
        found = [cells[name] for row in rows for cells in row.cells.values() if name in cells]
        counts.append(f"{name} {sum(not cell['problem'] for cell in found)} of {len(found)}")
    yield f"\nEqual: {', '.join(counts)}."


def _shown(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return ""
    if cell["problem"]:
        return f"✗ {_shown(cell['own form'])}" if "own form" in cell else "✗"
    return f"({cell['max_rel']:.0e})" if cell["excused"] else f"{cell['max_rel']:.0e}"


def reasons(rows: Sequence[Row]) -> Iterator[str]:
    """Yield a line for each cell that failed, and for each network that was not run."""
    for row in rows:
        if row.error:
            yield f"{row.network}: {row.error}"
        for target, cells in row.cells.items():
            for runtime, cell in cells.items():
                if cell["problem"]:
                    yield f"{row.network} {target} {runtime}: {cell['problem']}"


if __name__ == "__main__":
    main()
