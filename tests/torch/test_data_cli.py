"""The commands with images from the `datasets` library, and with images no model can learn from."""

import json

import datasets
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from normswap.cli import main

CODE = """
from torch import nn

def build():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
                          nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    model.pretrained_cfg = {"input_size": (3, 8, 8), "interpolation": "bicubic", "crop_pct": 0.8}
    return model
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that runs a command beside a network and two class folders, and returns code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "net.py").write_text(CODE)
    namespace = {}
    exec(CODE, namespace)
    torch.manual_seed(0)
    torch.save(namespace["build"]().state_dict(), tmp_path / "net.pth")
    random = np.random.default_rng(0)
    for index in range(18):
        path = tmp_path / "images" / "abc"[index % 3]
        path.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (20, 30, 3), np.uint8)).save(path / f"{index:02}.png")

    def invoke(*arguments):
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        return result.exit_code, result.stdout, result.stderr

    return invoke


def test_a_data_set_serves_every_command(run, tmp_path):
    """`patch --calibrate`, `verify --data` and `evaluate` take hf:, and answer as on the folder itself."""
    answers = []
    for name, data in (("a", "images"), ("b", "hf:images[train]")):
        patched = run("patch", "net.py:build", "--weights", "net.pth", "--to", "gn", "--calibrate", data, "-o", name)
        code, out, _ = run("evaluate", name, "--data", data, "--json")
        found = json.loads(out)
        answers.append((found["top1"], found["top5"], found["n"], (tmp_path / name / "model.safetensors").read_bytes()))
        assert (patched[0], code) == (0, 0)

    assert answers[0] == answers[1]
    assert answers[0][2] == 18
    assert run("export", "b", "-o", "b.onnx")[0] == 0
    assert run("verify", "b", "b.onnx", "--data", "hf:images[train]")[0] == 0


def test_how_a_model_sees_images_goes_into_its_bundle(run, tmp_path):
    """Interpolation and crop of the source are kept in the bundle."""
    assert run("patch", "net.py:build", "--weights", "net.pth", "--to", "gn", "-o", "b")[0] == 0
    known = json.loads((tmp_path / "b" / "normswap.json").read_text())["preprocessing"]

    assert (known["interpolation"], known["crop"], known["crop_mode"]) == ("bicubic", 0.8, "center")


def test_a_class_that_is_missing(run, tmp_path):
    """`evaluate` says once that labels of other folders may not be the model's, and which they are."""
    for file in (*(tmp_path / "images/b").iterdir(), tmp_path / "images/b"):
        file.unlink() if file.is_file() else file.rmdir()
    options = "--weights", "net.pth", "--data", "images", "--batch-size", 4, "--json"
    code, _, err = run("evaluate", "net.py:build", *options)

    message = "expected 3 classes, as many as the model has scores, received 2: label 0 is 'a', 1 is 'c'"
    assert (code, [line for line in err.splitlines() if line.startswith("warning")]) == (0, [f"warning: {message}"])


def test_a_class_without_images(run, tmp_path):
    """Its folder keeps the labels of the classes after it: the labels are the model's, and that is all it says."""
    for file in (tmp_path / "images/b").iterdir():
        file.unlink()
    code, out, err = run("evaluate", "net.py:build", "--weights", "net.pth", "--data", "images", "--json")

    message = "expected images in every class folder of images, received none in 1 of 3, which keep their labels: b"
    assert (code, [line for line in err.splitlines() if line.startswith("warning")]) == (0, [f"warning: {message}"])
    assert json.loads(out)["n"] == 12


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("hf:images[val]",
         "expected a data set to load, received data=hf:images[val]: "
         "Unknown split \"val\". Should be one of ['train']."),
        ("images/a", "expected at least two class folders in images/a, received 0"),
    ],
)  # fmt: skip
def test_data_that_cannot_be(run, data, message):
    """The command exits 3 and says what was received."""
    code, out, err = run("evaluate", "net.py:build", "--weights", "net.pth", "--data", data)

    assert (code, out, err.strip()) == (3, "", f"error: {message}")
