"""What the tests of trust share: code that leaves a mark where it is run, and bundles that name it."""

import json
import shutil

import numpy as np
from click.testing import CliRunner

from normswap.cli import main
from normswap.formats.seal import sealed

MARK = "mark"
"""The file that the code writes into the folder where it lies."""

PAYLOAD = f"""
import pathlib

pathlib.Path(__file__).with_name({MARK!r}).touch()


def build():
    raise SystemExit(0)
"""

SOURCES = (
    "payload.py:build",
    "../beside.py:build",
    "/ABSOLUTE/beside.py:build",
    "working_folder:build",
    "os:abort",
    "signal:pause",
    "http.server:test",
    "sys:exit",
    "timm:hf-hub:stranger/x",
    "timm:local-dir:/tmp/x",
    "torchvision:../x",
    "normswap.cli:main",
    "normswap.models.torch:partial",
)
"""Sources that a stranger's bundle can name, of which each runs code that is nobody's here."""


def invoke(*arguments):
    """Run a command; returns its exit code and what it says on stderr."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    return result.exit_code, result.stderr


def write_own(path, code, bundles, *, exported):
    """Write what is the reader's own: ``net.py`` of this code, data, bundles, and the ONNX file of one of them.

    ``bundles`` are the arguments of `patch` by the bundle's name, without its output.
    """
    (path / "net.py").write_text(code)
    rng = np.random.default_rng(0)
    np.savez(path / "data.npz", x=rng.integers(0, 255, (32, 8, 8, 3), np.uint8), y=rng.integers(0, 3, 32))
    for name, (build, *arguments) in bundles.items():
        assert invoke("patch", f"{path}/net.py:{build}", *arguments, "-o", path / name)[0] == 0
    assert invoke("export", path / exported, "-o", path / "own.onnx")[0] == 0
    assert invoke("verify", path / exported, path / "own.onnx", "--save-reference", path / "own.npz")[0] == 0


def work_in(folder, written, monkeypatch):
    """Make a folder the working one, whose modules can be imported, with the reader's own data and ONNX file."""
    for name in ("data.npz", "own.onnx", "own.npz"):
        shutil.copy(written / name, folder)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    return folder


def stranger(bundle, folder, source):
    """Make of a bundle one in ``folder`` that names ``source``, with code in it, beside it and in the working folder.

    Returns its path and how it names the source, which commands and messages have.
    """
    path = folder / "theirs" / "bundle"
    shutil.copytree(bundle, path)
    for place in (path / "payload.py", path.parent / "beside.py", folder / "working_folder.py"):
        place.write_text(PAYLOAD)
    source = source.replace("/ABSOLUTE", str(path.parent))
    manifest = json.loads((path / "normswap.json").read_text()) | {"source": source}
    del manifest["seal"]
    (path / "normswap.json").write_text(json.dumps(sealed(manifest)))
    file, _, name = source.rpartition(":")
    return path, f"{(path / file).resolve()}:{name}" if file.endswith(".py") and "\0" not in file else source


def refusal(path, source, way="add --trust-code"):
    """The whole message about a bundle that is not trusted."""
    return (
        f"expected a bundle that is read without running its author's code, received source={source!r} in {path}; "
        f"if you trust that code, {way}"
    )


def marks(folder):
    """Where code of a stranger's was run."""
    return list(folder.rglob(MARK))


def commands(bundle):
    """Every command that has a bundle's model built; its output is called "new"."""
    return {
        "patch": ["patch", bundle, "--to", "sn", "-o", "new"],
        "export": ["export", bundle, "-o", "new"],
        "evaluate": ["evaluate", bundle, "--data", "data.npz"],
        "evaluate --against": ["evaluate", "own.onnx", "--data", "data.npz", "--against", bundle],
        "verify": ["verify", bundle, "own.onnx"],
        "report --against": ["report", "own.onnx", "--against", bundle, "-o", "new.html"],
        "finetune": ["finetune", bundle, "--data", "data.npz", "--steps", "1", "-o", "new"],
    }
