"""`normswap verify` and `normswap evaluate` as people and scripts use them."""

import re
import shutil

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx import numpy_helper

from normswap.bundles.written import remember
from normswap.cli import main

from ..helpers import commanded
from .models import CODE


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with a network, its bundle and ONNX file, and data."""
    path = tmp_path_factory.mktemp("cli")
    (path / "net.py").write_text(CODE)
    rng = np.random.default_rng(0)
    np.savez(path / "data.npz", x=rng.integers(0, 255, (48, 8, 8, 3), np.uint8), y=rng.integers(0, 3, 48))
    for arguments in (["patch", f"{path}/net.py:build", "--to", "gn"], ["export", f"{path}/gn"]):
        output = f"{path}/gn" if arguments[0] == "patch" else f"{path}/gn.onnx"
        assert CliRunner().invoke(main, [*arguments, "-o", output]).exit_code == 0
    return path


@pytest.fixture
def run(written, tmp_path, monkeypatch):
    """A function that runs a command in a folder of the test's own; returns exit code, what --json says, and text."""
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    remember(tmp_path / "gn", f"{tmp_path}/net.py:build")  # as if it was written there
    monkeypatch.chdir(tmp_path)

    return commanded


def test_a_reference(run, tmp_path):
    """A reference is written beside the verdict, replaced only with --overwrite, and verified against."""
    saving = ("verify", "gn", "gn.onnx", "--data", "data.npz", "--save-reference", "r.npz")
    code, said, _ = run(*saving, "--json")
    assert (code, said["passed"]) == (0, True)
    first = (tmp_path / "r.npz").read_bytes()

    code, _, err = run(*saving)
    assert (code, err) == (2, "error: expected an output path that does not exist, received r.npz; add --overwrite\n")
    assert run(*saving, "--overwrite")[0] == 0
    assert (tmp_path / "r.npz").read_bytes() == first

    code, again, _ = run("verify", "gn.onnx", "--against", "r.npz", "--json")
    assert (code, again) == (0, said)


def test_text(run):
    """A verdict is one line for people."""
    code, _, err = run("verify", "gn", "gn.onnx")

    assert code == 0
    assert re.fullmatch(r"passed: 8 checks, largest difference \d\.\de-07 of scale\n", err)


def test_a_source_without_a_seed(run, tmp_path):
    """It is another model each time, which no file is of; one whose weights are told, or drawn once, is told apart."""
    (tmp_path / "drawn.py").write_text(CODE.replace("torch.manual_seed(0)", "pass"))
    model = ("drawn.py:build",)
    torch.manual_seed(7)
    assert run("export", *model, "-o", "drawn.onnx")[0] == 0
    code, said, err = run("verify", *model, "drawn.onnx", "--json")
    message = (
        "expected a MODEL with the weights that drawn.onnx was made of, received drawn.py:build, which has other ones "
        "each time it is built; give --weights, or a bundle"
    )
    assert (code, said["error"], err) == (3, message, f"error: {message}\n")
    assert run("verify", "net.py:build", "drawn.onnx")[0] == 5
    assert run("verify", "gn", "drawn.onnx")[0] == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gn.onnx"], "expected MODEL and FILE, or FILE and --against"),
        (["gn", "gn.onnx", "--against", "r.npz"], "expected MODEL and FILE, or FILE and --against"),
        (
            ["gn.onnx", "--against", "r.npz", "--data", "data.npz", "--mean", "0.5", "--trust"],
            "expected no option of a MODEL beside --against, which stands in its place, "
            "received --data, --mean, --trust",
        ),
        (["gn", "gn.onnx", "--overwrite"], "expected --save-reference FILE to overwrite, received --overwrite"),
        (
            ["gn", "gn.onnx", "--std", "0.5", "--input-shape", "3,8,8"],
            "expected --data DATA beside what is said of its images, received --input-shape, --std",
        ),
    ],
)
def test_usage(run, arguments, message):
    """Arguments that do not go together are told."""
    code, _, err = run("verify", *arguments)

    assert code == 2
    assert err.endswith(f"Error: {message}\n")


def test_a_missing_provider_exits_6_and_auto_takes_what_there_is(run):
    """A provider that is not installed exits 6; --provider auto takes what there is."""
    code, said, _ = run("verify", "gn", "gn.onnx", "--provider", "dml", "--provider", "cpu", "--json")
    assert code == said["exit_code"] == 6
    assert said["error"].endswith("pip install onnxruntime-directml")

    code, said, _ = run("verify", "gn", "gn.onnx", "--provider", "auto", "--json")
    assert code == 0
    assert "cpu" in {check["provider"] for check in said["checks"]}


def test_evaluate_against(run):
    """A file's accuracy stands beside its bundle's, with the share of images on which both agree."""
    plain = run("evaluate", "gn.onnx", "--data", "data.npz", "--json")[1]
    code, said, _ = run("evaluate", "gn.onnx", "--data", "data.npz", "--against", "gn", "--json")

    assert code == 0
    assert {key: said[key] for key in plain} == plain
    assert said["against"] == {"model": "gn", **{key: plain[key] for key in ("top1", "top5", "n")}}
    assert said["agreement"] == 100

    text = run("evaluate", "gn.onnx", "--data", "data.npz", "--against", "gn", "--batch-size", "7")[2]
    figures = f"top-1 {plain['top1']:.2f} %, top-5 {plain['top5']:.2f} % of 48 images"
    assert text.endswith(f"\ngn.onnx: {figures}\ngn: {figures}\nboth say the same of 100.00 % of the images\n")


def test_evaluate_against_another(run, tmp_path):
    """A file that answers otherwise is seen to: here it swaps two classes."""
    proto = onnx.load(tmp_path / "gn.onnx")
    for tensor in proto.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if array.shape in ((3, 8), (3,)) and tensor.name.startswith("5."):
            tensor.CopyFrom(numpy_helper.from_array(array[[1, 0, 2]].copy(), tensor.name))
    onnx.save(proto, tmp_path / "bad.onnx")
    answers = []
    for name in ("gn.onnx", "bad.onnx"):
        said = run("evaluate", name, "--data", "data.npz", "--against", "gn", "--json")[1]
        answers.append((said["agreement"], said["against"]["top1"]))

    assert answers[0] == (100, answers[1][1])
    assert answers[1][0] < 100
