"""The layers on a GPU: whether they are right there, and what they cost as ratios to native BatchNorm in one run.

    python benchmarks/gpu.py [-o FILE] [--seconds 350] [--device cpu] [--parts NAME ...] [--fresh]

It needs a checkout, Python, PyTorch and NumPy; what else is missing is left out, and said. Each part runs in a process
of its own within a limit of time, and writes each result at once: a second run goes on where the first was stopped, and
tries again what failed. With ``--device cpu`` it does little of each part, to test itself; a CPU's times are none of a
GPU's.

Times of layers are those of the device: a launch that only waits goes first, so that none of the others is late. "wall"
is without it, as the device has to wait for Python. The minimum of interleaved repetitions counts.
"""

import argparse
import contextlib
import copy
import importlib.util
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SHAPES = [(16, 64, 56, 56), (2, 256, 56, 56), (32, 512, 14, 14), (8, 64, 32, 32), (32, 64, 112, 112)]
WEIGHTS = ROOT.parent / "shared" / "data" / "torch" / "cifar10_resnet20.th"
Items = Iterator[tuple[str, Callable[[], Any]]]


def correctness(device: str, small: bool) -> Items:
    """Compare with the formulas and with float64, in every surrounding that a GPU adds."""
    import torch

    from normswap.layers.torch import BatchRenorm2d, SwitchNorm2d

    conformance = loaded("conformance", ROOT / "tests" / "conformance.py")
    kinds = {"SN": SwitchNorm2d, "BRN": BatchRenorm2d}
    for layer in conformance.LAYERS:
        cases = [case for case in conformance.CASES if case.layer == layer]
        yield f"conformance: {layer}", partial(conforms, conformance, cases[::6] if small else cases, device)
    size = (2, 8, 20, 24) if small else (8, 64, 56, 56)
    for name, cls in kinds.items():
        for layout, dtype in itertools.product(
            (torch.contiguous_format, torch.channels_last), (torch.float32, torch.float16, torch.bfloat16)
        ):
            x = sample(size, device).to(dtype).contiguous(memory_format=layout)
            yield f"float64: {name} {told(dtype)} {told(layout)}", partial(near_double, cls, x)
        yield f"mean of 1e4 deviations: {name}", partial(near_double, cls, sample(size, device) * 1e-1 + 1e4)
        yield f"launches: {name}", partial(launches, cls, sample(size, device))
        yield f"same bits twice: {name}", partial(same_twice, cls, sample(size, device))
        yield f"autocast: {name}", partial(autocast, cls, device, size)
        if device == "cuda":
            yield f"two streams: {name}", partial(two_streams, cls, sample(size, device))
            yield f"CUDA graph: {name}", partial(cuda_graph, cls, sample(size, device))
            if torch.cuda.device_count() > 1:
                yield f"another device: {name}", partial(near_double, cls, sample(size, "cuda:1"))
    for name, cls in kinds.items():  # last, since compilers take their time
        yield f"torch.compile: {name}", partial(compiled, cls, sample(size, device))


def loaded(name: str, path: Path) -> Any:
    """Import one file."""
    sys.path.insert(0, str(path.parent))
    return importlib.import_module(name)


def told(option: Any) -> str:
    """Return the name of one of torch's options."""
    return str(option).removeprefix("torch.")


def sample(shape: tuple[int, ...], device: str) -> Any:
    """Return data whose level rises along each map."""
    import torch

    torch.manual_seed(0)
    return (torch.randn(shape) + torch.linspace(0, 3, shape[-1])).to(device)


def made(cls: Any, x: Any) -> Any:
    """Return a layer in training whose values are unlike their starts."""
    import torch

    torch.manual_seed(1)
    layer = cls(x.shape[1])
    with torch.no_grad():
        for name, tensor in layer.state_dict().items():
            if name in ("weight", "bias", "running_mean", "running_var", "mean_weight", "var_weight"):
                tensor.copy_(torch.rand(tensor.shape) + 0.5)
    return layer.to(x.device).train()


def step(layer: Any, x: Any) -> dict[str, Any]:
    """Return output, gradients and state of one step."""
    x = x.detach().clone(memory_format=preserve()).requires_grad_()
    y = layer(x)
    y.backward(gradient(y))
    return {
        "y": y.detach(),
        "d x": x.grad,
        **{f"d {name}": parameter.grad for name, parameter in layer.named_parameters()},
        **{name: buffer.clone() for name, buffer in layer.named_buffers()},
    }


def preserve() -> Any:
    """Return the option that keeps a layout."""
    import torch

    return torch.preserve_format


def gradient(y: Any) -> Any:
    """Return a gradient of an output, the same number for number in every dtype and layout."""
    import torch

    return ((torch.arange(y.numel()) * 7 % 17 - 8) / 8).reshape(y.shape).to(y)


def differences(found: dict[str, Any], expected: dict[str, Any]) -> dict[str, float]:
    """Return the largest differences, as shares of the largest value or of 1."""
    shares = {}
    for name, value in expected.items():
        wanted = value.double()
        scale = max(1.0, float(wanted.abs().max()))
        shares[name] = float((found[name].double() - wanted).abs().max()) / scale
    return shares


def within(shares: dict[str, float], limit: float, of_data: float | None = None) -> dict[str, Any]:
    """Raise unless all is within a limit; that of output and input gradient may be wider, as they are rounded."""
    for name, share in shares.items():
        allowed = of_data if of_data is not None and name in ("y", "d x") else limit
        if not share <= allowed:
            raise AssertionError(f"expected {name} within {allowed:.1e}, received {share:.2e}")
    return {"largest": max(shares.values()), "limit": limit}


def near_double(cls: Any, x: Any) -> dict[str, Any]:
    """Compare a step with the one in float64."""
    import torch

    layer = made(cls, x)
    expected = step(copy.deepcopy(layer).double(), x.double())
    of_data = None if x.dtype == torch.float32 else 2 * torch.finfo(x.dtype).eps
    return within(differences(step(layer, x), expected), 1e-5, of_data)


def conforms(conformance: Any, cases: list[Any], device: str) -> dict[str, Any]:
    """Check cases of the tests' conformance routine, whose expectations are computed on all cores beside."""
    import torch

    from normswap.layers import torch as layers

    names, golden = {"sn": "SwitchNorm", "brn": "BatchRenorm"}, conformance.golden
    with ProcessPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        expected = dict(zip(cases, pool.map(golden, cases), strict=True))
    for case in cases:
        cls = getattr(layers, f"{names[case.kind]}{max(1, case.x.ndim - 2)}d")
        layer = cls(case.x.shape[1], eps=conformance.EPS, momentum=conformance.MOMENTUM, **case.options)
        with torch.no_grad():
            for name, value in {**case.parameters, **case.statistics}.items():
                getattr(layer, name).copy_(torch.from_numpy(value))
        layer = layer.to(device).train(case.training)
        x = torch.from_numpy(case.x).to(device).requires_grad_()
        y = layer(x)
        y.backward(torch.from_numpy(case.dy).to(device))
        found = {"y": y.detach(), **{name: getattr(layer, name) for name in case.statistics}, "d x": x.grad}
        found |= {f"d {name}": getattr(layer, name).grad for name in case.parameters}
        conformance.golden = expected.__getitem__
        try:
            conformance.check(case, {name: tensor.cpu().numpy() for name, tensor in found.items()})
        finally:
            conformance.golden = golden
    return {"cases": len(cases)}


def launches(cls: Any, x: Any) -> list[str]:
    """Return the kernels a step launches, none where the layer is left to torch."""
    from normswap.layers.torch import gpu

    names: list[str] = []
    launch = gpu._launch

    def noted(kernel: Any, *arguments: Any) -> None:
        names.append(kernel.fn.__name__)
        launch(kernel, *arguments)

    step(made(cls, x), x)
    gpu._launch = noted
    try:
        step(made(cls, x), x)
    finally:
        gpu._launch = launch
    if x.is_cuda and len(names) != 6:
        raise AssertionError(f"expected 6 launches, received {names}")
    return names


def same_twice(cls: Any, x: Any) -> dict[str, Any]:
    """Compare two steps bit for bit."""
    one, other = step(made(cls, x), x), step(made(cls, x), x)
    return within({name: float(not one[name].equal(other[name])) for name in one}, 0.0)


def autocast(cls: Any, device: str, size: tuple[int, ...]) -> dict[str, Any]:
    """Train a convolution and a norm under autocast and a gradient scaler, and compare with float32."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    layer = made(cls, torch.empty(1, 8))
    net = nn.Sequential(nn.Conv2d(size[1], 8, 3), layer, nn.ReLU(), nn.Conv2d(8, 4, 1)).to(device)
    x, found = sample(size, device), {}
    for dtype in (torch.bfloat16, torch.float16):
        if device == "cpu" and dtype == torch.float16:
            continue
        runs = []
        for enabled in (True, False):
            copied = copy.deepcopy(net).train()
            scaler = torch.amp.GradScaler(device, enabled=enabled and dtype == torch.float16)
            optimizer = torch.optim.SGD(copied.parameters(), lr=0.1)
            with torch.autocast(device, dtype, enabled=enabled):
                loss = copied(x).float().square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            runs.append(torch.cat([p.detach().flatten() for p in copied.parameters()]))
        found[told(dtype)] = float((runs[0] - runs[1]).abs().max())
    return within(found, 0.05)


def compiled(cls: Any, x: Any) -> dict[str, Any]:
    """Compare a compiled step with the eager one."""
    import torch

    layer = made(cls, x)
    expected = step(copy.deepcopy(layer), x)
    torch.compiler.reset()
    whole = torch.compile(layer, fullgraph=True)
    leaf = x.detach().clone().requires_grad_()
    y = whole(leaf)
    y.backward(gradient(y))
    found = {"y": y.detach(), "d x": leaf.grad, **{f"d {n}": p.grad for n, p in layer.named_parameters()}}
    return within(differences(found, {name: expected[name] for name in found}), 1e-4)


def two_streams(cls: Any, x: Any) -> dict[str, Any]:
    """Run steps on two streams at once, and compare with one after the other."""
    import torch

    layers = [made(cls, x), made(cls, x)]
    inputs = [x, x * 2 + 1]
    expected = [step(copy.deepcopy(layer), each) for layer, each in zip(layers, inputs, strict=True)]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    found = []
    for layer, each, stream in zip(layers, inputs, streams, strict=True):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(5_000_000)
            found.append(step(layer, each))
    torch.cuda.synchronize()
    for one, other in zip(found, expected, strict=True):
        within({name: float(not one[name].equal(other[name])) for name in one}, 0.0)
    return {"streams": 2}


def cuda_graph(cls: Any, x: Any) -> dict[str, Any]:
    """Capture a step in a graph, replay it on other data, and compare."""
    import torch

    layer, x = made(cls, x), x.clone().requires_grad_()
    dy = gradient(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        layer(x).backward(dy)
    torch.cuda.current_stream().wait_stream(stream)
    expected_layer = copy.deepcopy(layer)
    other = x.detach().flip(0) * 1.5
    for tensor in (x, *layer.parameters()):
        tensor.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
        y.backward(dy)
    with torch.no_grad():
        for name, buffer in layer.named_buffers():  # what the capture itself moved, if it did
            buffer.copy_(dict(expected_layer.named_buffers())[name])
        x.copy_(other)
    graph.replay()
    leaf = other.clone().requires_grad_()
    z = expected_layer(leaf)
    z.backward(dy)
    buffers = {
        name: float(not b.equal(dict(expected_layer.named_buffers())[name])) for name, b in layer.named_buffers()
    }
    return within(buffers | {"y": float(not y.equal(z)), "d x": float(not x.grad.equal(leaf.grad))}, 0.0)


def ratios(device: str, small: bool, *, dtype: str) -> Items:
    """Measure forward, step and inference of each layer against native BatchNorm2d."""
    import torch

    layouts = (torch.contiguous_format, torch.channels_last)
    for shape, layout in itertools.product([(2, 8, 16, 16)] if small else SHAPES, layouts):
        x = torch.empty(shape, dtype=getattr(torch, dtype), device=device).contiguous(memory_format=layout)
        yield f"{dtype} {told(layout)} {shape}", partial(measured, x)


def measured(x: Any) -> dict[str, dict[str, float]]:
    """Return the milliseconds of each layer's forward, step and inference, on the device and as they pass."""
    import torch

    LAYERS = loaded("layers", ROOT / "benchmarks" / "layers.py").LAYERS  # noqa: N806
    with torch.no_grad():
        x.normal_(generator=torch.Generator(x.device).manual_seed(0))
    dy, half = torch.randn_like(x), x.dtype in (torch.float16, torch.bfloat16)
    built = {name: build(x.shape[1]).to(x.device) for name, build in LAYERS.items()}
    if half:  # these do not take parameters of another dtype
        uncast = ("GroupNorm(1)", "SN formula", "BRN formula")
        built = {name: layer.to(x.dtype) if name in uncast else layer for name, layer in built.items()}
    leaf = x.detach().requires_grad_()

    def training(layer: Any) -> None:
        leaf.grad = None
        layer(leaf).backward(dy)

    ways = {"forward": lambda layer: layer(leaf), "step": training, "inference": lambda layer: layer(x)}
    found: dict[str, dict[str, float]] = {name: {} for name in built}
    for way, run in ways.items():
        gradients = contextlib.nullcontext() if way != "inference" else torch.no_grad()
        with gradients:
            for layer in built.values():
                layer.train(way != "inference")
                for _ in range(3):
                    run(layer)
            for _, (name, layer) in itertools.product(range(5), built.items()):
                for key, waits in ((way, True), (f"{way}, wall", False)) if x.is_cuda else ((way, False),):
                    each = timed(partial(run, layer), 10, x, waits)
                    found[name][key] = min(found[name].get(key, each), each)
    return found


def timed(call: Callable[[], Any], times: int, x: Any, waits: bool) -> float:
    """Return the milliseconds of a call, the mean of several in a row."""
    import torch

    if not x.is_cuda:
        begin = time.perf_counter()
        for _ in range(times):
            call()
        return (time.perf_counter() - begin) / times * 1e3
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    if waits:
        torch.cuda._sleep(times * 1_500_000)
    begin.record()
    for _ in range(times):
        call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / times


def resnet50(device: str, small: bool) -> Items:
    """Measure a training step of a ResNet-50 with each norm."""
    settings = [("float32", "contiguous_format"), ("bfloat16", "channels_last")]
    for dtype, layout in settings:
        yield f"ResNet-{18 if small else 50}, {dtype}, {layout}", partial(training_steps, device, dtype, layout, small)


def training_steps(device: str, dtype: str, layout: str, small: bool) -> dict[str, dict[str, float]]:
    """Return the milliseconds of a step, each with its norm, all interleaved; bfloat16 is by autocast."""
    import torch

    from normswap.layers.torch import SwitchNorm2d
    from normswap.models.torch import resnet_v1

    frozen = partial(SwitchNorm2d, batch_statistics="frozen")
    norms = {"BN": "bn", "SN": "sn", "SN frozen": frozen, "BRN": "brn", "GN": "gn"}
    batch, side, depth = (2, 32, 18) if small else (32, 224, 50)
    x = torch.randn(batch, 3, side, side, device=device).contiguous(memory_format=getattr(torch, layout))
    labels = torch.arange(batch, device=device)
    runs = {}
    for name, norm in norms.items():
        model = resnet_v1(depth, norm).to(device).to(memory_format=getattr(torch, layout)).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

        def run(model: Any = model, optimizer: Any = optimizer) -> None:
            optimizer.zero_grad()
            with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
                loss = torch.nn.functional.cross_entropy(model(x).float(), labels)
            loss.backward()
            optimizer.step()

        for _ in range(1 if small else 3):
            run()
        runs[name] = run
    found = dict.fromkeys(runs, float("inf"))
    for _, name in itertools.product(range(1 if small else 6), runs):
        found[name] = min(found[name], timed(runs[name], 1 if small else 3, x, waits=False))
    return {name: {"step": value} for name, value in found.items()}


def finetuning(device: str, small: bool) -> Items:
    """Patch and fine-tune the CIFAR-10 ResNet-20 by the command line, in mixed precision."""
    for target in ("sn", "brn"):
        yield f"finetune ResNet-20 {target}", partial(finetuned, target, small)


def finetuned(target: str, small: bool) -> dict[str, Any]:
    """Return what the commands say of a run of 300 steps."""
    import numpy as np

    needs("click", "pydantic", "rich", "safetensors", "filelock", "accelerate", "scipy", "tomli_w", "psutil")
    rng = np.random.default_rng(0)
    count = 128 if small else 2048
    labels = rng.integers(0, 10, count)
    images = rng.integers(0, 256, (count, 32, 32, 3)) // 2 + labels[:, None, None, None] * 12
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.npz"
        np.savez(data, x=images.astype(np.uint8), y=labels)
        weights = ["--weights", WEIGHTS] if WEIGHTS.exists() else []
        source = f"{ROOT / 'examples' / 'resnet20.py'}:resnet20"
        command("patch", source, "--to", target, *weights, "--input-shape", "3,32,32", "-o", f"{folder}/patched")
        begin = time.perf_counter()
        told = command(
            *("finetune", f"{folder}/patched", "--data", data, "-o", f"{folder}/tuned", "--trust-code"),
            *("--teacher", "none", "--train", "all", "--steps", "3" if small else "300", "--batch-size", "32"),
            *("--precision", "bf16"),
        )
        return {"seconds": time.perf_counter() - begin, "weights": bool(weights), "told": told}


def command(*arguments: Any) -> Any:
    """Run a command of normswap and return the object it prints."""
    run = [sys.executable, "-m", "normswap", *map(str, arguments), "--json"]
    done = subprocess.run(run, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"normswap {arguments[0]}: exit code {done.returncode}: {done.stderr[-1500:]}")
    return json.loads(done.stdout)


class MissingError(Exception):
    """What cannot be run here."""


def needs(*names: str) -> None:
    """Leave an item out where a package is missing."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingError(f"without {', '.join(missing)}")


def exporting(device: str, small: bool) -> Items:
    """Export patched networks that were on the device, and verify the files in onnxruntime, on the GPU if it can."""
    for target in ("sn", "brn"):
        yield f"export and verify ResNet-20 {target}", partial(exported, target, device)


def exported(target: str, device: str) -> dict[str, Any]:
    """Return what the verification says."""
    needs("onnx", "onnxruntime", "onnxscript", "onnx_ir", "pydantic", "safetensors", "scipy", "filelock", "psutil")
    import onnxruntime
    import torch

    import normswap

    gpu = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    torch.manual_seed(0)
    model = loaded("resnet20", ROOT / "examples" / "resnet20.py").resnet20().eval()
    x = torch.randn(4, 3, 32, 32)
    normswap.patch(model, target, example=x)
    model.to(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.onnx"
        normswap.to_onnx(model, path, example=x.to(device))
        providers = ["cpu", "cuda"] if gpu else ["cpu"]
        verdict = normswap.verify(model, path, example=x.to(device), providers=providers)
        note = {} if gpu else {"left out": "the CUDA provider: this onnxruntime is without"}
        return {"passed": bool(verdict), "verdict": str(verdict), **note}


PARTS: dict[str, tuple[Callable[[str, bool], Items], float]] = {
    "correctness": (correctness, 120),
    "float32": (partial(ratios, dtype="float32"), 70),
    "bfloat16": (partial(ratios, dtype="bfloat16"), 70),
    "resnet50": (resnet50, 60),
    "finetune": (finetuning, 60),
    "export": (exporting, 40),
}
"""Each part with the seconds it may take."""


def part(arguments: argparse.Namespace) -> None:
    """Do one part's items that are not done yet, and write the file after each."""
    items, _ = PARTS[arguments.part]
    found = read(arguments.output)
    for name, call in items(arguments.device, arguments.device == "cpu"):
        key = f"{arguments.part}/{name}"
        if "result" in found["results"].get(key, {}):
            continue
        begin = time.perf_counter()
        try:
            outcome = {"result": call()}
        except MissingError as error:
            outcome = {"left out": str(error)}
        except Exception as error:
            outcome = {"failed": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()[-3000:]}
        outcome["seconds"] = round(time.perf_counter() - begin, 2)
        found["results"][key] = outcome
        write(arguments.output, found)
        print(f"  {key}: {', '.join(outcome)}", file=sys.stderr, flush=True)
        if "CUDA error" in outcome.get("failed", ""):
            sys.exit(1)  # nothing of this process is of use any more


def read(path: Path) -> dict[str, Any]:
    """Return what the file holds."""
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def write(path: Path, found: dict[str, Any]) -> None:
    """Write the file whole or not at all."""
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(found, indent=1, default=str) + "\n")
    beside.replace(path)


def about(device: str) -> dict[str, Any]:
    """Return what it is measured on."""
    import torch

    card = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {platform.machine()}"
    names = ("triton", "numba", "onnxruntime", "timm", "accelerate")
    packages = {name: importlib.util.find_spec(name) is not None for name in names}
    return {"card": card, "device": device, "torch": torch.__version__, "python": sys.version.split()[0], **packages}


@contextlib.contextmanager
def checkout_on_path() -> Iterator[None]:
    """Have this checkout imported as ``normswap``, here and in processes started from here."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "normswap").symlink_to(ROOT, target_is_directory=True)
        sys.path.insert(0, folder)
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
        yield


def table(found: dict[str, Any]) -> str:
    """Return the results as text: what is right, then ratios to native BatchNorm."""
    lines = [", ".join(f"{key} {value}" for key, value in found["about"].items()), ""]
    for key, outcome in found["results"].items():
        result = outcome.get("result")
        if isinstance(result, dict) and ("BatchNorm2d" in result or "BN" in result):
            base = result.get("BatchNorm2d") or result["BN"]
            lines += ["", f"{key}: ratios; the first in ms"]
            lines.append(f"  {'':16}" + "".join(f"{way:>17}" for way in base))
            for name, row in result.items():
                shown = row if row is base else {way: row[way] / base[way] for way in base}
                lines.append(f"  {name:16}" + "".join(f"{shown[way]:17.3f}" for way in base))
        elif result is not None:
            lines.append(f"ok        {key}: {str(result)[:120]}")
        else:
            state = "left out" if "left out" in outcome else "FAILED"
            lines.append(f"{state:9} {key}: {outcome.get('left out') or outcome['failed']}"[:400])
    return "\n".join(lines)


def main() -> None:
    """Run the parts that are left, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, help="default: benchmarks/results/ with the card's name")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--seconds", type=float, default=350, help="for all of it")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--fresh", action="store_true", help="begin anew")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        part(arguments)
        return
    import torch

    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("expected a GPU that this PyTorch can use, found none; with --device cpu the script tests itself")
    end = time.monotonic() + arguments.seconds
    with checkout_on_path():
        what = about(arguments.device)
        output = arguments.output or ROOT / "benchmarks" / "results" / f"gpu-{what['card'].replace(' ', '-')}.json"
        output.parent.mkdir(parents=True, exist_ok=True)
        kept = read(output)["results"] if output.exists() and not arguments.fresh else {}
        write(output, {"about": what, "results": kept})
        for name in arguments.parts:
            left = min(PARTS[name][1], end - time.monotonic())
            outcome = None
            if left < 10:
                outcome = "not begun: no time left; run it again"
            else:
                run = [sys.executable, __file__, "--part", name, "--device", arguments.device, "-o", str(output)]
                try:
                    if code := subprocess.run(run, timeout=left).returncode:
                        outcome = f"ended with exit code {code}"
                except subprocess.TimeoutExpired:
                    outcome = f"stopped after {left:.0f} s; run it again, and it goes on"
            found = read(output)
            found["results"].pop(f"{name}/all of it", None)
            if outcome:
                found["results"][f"{name}/all of it"] = {"failed": outcome}
            write(output, found)
        print(table(read(output)))
        print(f"\n{output}")


if __name__ == "__main__":
    main()
