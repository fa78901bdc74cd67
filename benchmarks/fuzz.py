"""Fuzz every format that is read: no input may end in a bug of ours, a hang or a crash, or be taken for another one.

    python benchmarks/fuzz.py --count 5000 --seed 0

Inputs are drawn by the seed and tried in forked processes with a time limit. The table counts the exit codes of each
format; ``differs`` are inputs that were accepted, and are not what was written, of formats that can tell. Exit code 1
of the script where there is any of these.
"""

import argparse
import itertools
import json
import os
import random
import select
import shutil
import signal
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

_spec = spec_from_file_location("mutations", Path(__file__).parent.parent / "tests" / "mutations.py")
assert _spec is not None
assert _spec.loader is not None
mutations = module_from_spec(_spec)
_spec.loader.exec_module(mutations)

Fingerprint = Callable[[Path], Any]
LIMIT = 60.0
IMPORTED = (
    *("torch", "torch._dynamo", "numba", "scipy.optimize", "onnx", "onnxruntime", "PIL.Image", "pydantic", "psutil"),
    *("matplotlib.pyplot", "accelerate", "tensorboardX", "normswap.bundles.opening", "normswap.patchers.torch.patch"),
    *("normswap.finetune.run.run", "normswap.finetune.run.plots", "normswap.finetune.run.torch.trainer"),
    *("jinja2", "normswap.report.bundle", "normswap.report.file", "normswap.report.run"),
    *("normswap.verification.verify", "normswap.verification.inference", "normswap.layers.torch.kernels"),
)
SHOWN = 20

NETWORK = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)]
    return nn.Sequential(*layers).eval()
"""


@dataclass(frozen=True)
class Format:
    """What is fuzzed: the files of a folder by patterns, the command that reads them, and what tells a difference.

    ``command`` has ``{}`` for the folder of the input and ``{base}`` for that of what is written once. ``read`` returns
    what was read, for formats that can tell every difference. ``sealed`` ones are sealed again when a field was
    changed, and may then be another file.
    """

    files: tuple[str, ...]
    command: tuple[str, ...]
    read: Fingerprint | None = None
    sealed: bool = False


def tensors(model: Any) -> Any:
    """Return all there is to know of a torch model's weights."""
    return {name: (str(t.dtype), tuple(t.shape), t.numpy().tobytes()) for name, t in model.state_dict().items()}


def bundle(folder: Path) -> Any:
    """Return what a bundle tells and holds."""
    from normswap.bundles.bundle import read

    found = read(folder / "b", model=network())
    source = str(found.source).replace(str(folder.resolve()), "")  # which is told from where the bundle is
    return found.recipe, found.preprocessing, source, tensors(found.model)


def network() -> Any:
    """Return the network of all these files."""
    space: dict[str, Any] = {}
    exec(NETWORK, space)
    return space["build"]()


def state(folder: Path) -> Any:
    """Return the weights in a PyTorch checkpoint."""
    from normswap.sources.torch.state_dict import read_state_dict

    return {name: (str(t.dtype), t.numpy().tobytes()) for name, t in read_state_dict(folder / "w.pth").items()}


def arrays(folder: Path) -> Any:
    """Return what an .npz gives to learn from."""
    from normswap.data.dataset import open_data
    from normswap.data.preprocessing import Preprocessing

    return open_data(str(folder / "x.npz"), Preprocessing((3, 8, 8), "channels_first")).identity()


def keras_weights(folder: Path) -> Any:
    """Return the weights of a Keras model."""
    from normswap.sources.keras.model_file import read_model

    model = read_model(folder / "m.keras")
    return model.get_config(), [(str(each.dtype), each.tobytes()) for each in model.get_weights()]


def held_against(folder: Path) -> Any:
    """Return the arrays of a reference."""
    from normswap.verification.stored import load_reference

    found = load_reference(folder / "r.npz")
    kinds = [(batch.arrays, batch.outputs, batch.layers) for batch in found.batches]
    return [[{name: a.tobytes() for name, a in kind.items()} for kind in batch] for batch in kinds]


PATCH = ("patch", "{base}/net.py:build", "--dry-run", "--input-shape", "3,8,8")
FORMATS: Mapping[str, Format] = {
    "bundle": Format(("b/normswap.json", "b/*.safetensors"), ("inspect", "{}/b"), bundle, sealed=True),
    "recipe": Format(("recipe.json",), (*PATCH, "--recipe", "{}/recipe.json")),
    "rules": Format(("rules.json",), (*PATCH, "--recipe", "{}/rules.json")),
    "run": Format(
        ("run/run/run.toml", "run/run/metrics.csv", "run/run/checkpoints/*/*"),
        ("finetune", "{base}/b", "--data", "{base}/x.npz", "--teacher", "none", "--steps", "2", "--batch-size", "8",
         "--checkpoint-every", "1", "--resume", "-o", "{}/run"),
        sealed=True,
    ),
    "plot": Format(("run/run/metrics.csv", "run/normswap.json"), ("plot", "{}/run", "-o", "{}/p.png")),
    "report": Format(("run/run/metrics.csv", "run/normswap.json"), ("report", "{}/run", "-o", "{}/p.html")),
    "page": Format(("m.onnx",), ("report", "{}/m.onnx", "-o", "{}/p.html")),
    "config": Format(
        ("c.toml",),
        ("finetune", "{base}/b", "--data", "{base}/x.npz", "--teacher", "none", "-c", "{}/c.toml", "-o", "{}/out"),
    ),
    "npz": Format(("x.npz",), ("evaluate", "{base}/m.onnx", "--data", "{}/x.npz"), arrays),
    "example": Format(("e.npz",), (*PATCH[:3], "--to", "gn", "--example", "{}/e.npz")),
    "images": Format(("images/*/*",), ("evaluate", "{base}/m.onnx", "--data", "{}/images")),
    "pth": Format(("w.pth",), (*PATCH, "--to", "gn", "--weights", "{}/w.pth"), state),
    "safetensors": Format(("w.safetensors",), (*PATCH, "--to", "gn", "--weights", "{}/w.safetensors")),
    "onnx": Format(("m.onnx",), ("verify", "{}/m.onnx", "--against", "{base}/r.npz")),
    "int8": Format(("i.onnx",), ("verify", "{base}/b", "{}/i.onnx")),
    "reference": Format(("r.npz",), ("verify", "{base}/m.onnx", "--against", "{}/r.npz"), held_against),
    "keras": Format(("m.keras",), ("inspect", "{}/m.keras"), keras_weights),
    "h5": Format(("m.h5",), ("inspect", "{}/m.h5")),
}  # fmt: skip


def write(base: Path, *, keras: bool) -> None:
    """Write one file of every format."""
    import numpy as np
    import safetensors.torch
    import torch
    from PIL import Image

    import normswap
    from normswap.data.preprocessing import Preprocessing

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (16, 8, 8, 3), dtype=np.uint8)
    np.savez(base / "x.npz", x=images, y=np.arange(16) % 4)
    np.savez(base / "e.npz", arr_0=rng.random((2, 3, 8, 8), np.float32))
    for index, suffix in enumerate(("png", "jpg", "bmp", "tiff", "webp", "ppm")):
        for label in "abcd":
            (base / "images" / label).mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[index]).save(base / "images" / label / f"{index}.{suffix}")
    (base / "net.py").write_text(NETWORK, encoding="utf-8")
    model = network()
    torch.save({"state_dict": model.state_dict()}, base / "w.pth")
    safetensors.torch.save_file(model.state_dict(), base / "w.safetensors")
    report = normswap.patch(model, "sn", example=torch.zeros(1, 3, 8, 8))
    preprocessing = Preprocessing((3, 8, 8), "channels_first")
    normswap.save(report, base / "b", source=f"{base}/net.py:build", original=network(), preprocessing=preprocessing)
    (base / "recipe.json").write_text(report.recipe.to_json(), encoding="utf-8")
    rules = [{"match": "*", "depth": [0, 1], "target": {"kind": "gn", "groups": 2}}]
    (base / "rules.json").write_text(json.dumps({"schema_version": 1, "rules": rules}), encoding="utf-8")
    (base / "c.toml").write_text('steps = 2\nlr = 0.1\nbatch_size = 8\nstages = ["all"]\n', encoding="utf-8")
    told = [each.format("", base=base).replace("-o /", f"-o {base}/") for each in FORMATS["run"].command]
    for arguments in (
        [*told[: told.index("--resume")], "-o", f"{base}/run"],
        ["export", f"{base}/b", "-o", f"{base}/m.onnx"],
        ["export", f"{base}/b", "--int8", "--calibrate", f"{base}/x.npz", "-o", f"{base}/i.onnx"],
        ["verify", f"{base}/b", f"{base}/m.onnx", "--save-reference", f"{base}/r.npz"],
    ):
        if (code := in_child(lambda arguments=arguments: command(arguments), 300)["code"]) != 0:
            raise SystemExit(f"expected exit code 0 of {' '.join(arguments)}, received {code}")
    if keras:
        in_child(lambda: keras_files(base), 300)


def keras_files(base: Path) -> dict[str, Any]:
    """Write the two files of Keras."""
    import keras

    layers = keras.layers
    made = [keras.Input((8, 8, 3)), layers.Conv2D(4, 3), layers.BatchNormalization(), layers.GlobalAveragePooling2D()]
    model = keras.Sequential([*made, layers.Dense(4)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save(base / "m.keras")
        model.save(base / "m.h5")
    return {"code": 0}


def command(arguments: list[str]) -> dict[str, Any]:
    """Run the command line and return its exit code and last words."""
    from click.testing import CliRunner

    from normswap.cli import main

    result = CliRunner().invoke(main, arguments)
    lines = (result.stderr or result.output or repr(result.exception)).strip().splitlines()
    shown = [line for line in lines if line.startswith(("error", "Error", "expected"))] or lines
    return {"code": result.exit_code, "said": (shown or [""])[-1][:300]}


def read(function: Fingerprint, folder: Path) -> Any:
    """Return what is read, or None for what is refused; raises what is neither."""
    from normswap.errors import explain

    try:
        return repr(function(folder))
    except Exception as error:
        code, said = explain(error)
        if code == 1:
            raise RuntimeError(said) from error
        return None


def in_child(work: Callable[[], dict[str, Any]], limit: float) -> dict[str, Any]:
    """Return what some work comes to in a forked process, ``code`` "hang" or "crash" where it comes to nothing."""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(out)
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 1)
        os.dup2(null, 2)
        try:
            said = json.dumps(work())
        except BaseException as error:  # told, whatever it is
            said = json.dumps({"code": 1, "said": f"{type(error).__name__}: {error}"[:300]})
        os.write(into, said.encode()[:60_000])
        os._exit(0)
    os.close(into)
    content, end = b"", time.monotonic() + limit
    while (left := end - time.monotonic()) > 0:
        if not select.select([out], [], [], left)[0]:
            break
        part = os.read(out, 65_536)
        if not part:
            break
        content += part
    hung = not content and time.monotonic() >= end
    if hung:
        os.kill(child, signal.SIGKILL)
    os.close(out)
    os.waitpid(child, 0)
    if hung:
        return {"code": "hang", "said": f"after {limit:.0f} s"}
    return json.loads(content) if content else {"code": "crash", "said": "the process died"}


def copied(name: str, base: Path, folder: Path) -> None:
    """Put what is written of a format into a new folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for top in {pattern.partition("/")[0] for pattern in FORMATS[name].files}:
        source = base / top
        shutil.copytree(source, folder / top) if source.is_dir() else shutil.copy2(source, folder / top)


def mutated(name: str, folder: Path, draw: random.Random) -> bool:
    """Change one file of a format, and return whether it is one that could have been written."""
    from normswap.formats.seal import SEAL, sealed

    files = sorted(itertools.chain.from_iterable(folder.glob(pattern) for pattern in FORMATS[name].files))
    file = draw.choice(files)
    content = file.read_bytes()
    if file.suffix == ".json" and draw.random() < 0.7:
        again = FORMATS[name].sealed and draw.random() < 0.8  # else only the seal would ever be looked at
        seal = (lambda data: sealed({k: v for k, v in data.items() if k != SEAL})) if again else dict
        file.write_bytes(mutations.json_of(content, draw, seal))
        return again
    if file.suffix == ".toml" and draw.random() < 0.7:
        import tomllib

        import tomli_w

        changed = mutations.field_of(tomllib.loads(content.decode()), draw)
        clean = {key: value for key, value in changed.items() if value is not None}
        try:
            file.write_text(tomli_w.dumps(clean), encoding="utf-8")
        except (TypeError, ValueError):  # what TOML cannot say
            file.write_bytes(mutations.bytes_of(content, draw))
    else:
        file.write_bytes(mutations.bytes_of(content, draw))
    return False


def attempt(name: str, base: Path, folder: Path, wanted: str | None) -> dict[str, Any]:
    """Return what comes of an input, in the process it is called in."""
    form = FORMATS[name]
    found = command([part.format(folder, base=base) for part in form.command])
    if form.read is not None:
        received = read(form.read, folder)
        if None not in (received, wanted) and received != wanted:
            return {"code": "differs", "said": found["said"]}
    return found


def inputs(names: list[str], count: int, seed: int) -> Iterator[tuple[str, random.Random]]:
    """Yield the formats in turn, each with what its input is drawn by."""
    for number in range(count):
        yield names[number % len(names)], random.Random(f"{seed} {number}")


def main() -> None:
    """Fuzz, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--keep", type=Path, help="Folder for the inputs that are faults.")
    options = parser.parse_args()
    names = options.formats.split(",")
    keras = bool({"keras", "h5"} & {*names})

    for module in (*IMPORTED, *(["keras"] if keras else [])):  # once, for the children
        with suppress(ImportError):
            import_module(module)
    import torch

    torch.set_num_threads(1)
    work = Path(tempfile.mkdtemp(prefix="fuzz-"))
    base = work / "base"
    base.mkdir()
    write(base, keras=keras)
    wanted = {n: in_child(lambda n=n: {"said": read(FORMATS[n].read, base)}, 300)["said"] for n in names
              if FORMATS[n].read}  # fmt: skip
    for name in names:
        whole = work / f"whole-{name}"
        copied(name, base, whole)
        if (found := in_child(partial(attempt, name, base, whole, wanted.get(name)), 300))["code"] != 0:
            raise SystemExit(f"expected exit code 0 for what is written of {name}, received {found}")
    counts: dict[str, Counter[Any]] = {name: Counter() for name in names}
    faults: list[str] = []
    try:
        for name, draw in inputs(names, options.count, options.seed):
            folder = work / "input"
            copied(name, base, folder)
            expected = None if mutated(name, folder, draw) else wanted.get(name)
            found = in_child(partial(attempt, name, base, folder, expected), LIMIT)
            counts[name][found["code"]] += 1
            if found["code"] in (1, "hang", "crash", "differs"):
                faults.append(f"{name}: {found['code']}: {found['said']}")
                if options.keep is not None:
                    shutil.copytree(folder, options.keep / f"{len(faults)}-{name}", dirs_exist_ok=True)
    finally:  # as far as it came
        table(counts, faults)
        shutil.rmtree(work)
    raise SystemExit(bool(faults))


def table(counts: Mapping[str, Counter[Any]], faults: list[str]) -> None:
    """Print how many inputs of each format ended in which exit code, and what was a fault."""
    codes = sorted({code for each in counts.values() for code in each}, key=str)
    print(f"{'format':12}", *(f"{code!s:>8}" for code in codes), f"{'all':>8}")
    for name, each in counts.items():
        print(f"{name:12}", *(f"{each[code]:8}" for code in codes), f"{sum(each.values()):8}")
    for fault, times in Counter(faults).most_common(SHOWN):
        print(f"{times} x {fault}")


if __name__ == "__main__":
    main()
