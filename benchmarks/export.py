"""What norms cost in onnxruntime as normswap writes them, beside the files others make, and how long the making takes.

    python benchmarks/export.py [layers] [models] [times] [--threads 1 2] [--batch 1 8] [--json FILE]

Minima of interleaved runs in float32. "transcription" is Switchable Normalization in plain operations, as its paper
has it, exported by `torch.onnx.export` and slimmed with onnxslim. "error" is against the module itself in float64,
relative to the output's scale.
"""

import argparse
import copy
import itertools
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import onnxruntime
import peers
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import normswap
from layers import FormulaSwitchNorm, keep_memory
from normswap import GroupNorm
from normswap.export.forms import RUNTIMES, Runtime
from normswap.layers.torch import BatchRenorm2d, SwitchNorm2d

SHAPES = [(1, 64, 112, 112), (8, 256, 56, 56), (8, 64, 32, 32), (1, 512, 14, 14)]
FAR = 1e4
"""Mean over deviation of the inputs on which E[x²] - E[x]² is lost."""

SECONDS = 3.0
"""How long the files of one comparison are run in turn, for each shape and number of threads."""


@dataclass(frozen=True)
class File:
    """A module, how it is written, and the file with which the cost of this one is to be compared.

    ``writer`` is a runtime for which normswap writes, "torch 20" or "torch 21" (an opset), or "slim" for torch's file
    slimmed.
    """

    module: nn.Module
    writer: str
    peer: str | None = None


@dataclass(frozen=True)
class Result:
    """What was measured of a file: seconds of one run, and its error against float64 beside its module's own."""

    group: str
    name: str
    shape: tuple[int, ...]
    threads: int
    nodes: int
    seconds: float
    cost: float
    speed: float | None
    error: float
    own: float
    verdict: str = ""


def write(file: File, x: Tensor, path: Path) -> int:
    """Write the file for inputs like ``x`` with the batch free, and return how many nodes it has."""
    if file.writer in RUNTIMES:
        return normswap.to_onnx(file.module, path, example=x, runtime=cast(Runtime, file.writer), check=False).nodes
    export(file.module, x, path, 21 if file.writer == "torch 21" else 20)
    if file.writer == "slim":
        slim(path)
    return nodes(path)


def export(module: nn.Module, x: Tensor, path: Path, opset: int = 20) -> None:
    """Write a module as `torch.onnx.export` does, all in one file."""
    shapes = ({0: torch.export.Dim("batch")},)
    double = torch.cat([x, x]) if len(x) == 1 else x
    program = torch.onnx.export(
        module, (double,), dynamo=True, opset_version=opset, verbose=False, dynamic_shapes=shapes,
        input_names=["x"], output_names=["output"],
    )  # fmt: skip
    assert program is not None
    program.save(path, external_data=False)


def slim(path: Path) -> None:
    """Slim a file with onnxslim, in place."""
    import onnxslim

    with redirect_stdout(None):
        onnxslim.slim(str(path), str(path))


def nodes(path: Path) -> int:
    """Return how many nodes the graph of a file has."""
    return len(onnx.load(path, load_external_data=False).graph.node)


# ------------------------------------------------------------------------------------------------------- measuring


class Runner:
    """A file in onnxruntime with input and output where they are, so that nothing but the graph is timed."""

    def __init__(self, path: Path, x: Tensor, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        # Threads of this session would go on spinning while the next one is timed.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        entry, output = self._session.get_inputs()[0].name, self._session.get_outputs()[0].name
        self.output = np.ascontiguousarray(self._session.run([output], {entry: x.numpy()})[0])
        self._bound = self._session.io_binding()
        self._bound.bind_ortvalue_input(entry, onnxruntime.OrtValue.ortvalue_from_numpy(x.numpy()))
        self._bound.bind_output(
            output, "cpu", 0, np.float32, self.output.shape, self.output.__array_interface__["data"][0]
        )

    def seconds(self) -> float:
        """Run once and return the time it took."""
        start = time.perf_counter()
        self._session.run_with_iobinding(self._bound)
        return time.perf_counter() - start


def fastest(runners: Mapping[str, Runner]) -> dict[str, float]:
    """Return the least seconds of each, run in turn for `SECONDS` and at least twelve times."""
    best, start, rounds = dict.fromkeys(runners, float("inf")), time.perf_counter(), 0
    while rounds < 12 or time.perf_counter() - start < SECONDS:
        for name, runner in runners.items():
            # The first of two pays for what the file before it left in the caches.
            best[name] = min(best[name], runner.seconds(), runner.seconds())
        rounds += 1
    return best


def measure(
    group: str, files: Mapping[str, File], x: Tensor, threads: list[int], folder: Path, *, verify: bool = False
) -> list[Result]:
    """Return the results of files for one input, costs being ratios to the first of them."""
    paths = {name: folder / f"{number}.onnx" for number, name in enumerate(files)}
    counts, own, exact, verdicts = {}, {}, {}, dict.fromkeys(files, "")
    for name, file in files.items():
        counts[name] = nodes(paths[name]) if paths[name].exists() else write(file, x, paths[name])
        with torch.no_grad():
            exact[name] = copy.deepcopy(file.module).double()(x.double()).numpy()
            own[name] = apart(file.module(x).numpy(), exact[name])
        if verify:
            verdict = normswap.verify(file.module, paths[name])
            verdicts[name] = f"{'passes' if verdict else 'FAILS'}, {verdict.max_rel:.1e}"
    results = []
    for count in threads:
        runners = {name: Runner(path, x, count) for name, path in paths.items()}
        best = fastest(runners)
        base = next(iter(best.values()))
        for name, file in files.items():
            results.append(
                Result(
                    group, name, tuple(x.shape), count, counts[name], best[name], best[name] / base,
                    None if file.peer is None else best[file.peer] / best[name],
                    apart(runners[name].output, exact[name]), own[name], verdicts[name],
                )
            )  # fmt: skip
    return results


def apart(found: Any, exact: Any) -> float:
    """Return the largest difference relative to scale."""
    return float(np.abs(found - exact).max() / np.abs(exact).max())


# ---------------------------------------------------------------------------------------------------------- layers


def filled(layer: Any, far: float = 0.0) -> Any:
    """Give a layer scale, shift, gates and running statistics of inputs whose mean is ``far`` deviations off."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in itertools.chain(layer.named_parameters(), layer.named_buffers()):
            if name in ("weight", "running_var"):
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif name == "running_mean":
                tensor.normal_(far, 0.3, generator=generator)
            elif tensor.is_floating_point():
                tensor.normal_(0, 0.5, generator=generator)
    return layer.eval()


def layer_files(channels: int) -> dict[str, tuple[float, dict[str, File]]]:
    """Return by group how far the inputs' means are off, and its files."""
    batch = File(filled(nn.BatchNorm2d(channels)), "torch 20")

    def switch(far: float) -> dict[str, File]:
        layer, formula = filled(SwitchNorm2d(channels), far), filled(FormulaSwitchNorm(channels), far)
        return {
            "BatchNorm": batch,
            "transcription": File(formula, "torch 20"),
            "transcription + onnxslim": File(formula, "slim"),
            "normswap, portable": File(layer, "portable", "transcription + onnxslim"),
            "normswap, ort": File(layer, "ort", "transcription + onnxslim"),
        }

    def group(groups: int) -> dict[str, File]:
        layer = filled(nn.GroupNorm(groups, channels))
        return {
            "BatchNorm": batch,
            "torch, opset 20": File(layer, "torch 20"),
            "torch, opset 21": File(layer, "torch 21"),
            "normswap, portable": File(layer, "portable", "torch, opset 20"),
            "normswap, ort": File(layer, "ort", "torch, opset 20"),
        }

    renorm = filled(BatchRenorm2d(channels))
    return {
        "SN": (0.0, switch(0.0)),
        "SN, mean/deviation 1e4": (FAR, switch(FAR)),
        "GN, 32 groups": (0.0, group(32)),
        "GN, 1 group": (0.0, group(1)),
        "BRN": (0.0, {"BatchNorm": batch, "normswap, portable": File(renorm, "portable", "BatchNorm")}),
    }


def measure_layers(threads: list[int], show: Callable[[Table], None]) -> list[Result]:
    """Measure single layers and show a table for each kind and number of threads."""
    results = []
    for shape, name in itertools.product(SHAPES, layer_files(32)):
        torch.manual_seed(0)
        far, files = layer_files(shape[1])[name]
        with tempfile.TemporaryDirectory() as folder:
            results += measure(name, files, torch.randn(shape) + far, threads, Path(folder))
    for name, count in itertools.product(layer_files(32), threads):
        title = f"{name}, threads {count}: time over BatchNorm's, times faster than the peer, error (the module's own)"
        table = Table("file", *map(str, SHAPES), title=title, title_justify="left")
        own = [result for result in results if (result.group, result.threads) == (name, count)]
        for file in dict.fromkeys(result.name for result in own):
            cells = [
                f"{r.cost:.2f} {'' if r.speed is None else f'x{r.speed:.2f}':6}{r.error:.0e} ({r.own:.0e})"
                for r in own
                if r.name == file
            ]
            table.add_row(file, *cells)
        show(table)
    return results


# ---------------------------------------------------------------------------------------------------------- models


def resnet50(target: Any = None) -> nn.Module:
    """Return a ResNet-50 with random weights and running statistics of the batches it was given, patched."""
    peers.make_importable()
    import timm

    torch.manual_seed(0)
    model: nn.Module = timm.create_model("resnet50", pretrained=False)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
            module.reset_running_stats()
    with torch.no_grad():
        for _ in range(2):
            model.train()(torch.randn(4, 3, 224, 224))
    model.eval()
    if target is not None:
        normswap.patch(model, target, example=torch.randn(2, 3, 224, 224))
    return model


def transcribed(model: nn.Module) -> nn.Module:
    """Return a copy of a model patched to SN in which every norm is the transcription."""
    model = copy.deepcopy(model)
    for name, norm in list(model.named_modules()):
        if isinstance(norm, SwitchNorm2d):
            formula = FormulaSwitchNorm(norm.num_features).eval()
            state = norm.state_dict()
            own = formula.state_dict()
            formula.load_state_dict({key: state[key].reshape(tensor.shape) for key, tensor in own.items()})
            model.set_submodule(name, formula)
    return model


def model_files() -> dict[str, File]:
    """Return the files of ResNet-50."""
    batch, switch = resnet50(), resnet50("sn")
    one, many = resnet50("gn"), resnet50(GroupNorm(groups=32))
    formula = transcribed(switch)
    return {
        "BN, folded": File(batch, "portable"),
        "BN, torch": File(batch, "torch 20"),
        "BRN": File(resnet50("brn"), "portable", "BN, folded"),
        "SN, transcription": File(formula, "torch 20"),
        "SN, transcription + onnxslim": File(formula, "slim"),
        "SN, portable": File(switch, "portable", "SN, transcription + onnxslim"),
        "SN, ort": File(switch, "ort", "SN, transcription + onnxslim"),
        "GN 1 group, torch, opset 20": File(one, "torch 20"),
        "GN 1 group, torch, opset 21": File(one, "torch 21"),
        "GN 1 group, portable": File(one, "portable", "GN 1 group, torch, opset 20"),
        "GN 1 group, ort": File(one, "ort", "GN 1 group, torch, opset 20"),
        "GN 32 groups, torch, opset 20": File(many, "torch 20"),
        "GN 32 groups, portable": File(many, "portable", "GN 32 groups, torch, opset 20"),
    }


def measure_models(threads: list[int], batches: list[int], show: Callable[[Table], None]) -> list[Result]:
    """Measure ResNet-50 and show a table for each batch size and number of threads."""
    results, files = [], model_files()
    with tempfile.TemporaryDirectory() as folder:
        for number, batch in enumerate(batches):
            x = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(1))
            results += measure("ResNet-50", files, x, threads, Path(folder), verify=number == 0)
    for batch, count in itertools.product(batches, threads):
        table = Table("file", "nodes", "ms", "over BN", "faster than the peer", "error (own)", "verdict",
                      title=f"ResNet-50, batch {batch}, threads {count}", title_justify="left")  # fmt: skip
        for r in results:
            if (r.shape[0], r.threads) == (batch, count):
                speed = "" if r.speed is None else f"{r.speed:.2f}"
                error = f"{r.error:.1e} ({r.own:.1e})"
                table.add_row(r.name, str(r.nodes), f"{r.seconds * 1e3:.1f}", f"{r.cost:.3f}", speed, error, r.verdict)
        show(table)
    return results


# ----------------------------------------------------------------------------------------------------------- times


def measure_times(show: Callable[[Table], None]) -> dict[str, float]:
    """Show how long it takes to write ResNet-50, the least of two; normswap's files are verified in that time."""
    x = torch.randn(2, 3, 224, 224)
    batch, switch = resnet50(), resnet50("sn")
    formula, groups = transcribed(switch), resnet50("gn")
    best: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.onnx"

        def proven(model: nn.Module) -> None:
            normswap.to_onnx(model, path, example=x, overwrite=True)

        def slimmed() -> None:
            export(formula, x, path)
            slim(path)

        jobs: dict[str, Callable[[], object]] = {
            "BN, torch.onnx.export": lambda: export(batch, x, path),
            "BN, to_onnx": lambda: proven(batch),
            "SN, to_onnx": lambda: proven(switch),
            "GN, to_onnx": lambda: proven(groups),
            "SN transcription, torch.onnx.export + onnxslim": slimmed,
        }
        export(nn.Conv2d(3, 8, 3), x, path)  # the first export in a process pays for imports
        for _, (name, job) in itertools.product(range(2), jobs.items()):
            start = time.perf_counter()
            job()
            best[name] = min(best.get(name, float("inf")), time.perf_counter() - start)
    table = Table("ResNet-50 to a file", "s", "over torch's export of BN", title_justify="left")
    for name, seconds in best.items():
        table.add_row(name, f"{seconds:.1f}", f"{seconds / next(iter(best.values())):.2f}")
    show(table)
    return best


def main() -> None:
    """Measure what is asked for, or all, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="layers, models, times; all where none is given")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    keep_memory()
    warnings.simplefilter("ignore")
    peers.make_importable()
    parts, show = arguments.parts or ["layers", "models", "times"], Console(width=150).print
    results: list[Result] = []
    times: dict[str, float] = {}
    if "layers" in parts:
        results += measure_layers(arguments.threads, show)
    if "models" in parts:
        results += measure_models(arguments.threads, arguments.batch, show)
    if "times" in parts:
        times = measure_times(show)
    if arguments.json:
        arguments.json.write_text(json.dumps({"results": [asdict(r) for r in results], "times": times}, indent=1))


if __name__ == "__main__":
    main()
