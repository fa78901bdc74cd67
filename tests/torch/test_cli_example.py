"""`--example FILE.npz`: inputs by name on the command line, for models that take more than an image."""

import json

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import numpy_helper

from normswap.cli import main
from normswap.errors import InputError
from normswap.sources.named_arrays import read_inputs

CODE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.conv = nn.Embedding(50, 8), nn.Conv2d(3, 8, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8, 3)

class Tokens(Net):
    def forward(self, ids=None, mask=None, *, mode="none", double=False):
        x = self.norm(self.table(ids).transpose(1, 2)[..., None])[..., 0] * mask[:, None]
        y = self.head(x.sum(2) / mask.sum(1, keepdim=True))
        return {"scores": y * 2 if double else y, "mode": y.sum(1) if mode == "sum" else y.mean(1)}

class Detector(Net):
    def forward(self, images):
        return self.head(self.norm(self.conv(torch.cat(images))).mean((2, 3)))

class Speech(Net):
    def forward(self, signal, lengths):
        x = self.norm(self.conv(signal))
        mask = (torch.arange(x.shape[3]) < lengths[:, None]).float()[:, None, None]
        return self.head((x * mask).sum((2, 3)) / mask.sum((2, 3)))

def tokens(): return Tokens().eval()
def detector(): return Detector().eval()
def speech(): return Speech().eval()
"""
RNG = np.random.default_rng(0)
FILES = {
    "tokens": {"mask": np.array([[1, 1, 0], [1, 1, 1.0]]), "ids": np.array([[3, 47, 9], [0, 1, 2]]), "mode": "sum",
               "double": True},
    "detector": {f"images.{i}": RNG.normal(size=(1, 3, 8, 8)).astype(np.float32) for i in range(3)},
    "speech": {"arr_0": RNG.normal(size=(2, 3, 8, 8)), "arr_1": np.array([5, 8])},
}  # fmt: skip


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that runs a command beside networks and their inputs; returns exit code, --json, and text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(CODE)
    for name, arrays in FILES.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)

    def invoke(*arguments):
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        return result.exit_code, json.loads(result.stdout) if "--json" in arguments else None, result.stderr

    return invoke


@pytest.mark.parametrize("name", FILES)
def test_a_session(name, run, tmp_path):
    """A model of keywords, of a list, or of lengths is inspected, patched, exported and verified by one file."""
    model, example = f"net.py:{name}", ("--example", f"{name}.npz")
    code, said, err = run("inspect", model, *example, "--json")
    assert code == 0, err
    assert said["sites"][0]["shape"] is not None

    code, _, err = run("patch", model, "--to", "gn", *example, "-o", "b")
    assert code == 0, err
    assert [line for line in err.splitlines() if line.startswith("next:")] == [
        f"next: normswap export b --example {name}.npz -o b.onnx"  # and no training, which reads images
    ]
    code, _, err = run("export", "b", *example, "--data", f"{name}.npz", "-o", "b.onnx")
    assert code == 0, err
    assert f"normswap verify b b.onnx --example {name}.npz --data {name}.npz" in err
    code, said, err = run(
        "verify", "b", "b.onnx", *example, "--data", f"{name}.npz", "--save-reference", "r.npz", "--json"
    )
    assert code == 0, err
    assert {"example", "data"} <= {check["inputs"] for check in said["checks"]}
    assert run("verify", "b.onnx", "--against", "r.npz", "--json")[1] == said

    if name == "tokens":
        assert said["coverage"] == {"table": {"reached": 50, "rows": 50}}
        proto = onnx.load(tmp_path / "b.onnx")
        table = next(tensor for tensor in proto.graph.initializer if tensor.dims[:] == [50, 8])
        array = numpy_helper.to_array(table).copy()
        array[47] = 0
        table.CopyFrom(numpy_helper.from_array(array, table.name))
        onnx.save(proto, "b.onnx")
        assert run("verify", "b", "b.onnx", *example)[0] == 5


MANY = {
    "tokens": {"mask": np.ones((64, 3)), "ids": RNG.integers(0, 50, (64, 3)), "mode": "sum", "double": True},
    "detector": {f"images.{i}": RNG.normal(size=(64, 3, 8, 8)).astype(np.float32) for i in range(3)},
    "speech": {"arr_0": RNG.normal(size=(64, 3, 8, 8)), "arr_1": RNG.integers(3, 9, 64)},
}


@pytest.mark.parametrize("name", FILES)
def test_calibrate_and_drift(name, run):
    """Named arrays calibrate and measure, on the way and on the way back."""
    np.savez("many.npz", **MANY[name])
    example = ("--example", f"{name}.npz")
    off = {}
    for how in ("data", "calibrate"):
        few = ("--calibration-size", "32") if how == "calibrate" else ()
        code, said, err = run(
            "patch", f"net.py:{name}", "--to", "gn", *example, f"--{how}", "many.npz", *few, "-o", how, "--json"
        )
        assert code == 0, err
        off[how] = [found["rms"] for found in said["drift"] if found["name"].startswith("output")]
    assert all(after < before for before, after in zip(off["data"], off["calibrate"], strict=True))

    code, said, err = run("patch", "calibrate", "--to", "bn", *example, "--calibrate", "many.npz",
                          "--calibration-size", "32", "-o", "back", "--json")  # fmt: skip
    assert code == 0, err
    assert said["drift"][-1]["rms"] < 0.5


def test_few_inputs_are_told_as_what_they_are(run):
    """A warning counts inputs, not images."""
    np.savez("many.npz", **MANY["speech"])
    code, _, err = run(
        "patch", "net.py:speech", "--to", "gn", "--example", "speech.npz", "--calibrate", "many.npz", "-o", "b"
    )

    assert code == 0
    assert "expected 256 inputs to calibrate on, received 64; see what the residuals say" in err


@pytest.mark.parametrize(
    ("command", "otherwise"),
    [
        (("finetune", "b", "--data", "tokens.npz", "-o", "c"), "models of other inputs are trained in Python"),
        (("evaluate", "b", "--data", "tokens.npz"), "models of other inputs are trained in Python"),
        (
            ("patch", "net.py:tokens", "--to", "gn", "--calibrate", "xy.npz", "-o", "c"),
            "models of other inputs read an .npz of named arrays",
        ),
    ],
)
def test_images_of_no_known_shape(command, otherwise, run):
    """What reads images says that it needs their shape, and what to do with a model that takes none."""
    np.savez("xy.npz", x=np.zeros((32, 8, 8, 3)), y=np.zeros(32, int))
    assert run("patch", "net.py:tokens", "--to", "gn", "--example", "tokens.npz", "-o", "b")[0] == 0

    code, _, err = run(*command)

    assert code == 3
    assert err == f"error: expected the shape of one image, received none: give --input-shape; {otherwise}\n"


def test_nothing_to_export_with(run):
    """Without an example the export names both ways to give one."""
    assert run("patch", "net.py:tokens", "--to", "gn", "-o", "b")[0] == 0

    code, _, err = run("export", "b", "-o", "b.onnx")

    assert code == 3
    assert err == "error: expected --input-shape, or --example, to export, received none\n"


def test_usage(run):
    """An example stands in the place of a shape."""
    code, _, err = run("inspect", "net.py:speech", "--example", "speech.npz", "--input-shape", "3,8,8")

    assert code == 2
    assert err == (
        "error: expected one of --input-shape and --example, received --input-shape 3,8,8, --example speech.npz\n"
    )


@pytest.mark.parametrize(
    ("arrays", "problem"),
    [
        ({}, "expected an .npz of named arrays in FILE, received one without any"),
        ({"x": np.zeros(2), "x.0": np.zeros(2)},
         "expected a name of one array, received 'x.0' in FILE, which is in the way of another"),
        ({"x.0": np.zeros(2), "x": np.zeros(2)},
         "expected a name of one array, received 'x' in FILE, which is in the way of another"),
        ({"arr_1": np.zeros(2)}, "expected arr_0, arr_1 and so on in FILE, received arr_1"),
        ({"x": np.array(["a", "b"])}, "expected arrays of numbers or truth values, received dtype=<U1"),
    ],
    ids=["empty", "twice", "twice the other way", "a gap", "texts"],
)  # fmt: skip
def test_files_that_are_no_example(arrays, problem, tmp_path):
    """What is no batch of named arrays is refused, with the reason."""
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(InputError) as caught:
        read_inputs(tmp_path / "x.npz")

    assert str(caught.value) == problem.replace("FILE", str(tmp_path / "x.npz"))


def test_nothing_in_an_example_is_run(tmp_path):
    """A pickle, under the name of an .npz or within one, is not read."""
    (tmp_path / "p.npz").write_bytes(b"\x80\x04N.")
    np.savez(tmp_path / "o.npz", x=np.array([{}]))
    for name, message in (
        ("p", "expected an .npz of named arrays in FILE, received a file of another kind"),
        (
            "o",
            "expected arrays of numbers, received 'x' of Python objects in FILE; numbers, truth values and one text "
            "are read, None is left out",
        ),
    ):
        with pytest.raises(InputError) as caught:
            read_inputs(tmp_path / f"{name}.npz")
        assert str(caught.value) == message.replace("FILE", str(tmp_path / f"{name}.npz"))
