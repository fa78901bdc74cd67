"""The gates in files of weights, as `normswap plot` draws them, without a network to load them into."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import normswap
from normswap.cli import main
from normswap.convert.gates import softmax
from normswap.finetune.run.figures import gates
from normswap.interop.gates import gates_in

from ..test_keras_h5 import file_of, switch_norm
from .test_switchablenorms import network, published


def switched():
    """A patched network with gates of its own in both layers, one at another temperature, one hard."""
    torch.manual_seed(0)
    rest = [nn.ReLU() for _ in range(6)]
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), *rest, nn.BatchNorm2d(4)
    model = normswap.patch(nn.Sequential(*layers), "sn").model
    for index, temperature in ((1, 0.5), (3, 0.0), (10, 1.0)):
        with torch.no_grad():
            model[index].mean_weight.normal_(), model[index].var_weight.normal_()
        model[index].temperature = temperature
    return model


def as_lists(found):
    return {name: {"mean": mean.tolist(), "variance": var.tolist()} for name, (mean, var) in found.items()}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_models_own(tmp_path, suffix):
    """A state dict has the gates that the model has, its temperatures heeded, in the order of the layers."""
    model, path = switched(), tmp_path / f"net{suffix}"
    if suffix == ".pth":
        torch.save(model.state_dict(), path)
    else:
        from safetensors.torch import save_file

        save_file(model.state_dict(), path)
    found, expected = gates_in(path), gates(model)

    assert list(found) == list(expected) == ["1", "3", "10"]
    for name, pair in expected.items():
        np.testing.assert_allclose(found[name], pair, rtol=1e-6)


def test_switchablenorms(tmp_path):
    """Published checkpoints have three gates, two without batch statistics, and of a 1d layer's two no instance's."""
    layers = {"layer1.sn1": published(), "layer1.sn2": published(moving=False, seed=1), "head": published(1, seed=2)}
    state = {name: torch.from_numpy(np.array(array)) for name, array in network(**layers).items()}
    torch.save({"state_dict": state}, tmp_path / "net.pth")
    found = gates_in(tmp_path / "net.pth")

    assert {name: (len(mean), len(var)) for name, (mean, var) in found.items()} == {
        "layer1.sn1": (3, 3), "layer1.sn2": (2, 2), "head": (3, 3)
    }  # fmt: skip
    for name in ("layer1.sn1", "layer1.sn2"):
        logits = layers[name]["mean_weight"], layers[name]["var_weight"]
        np.testing.assert_allclose(found[name], [softmax(each) for each in logits], rtol=1e-5)
    np.testing.assert_allclose(found["head"][0], [0, *softmax(layers["head"]["mean_weight"])], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("group", ["/", "model_weights"])
def test_keras_switchnorm(tmp_path, group):
    """Its files, of weights or a whole model, have theirs by the layers' names."""
    layers = {name: switch_norm(name) for name in ("switch_normalization_1", "switch_normalization_2")}
    layers["switch_normalization_2"]["switch_normalization_2/variance_weights:0"] *= -2
    file_of(tmp_path / "net.h5", layers, group=group)
    found = gates_in(tmp_path / "net.h5")

    assert list(found) == list(layers)
    for name, weights in layers.items():
        logits = [next(a for key, a in weights.items() if part in key) for part in ("mean_w", "variance_w")]
        np.testing.assert_allclose(found[name], [softmax(each) for each in logits], rtol=1e-6)


class TestCommand:
    def invoke(self, *arguments):
        return CliRunner().invoke(main, ["plot", *map(str, arguments), "--json"])

    def test_a_checkpoint(self, tmp_path):
        """Its gates are drawn and told, as those of the model are."""
        torch.save(switched().state_dict(), tmp_path / "net.pth")
        done = self.invoke(tmp_path / "net.pth", "-o", tmp_path / "o.png")

        assert done.exit_code == 0, done.stderr
        assert json.loads(done.stdout)["gates"] == as_lists(gates_in(tmp_path / "net.pth"))
        assert (tmp_path / "o.png").stat().st_size > 10_000

    def test_a_model(self, tmp_path):
        """A model of a file of code is built, and has its own drawn."""
        code = "from normswap.layers.torch import SwitchNorm2d\n\n\ndef build():\n    return SwitchNorm2d(3)\n"
        (tmp_path / "net.py").write_text(code)
        done = self.invoke(f"{tmp_path}/net.py:build", "-o", tmp_path / "o.png")

        assert done.exit_code == 0, done.stderr
        assert len(json.loads(done.stdout)["gates"]) == 1

    def test_weights_without_gates(self, tmp_path):
        """They are named."""
        torch.save(nn.Conv2d(1, 1, 1).state_dict(), tmp_path / "net.pth")
        done = self.invoke(tmp_path / "net.pth", "-o", tmp_path / "o.png")

        message = (
            f"error: expected a bundle with curves or gates, received {tmp_path}/net.pth without; `normswap finetune` "
            "writes curves, and `normswap patch --to sn` makes layers with gates"
        )
        assert (done.exit_code, done.stderr.splitlines()[-1]) == (4, message)

    @pytest.mark.parametrize("content", [b"", b"no weights at all", b"\x80\x02}q\x00X\x01"])
    def test_a_file_of_another_kind(self, tmp_path, content):
        """What holds no weights is refused as such, and no picture is left."""
        (tmp_path / "net.pth").write_bytes(content)
        done = self.invoke(tmp_path / "net.pth", "-o", tmp_path / "o.png")

        assert done.exit_code == 3, done.stderr
        assert not (tmp_path / "o.png").exists()
