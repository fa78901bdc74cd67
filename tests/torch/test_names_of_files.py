"""Names of files and folders that are no text, or not in the locale's encoding: all the work goes on in them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import normswap
from normswap.bundles.bundle import read
from normswap.bundles.manifest import manifest_of
from normswap.cli import main
from normswap.convert.recipe import Recipe
from normswap.data.folders import Folder
from normswap.errors import InputError, OutputExistsError
from normswap.finetune.run.run import finetune
from normswap.finetune.run.settings import Settings
from normswap.sources.files import is_text
from normswap.sources.hub import FORM
from normswap.sources.spec import FORMS

from ..helpers import exactly

NETWORK = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)]
    return nn.Sequential(*layers).eval()
"""
NO_TEXT = os.fsdecode(b"n\xff")


@pytest.fixture
def place(tmp_path):
    """A folder with a name that is no UTF-8, in a folder with a network beside it, and images of such names."""
    (tmp_path / "net.py").write_text(NETWORK)
    rng = np.random.default_rng(0)
    for label in (os.fsdecode(b"a\xfe"), "ж"):
        folder = tmp_path / NO_TEXT / "images" / label
        folder.mkdir(parents=True)
        for number in range(6):
            image = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            with open(folder / os.fsdecode(b"\xfd%d.png" % number), "wb") as file:
                image.save(file, "PNG")
    return tmp_path


def commands(place):
    """The work from patch to proof, all of whose outputs are there."""
    there, images = place / NO_TEXT, f"{place / NO_TEXT}/images"
    return [
        ["patch", f"{place}/net.py:build", "--to", "gn", "--input-shape", "3,8,8", "-o", f"{there}/b"],
        ["finetune", f"{there}/b", "--data", images, "--teacher", "none", "--steps", "2", "--batch-size", "4",
         "--checkpoint-every", "1", "-o", f"{there}/t"],
        ["finetune", f"{there}/b", "--data", images, "--teacher", "none", "--steps", "2", "--batch-size", "4",
         "--checkpoint-every", "1", "--resume", "-o", f"{there}/t"],
        ["export", f"{there}/t", "-o", f"{there}/m.onnx"],
        ["evaluate", f"{there}/m.onnx", "--data", images, "--json"],
        ["verify", f"{there}/t", f"{there}/m.onnx"],
    ]  # fmt: skip


def test_that_are_no_text(place):
    """Every command reads and writes there."""
    for arguments in commands(place):
        result = CliRunner().invoke(main, arguments)
        assert (result.exit_code, result.stderr[-300:] if result.exit_code else "") == (0, "")


@pytest.mark.slow
def test_in_another_locale(place):
    """Files are UTF-8 wherever they are written, and so is what is read."""
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    there = place / "жук"
    there.mkdir()
    (there / "net.py").write_text(NETWORK + "# жук\n", encoding="utf-8")
    patch = ["patch", f"{there}/net.py:build", "--to", "gn", "--input-shape", "3,8,8", "-o", f"{there}/b"]
    assert CliRunner().invoke(main, patch).exit_code == 0
    program = [sys.executable, "-m", "normswap", "export", f"{there}/b", "-o", f"{there}/m.onnx"]
    result = subprocess.run(program, capture_output=True, env=environment, check=False)

    assert (result.returncode, result.stderr[-300:] if result.returncode else b"") == (0, b"")
    assert json.loads((there / "b" / "normswap.json").read_bytes())["source"] == "../net.py:build"


def test_of_a_source(tmp_path):
    """What a manifest names has to be text, which JSON is: that is told when it is written."""
    source = f"{tmp_path / NO_TEXT}/net.py:build"
    told = f"{NO_TEXT}/net.py:build"
    message = f"expected a source whose path is UTF-8, received {'../' + told!r}; rename it"
    with pytest.raises(InputError, match=exactly(message)):
        manifest_of(tmp_path, tmp_path / "b", Recipe("torch", ()), source, None)


def test_of_images(place):
    """Names tell files from others, whatever their encoding."""
    images = Folder(place / NO_TEXT / "images")
    before = images.identity()
    os.rename(images.files[0], images.files[0].with_name(os.fsdecode(b"\xfc.png")))

    assert Folder(place / NO_TEXT / "images").identity() != before
    assert (is_text(Path("ж")), is_text(Path(NO_TEXT))) == (True, False)


@pytest.mark.parametrize("name", ["n\0", "n\ud800"])
class TestThatNothingIsCalled:
    """A NUL ends a name, and half of a pair is no bytes: such outputs are refused as others, and nothing is written."""

    MESSAGE = "expected an output that a file can be called, received {!r}; write to another output"

    @pytest.fixture
    def made(self, place, monkeypatch):
        """A bundle, its file and arrays, in the working folder."""
        monkeypatch.chdir(place)
        np.savez("x.npz", x=np.random.default_rng(0).random((8, 8, 8, 3), np.float32), y=np.arange(8) % 2)
        for arguments in (["patch", "net.py:build", "--to", "gn", "--input-shape", "3,8,8", "-o", "b"],
                          ["export", "b", "-o", "m.onnx"]):  # fmt: skip
            assert CliRunner().invoke(main, arguments).exit_code == 0
        return set(os.listdir())

    def test_of_a_command(self, made, name):
        """Exit code 2, and the name as Python writes it."""
        tune = ["finetune", "b", "--teacher", "none", "--steps", "1", "-o"]
        for arguments, suffix in (
            (["patch", "net.py:build", "--to", "gn", "-o"], ""),
            ([*tune[:-1], "--data", f"{NO_TEXT}/images", "-o"], ""),
            ([*tune[:-1], "--data", "x.npz", "-o"], ""),
            ([*tune[:-1], "--data", "x.npz", "--resume", "-o"], ""),
            (["export", "b", "-o"], ".onnx"),
            (["verify", "b", "m.onnx", "--save-reference"], ".npz"),
            (["plot", "b", "-o"], ".png"),
            (["report", "b", "-o"], ".html"),
            (["reproduce", "gn-fashion", "-o"], ""),
        ):
            result = CliRunner().invoke(main, [*arguments, f"{name}{suffix}"])
            assert (result.exit_code, result.stderr) == (2, f"error: {self.MESSAGE.format(name + suffix)}\n")
        result = CliRunner().invoke(main, ["finetune", "b", "-o", "out", "-c", name])
        assert result.exit_code == 2
        assert "expected a TOML file, received n" in result.stderr
        assert set(os.listdir()) == made

    def test_in_python(self, made, name):
        """The same."""
        model, example = normswap.load("b"), torch.zeros(2, 3, 8, 8)
        data = normswap.open_data("x.npz", read("b").preprocessing)
        for call in (
            lambda: normswap.save(model, name),
            lambda: normswap.to_onnx(model, name, example=example),
            lambda: normswap.verify(model, "m.onnx", data=[example], save_reference=name),
            lambda: finetune("b", name, data, Settings(steps=1)),
            lambda: finetune("b", name, data, Settings(steps=1), resume=True),
        ):
            with pytest.raises(OutputExistsError, match=exactly(self.MESSAGE.format(name))):
                call()
        source = f"{name}.py:build"
        with pytest.raises(InputError, match=exactly(f"expected a model as {FORMS}, received model={source!r}")):
            normswap.save(model, "new", source=source)
        spec = f"hf://me/net@{name}"
        with pytest.raises(InputError, match=exactly(f"expected {FORM}, received {spec}")):
            normswap.load(spec)
        assert set(os.listdir()) == made
