"""The examples run, and what the pages say of them holds: each here in a shorter form."""

import copy
import importlib.util
import json
import re
import tomllib
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import normswap.demo.digits
import normswap.demo.torch
from normswap.cli import main as cli

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


def example(name):
    """Return an example as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _one_thread():
    """Networks of a few channels are slower on more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


once = {"digits": cache(normswap.demo.digits.digits), "trained": cache(normswap.demo.torch.trained)}


@pytest.fixture(autouse=True)
def _trained_once(monkeypatch):
    """The examples begin with the same two networks: train each once."""
    monkeypatch.setattr(normswap.demo.digits, "digits", once["digits"])
    monkeypatch.setattr(normswap.demo.torch, "trained", lambda data: copy.deepcopy(once["trained"](data)))


def test_every_option_of_finetune_is_in_the_pages():
    """Whoever looks for an option of finetune finds it in the page on the command line, and none that is not there."""
    section = (ROOT / "docs" / "cli.md").read_text().partition("## finetune")[2]
    options = {name for option in cli.commands["finetune"].params for name in (*option.opts, *option.secondary_opts)}

    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", section)) == {name for name in options if name.startswith("--")}


@pytest.mark.torch
class TestTorch:
    def test_two_images_a_step(self):
        """With two images a step at a high rate, anchored SN finds more digits than BatchNorm, frozen or not."""
        module = example("two_per_gpu")
        module.STEPS = 250
        found = {name: shares[0] for name, shares in module.main(rates=(0.1,), seed=2).items()}

        assert found["anchored SN"] > 3 + max(found["BatchNorm"], found["frozen BatchNorm"])

    @pytest.mark.slow
    def test_differential_privacy(self):
        """For the same epsilon a patched network comes further than the one that Opacus fixes, which starts anew."""
        rows = example("private").main(epochs=4)

        assert len({epsilon for _, _, epsilon in rows.values() if epsilon}) == 1
        for name in ("GroupNorm, patched", "anchored SN"):
            assert rows[name][0] > rows["BatchNorm"][0] - 3
            assert rows[name][1] > rows["Opacus's fix"][1] + 10

    def test_federated(self):
        """Where the clients' images differ in kind, averaged BatchNorms fail and norms of each sample do not."""
        after = {name: share for name, (_, share) in example("federated").main("cameras", rounds=7).items()}

        assert min(after["GroupNorm"], after["anchored SN"]) > after["BatchNorm"] + 10

    def test_streaming(self):
        """On single images anchored SN adapts where BatchNorm does not, and the adapted model's file is proved."""
        shares, proved = example("streaming").main("mirrored", count=500)

        assert shares["anchored SN"] > 3 + max(shares["BatchNorm"], shares["as it was"])
        assert proved

    def test_a_folder_of_pictures(self, tmp_path):
        """The network and the pictures it writes fit each other on the command line."""
        example("digits").main(tmp_path)
        weights, data = tmp_path / "network.safetensors", tmp_path / "test"
        options = ["--input-shape", "1,8,8", "--mean", "0.3", "--std", "0.38", "--json"]
        source = f"{EXAMPLES / 'digits.py'}:network"

        result = CliRunner().invoke(cli, ["evaluate", source, "--weights", str(weights), "--data", str(data), *options])

        assert result.exit_code == 0, result.output
        told = json.loads(result.stdout)
        assert told["n"] == 500
        assert told["top1"] > 97


@pytest.mark.torch
@pytest.mark.parametrize(("network", "recipe"), [("resnet50_v1", "step"), ("resnet50_v2", "cosine")])
def test_the_imagenet_recipes(tmp_path, network, recipe):
    """A folder a class is all that a recipe needs, and all that it says is what the run has."""
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.effect_noise((64, 64), 40).convert("RGB").save(tmp_path / "data" / name / "0.png")
    config, out = EXAMPLES / "imagenet" / f"{recipe}.toml", tmp_path / "out"
    model = f"{EXAMPLES}/imagenet/networks.py:{network}"
    small = {"size": 64, "workers": 0, "batch-size": 2, "steps": 1, "milestones": "0.3,0.6,0.9"}
    if recipe == "cosine":
        del small["milestones"]
    options = [part for name, value in small.items() for part in (f"--{name}", str(value))]
    data = ["--data", str(tmp_path / "data"), "--eval-data", str(tmp_path / "data")]

    result = CliRunner().invoke(cli, ["finetune", model, "-c", str(config), "-o", str(out), *data, *options])

    assert result.exit_code == 0, result.output
    said, had = (tomllib.loads(path.read_text()) for path in (config, out / "run" / "run.toml"))
    changed = {name for name in said if said[name] != had.get(name)}
    assert changed == {"epochs", "batch_size", "workers"} | ({"milestones"} if recipe == "step" else set())


@pytest.mark.keras
def test_keras_fit(monkeypatch):
    """Keras's ``fit`` takes a patched model on from where BatchNorm was, with the callback."""
    import normswap.demo.keras as network

    monkeypatch.setattr(network, "trained", partial(network.trained, steps=100))
    rows = example("keras_fit").main(count=200)

    assert rows["anchored SN"][0] == pytest.approx(rows["BatchNorm"][0], abs=3)
    assert rows["anchored SN"][1] > rows["anchored SN"][0] + 5
