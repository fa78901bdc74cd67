"""`normswap patch --to bn` at the command line: what it tells, what its bundle is good for, and what it refuses."""

import json

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner

from normswap.cli import main

CODE = """
import torch
from torch import nn

def build(norm=nn.BatchNorm2d):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), norm(8), nn.ReLU(), nn.Conv2d(8, 8, 3), norm(8), nn.ReLU(),
                          nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    model.pretrained_cfg = {"input_size": (3, 8, 8), "mean": (0.5, 0.5, 0.5), "std": (0.3, 0.3, 0.3)}
    return model

def grouped():
    return build(lambda channels: nn.GroupNorm(2, channels))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with networks, images and a bundle of one network as gn."""
    path = tmp_path_factory.mktemp("cli")
    (path / "net.py").write_text(CODE)
    rng = np.random.default_rng(0)
    np.savez(path / "data.npz", x=rng.integers(0, 255, (48, 8, 8, 3), np.uint8), y=rng.integers(0, 3, 48))
    np.savez(path / "few.npz", x=rng.integers(0, 255, (8, 8, 8, 3), np.uint8))
    assert CliRunner().invoke(main, ["patch", f"{path}/net.py:build", "--to", "gn", "-o", f"{path}/gn"]).exit_code == 0
    return path


@pytest.fixture
def run(folder, monkeypatch):
    """A function that runs a command in the folder and returns exit code, stdout and stderr."""
    monkeypatch.chdir(folder)

    def invoke(*arguments):
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        return result.exit_code, result.stdout, result.stderr

    return invoke


@pytest.mark.parametrize("model", ["gn", "net.py:grouped"])
def test_the_way_back(run, folder, tmp_path, model):
    """A bundle or a model becomes a bundle that loads, scores, exports to a file without norms, and tells its drop."""
    bundle = tmp_path / "bn"
    code, out, err = run("patch", model, "--to", "bn", "--calibrate", "data.npz", "-o", bundle, "--json")
    told = json.loads(out)

    assert (code, told["replaced"], told["skipped"]) == (0, ["1", "4"], [])
    assert [drop["name"] for drop in told["drops"]] == ["1", "4"]
    assert all(0 < drop["before"] <= 1.001 * drop["after"] < 1 for drop in told["drops"])
    assert [each["name"] for each in told["drift"]] == ["1", "4", "output"]
    assert told["recipe"] == json.loads((bundle / "normswap.json").read_text())["recipe"]
    assert {site["target"]["kind"] for site in told["recipe"]["sites"]} == {"bn"}
    assert "expected 256 images to fit BatchNorms to, received 36 beside 12 to judge them by" in err

    assert run("evaluate", bundle, "--data", "data.npz")[0] == 0
    code, out, _ = run("export", bundle, "-o", tmp_path / "bn.onnx", "--json")
    assert (code, json.loads(out)["folded"]) == (0, {"1": "Conv", "4": "Conv"})
    assert not [node for node in onnx.load(tmp_path / "bn.onnx").graph.node if "Norm" in node.op_type]


def test_its_table(run):
    """People see the drop of each layer beside the measured drift, and what to type next."""
    bundle = "shown"
    code, _, err = run("patch", "gn", "--to", "bn", "--calibrate", "data.npz", "--calibration-size", 32, "-o", bundle)
    lines = err.splitlines()

    assert code == 0
    assert lines[1].split() == ["name", "type", "C", "shape", "becomes", "measured", "drop", "after", "folds"]
    assert lines[3].split()[:5] == ["1", "GroupNorm", "8", "8x8", "bn"]
    assert "drop: share of a norm's deviation that its line does not explain; after: in the new model" in lines
    assert lines[-2:] == [
        f"next: normswap evaluate {bundle} --data DATA",
        f"next: normswap export {bundle} -o {bundle}.onnx",
    ]


def test_its_recipe_replays(run, folder, tmp_path):
    """The output of --json is a recipe for a fresh copy: with the same images the weights are the same bit for bit."""
    images = ["--calibrate", "data.npz"]
    _, out, _ = run("patch", "net.py:grouped", "--to", "bn", *images, "-o", tmp_path / "bn", "--json")
    (tmp_path / "recipe.json").write_text(out)
    code, *_ = run("patch", "net.py:grouped", "--recipe", tmp_path / "recipe.json", *images, "-o", tmp_path / "again")

    assert code == 0
    assert (tmp_path / "bn/model.safetensors").read_bytes() == (tmp_path / "again/model.safetensors").read_bytes()


def test_what_stays_another_norm_is_kept(run, tmp_path):
    """A bundle some of whose norms were left loads with those as they were."""
    kept, code = tmp_path / "kept", 0
    code, out, _ = run("patch", "gn", "--to", "bn", "--exclude", "4", "--calibrate", "data.npz", "-o", kept, "--json")

    assert code == 0
    assert [(site["name"], site["target"]["kind"]) for site in json.loads(out)["recipe"]["sites"]] == [
        ("4", "gn"),
        ("1", "bn"),
    ]
    found = json.loads(run("inspect", kept, "--json")[1])["sites"]
    assert {site["name"]: site["patched_to"] for site in found} == {"1": "bn", "4": "gn"}
    assert run("patch", kept, "--to", "bn", "--calibrate", "data.npz", "-o", tmp_path / "all")[0] == 0


def test_and_there_again(run, tmp_path):
    """A model whose own norms went the way back can become another norm, in a bundle that loads."""
    bundles = tmp_path / "bn", tmp_path / "sn"
    assert run("patch", "net.py:grouped", "--to", "bn", "--calibrate", "data.npz", "-o", bundles[0])[0] == 0
    assert run("patch", bundles[0], "--to", "sn", "-o", bundles[1])[0] == 0
    found = json.loads(run("inspect", bundles[1], "--json")[1])["sites"]
    recipe = json.loads((bundles[1] / "normswap.json").read_text())["recipe"]

    assert [site["patched_to"] for site in found] == ["sn", "sn"]
    assert [site["source"] for site in recipe["sites"]] == ["GroupNorm", "GroupNorm"]


def test_dry_run(run):
    """The plan is shown without images, which the command to type next asks for."""
    code, _, err = run("patch", "gn", "--to", "bn", "--dry-run")

    assert code == 0
    assert err.splitlines()[-1] == "next: normswap patch gn --to bn --calibrate DATA -o gn-bn"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ["gn"],
            2,
            "expected --calibrate DATA to fit BatchNorms to, which 2 norms (first: 1) cannot do without, received "
            "none; a few hundred images without labels do",
        ),
        (
            ["gn", "--calibrate", "data.npz", "--no-refit"],
            2,
            "expected no word on convolutions, which --to bn leaves as they are, received --no-refit",
        ),
        (
            ["gn", "--calibrate", "few.npz"],
            3,
            "expected at least 16 inputs to fit BatchNorms to, received 6; give more: 256 are good",
        ),
        (
            ["net.py:build", "--calibrate", "data.npz"],
            4,
            "expected a model with norms to make BatchNorms of, received 2 norms, all skipped (a BatchNorm already)",
        ),
    ],
)
def test_refusals(run, tmp_path, arguments, code, message):
    """What is missing or does not fit is told with its exit code, and no output is left."""
    found, _, err = run("patch", *arguments, "--to", "bn", "-o", tmp_path / "bn")

    assert (found, err.strip().splitlines()[-1].lower()) == (code, f"error: {message}".lower())
    assert not (tmp_path / "bn").exists()


def test_weights_of_a_patched_network(run, folder, tmp_path):
    """They have no model to go back from: the bundle they make has."""
    torch.save({"0.weight": torch.zeros(8, 3, 3, 3), "1.mean_weight": torch.ones(3)}, tmp_path / "sn.pth")
    arguments = ["net.py:build", "--weights", tmp_path / "sn.pth", "--calibrate", "data.npz", "-o", tmp_path / "bn"]
    code, _, err = run("patch", *arguments, "--to", "bn")

    assert code == 2
    assert (
        "expected a bundle or a model's own weights with --to bn, received those of a patched network: "
        f"{tmp_path / 'sn.pth'}; patch the model with them first"
    ) in err
