"""Training a network that no patch made and nobody trained, by the command line and by the library."""

import json
import tomllib

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import normswap
from normswap.bundles.bundle import unpatched
from normswap.bundles.source import load_model
from normswap.cli import main
from normswap.finetune import History

from .runs import PREPROCESSING, SETTINGS, HaltError, coloured, halt_at, quick, same, weights

NET = """
from torch import nn
from normswap.layers.torch import SwitchNorm2d


def bn():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


def sn():
    model = bn()
    model[1] = SwitchNorm2d(4)
    return model
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that runs `normswap finetune` on a network of random weights in a folder with data."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    data = coloured()
    np.savez("data.npz", x=data._images.images, y=data.labels)

    def invoke(model, *options):
        given = ["finetune", model, "--data", "data.npz", "--batch-size", 16, "--epochs", 2, "--json", *options]
        done = CliRunner().invoke(main, list(map(str, given)))
        return done.exit_code, json.loads(done.stdout) if done.stdout else None, done.stderr

    return invoke


SHAPE = ("--input-shape", "3,12,12", "--mean", "0.5", "--std", "0.3")


@pytest.mark.parametrize("norm", ["bn", "sn"])
def test_a_run(run, tmp_path, norm):
    """All learns from the labels from the first step on, and what comes out is a bundle like any other."""
    options = "--eval-data", "data.npz", "--optimizer", "adam", "--lr", 0.03
    code, result, err = run(f"net.py:{norm}", *SHAPE, *options, "-o", "out")
    kept = tomllib.loads((tmp_path / "out/run/run.toml").read_text())
    losses = [row["loss"] for row in History.of("out").epochs()]

    assert code == 0, err
    assert (kept["stages"], kept["teacher"], kept["bundle"]) == ("all", "none", f"net.py:{norm}")
    assert result["steps"] == 12
    assert result["original"] is None
    assert losses[1] < losses[0]
    model = normswap.load("out")
    assert type(model[1]).__name__ == {"bn": "BatchNorm2d", "sn": "SwitchNorm2d"}[norm]
    assert same(weights(tmp_path / "out"), {name: value.numpy() for name, value in model.state_dict().items()})
    for command in (["evaluate", "out", "--data", "data.npz"], ["export", "out", "-o", "out.onnx", "--no-latency"]):
        assert CliRunner().invoke(main, command).exit_code == 0
    assert CliRunner().invoke(main, ["plot", "out", "-o", "out.png"]).exit_code == 0


def test_the_seed_draws_the_weights(run, tmp_path):
    """A run that is repeated is the same from its first bit, and another seed is another network."""
    for name, seed in (("one", 3), ("two", 3), ("three", 4)):
        code, _, err = run("net.py:bn", *SHAPE, "--seed", seed, "-o", name)
        assert code == 0, err
    one, two, three = (weights(tmp_path / name / "run/checkpoints/step-000012") for name in ("one", "two", "three"))

    assert same(one, two)
    assert not same(one, three)
    assert run("net.py:bn", "-c", "one/run/run.toml", "--steps", 12, "--epochs", 2, "-o", "four")[0] == 2
    assert run("net.py:bn", *SHAPE, "--seed", 3, "-o", "one", "--resume")[0] == 0


def test_weights_of_a_file(run, tmp_path):
    """A model with weights of its own starts from those, whatever the seed."""
    torch.manual_seed(9)
    torch.save(load_model("net.py:bn").state_dict(), "net.pth")
    for name, seed in (("one", 0), ("two", 1)):
        code, _, err = run("net.py:bn", *SHAPE, "--weights", "net.pth", "--seed", seed, "-o", name)
        assert code == 0, err
    one, two = (weights(tmp_path / name / "run/checkpoints/step-000000") for name in ("one", "two"))

    assert same(one, two)
    assert tomllib.loads((tmp_path / "one/run/run.toml").read_text())["weights"] == "net.pth"


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ([*SHAPE, "--teacher", "original"], 3, "error: expected a patched model for its original, received net.py:bn, "
         "which no patch made; learn from labels: --teacher none"),
        ([], 3, "error: expected the shape of one image, received none: give --input-shape; models of other inputs are "
         "trained in Python"),
        ([*SHAPE, "--stages", "calibrate,all"], 3, "error: expected a patched model for its original, received "
         "net.py:bn, which no patch made; learn from labels: --teacher none"),
    ],
)  # fmt: skip
def test_refusals(run, tmp_path, options, code, message):
    """What needs the model before a patch, or the shape of images, is told."""
    found, _, err = run("net.py:bn", *options, "-o", "out")

    assert (found, err.splitlines()[-1]) == (code, message)
    assert not (tmp_path / "out").exists()


def test_in_the_library(tmp_path):
    """A model at hand is trained as `unpatched`, and a run that is halted goes on bit for bit."""
    (tmp_path / "net.py").write_text(NET)
    data = coloured()

    def bundle():
        torch.manual_seed(0)
        return unpatched(load_model(f"{tmp_path}/net.py:sn"), f"{tmp_path}/net.py:sn", PREPROCESSING)

    quick(bundle(), tmp_path / "whole", data, SETTINGS)
    with pytest.raises(HaltError):
        quick(bundle(), tmp_path / "parts", data, SETTINGS, on_step=halt_at(5))
    quick(bundle(), tmp_path / "parts", data, SETTINGS, resume=True)

    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
