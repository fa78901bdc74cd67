"""What is told of a PyTorch model while it is fine-tuned: gates, clipping, drift; and `normswap plot`."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import normswap
from normswap.cli import main
from normswap.finetune.run.figures import Clipping, drift, gates
from normswap.finetune.run.journal import Journal
from normswap.layers.torch import BatchRenorm2d, SwitchNorm2d


def renormed(**options):
    """A network with two Batch Renormalizations of different widths and limits, in training."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3),
        BatchRenorm2d(16, r_max=1.1, d_max=0.3, **options),
        nn.ReLU(),
        nn.Conv2d(16, 8, 3),
        BatchRenorm2d(8, r_max=1.5, d_max=0.5, **options),
    ).train()


def clipped(layer, x):
    """Whether the limits clip each channel of a layer's input, by the definition of r and d."""
    x = x.detach().double().transpose(0, 1).flatten(1)
    sigma = (layer.running_var.double() + layer.eps).sqrt()
    r = (x.var(1, correction=0) + layer.eps).sqrt() / sigma
    d = (x.mean(1) - layer.running_mean) / sigma
    return ((r > layer.r_max) | (r < 1 / layer.r_max) | (d.abs() > layer.d_max)).tolist()


def shares(model, run, steps=6):
    """Return the share that is told of each step, and that by the definition."""
    told, true, seen = [], [], []
    handles = [
        layer.register_forward_pre_hook(lambda layer, inputs: seen.extend(clipped(layer, inputs[0])))
        for layer in model
        if isinstance(layer, BatchRenorm2d)
    ]
    clipping = Clipping(model)
    for step in range(steps):
        x = (1 + step % 3 / 5) * torch.randn(4, 3, 10, 10) + step / 10
        seen.clear()
        clipping.on_step(step)
        run(x)
        told.append(clipping.share())
        true.append(np.mean(seen))
    for handle in handles:
        handle.remove()
    return told, true


class TestClipping:
    @pytest.mark.parametrize("momentum", [0.01, 0.5, None])
    def test_it_is_what_the_layers_do(self, momentum):
        """The share follows exactly from what a step leaves in the statistics, whatever their momentum."""
        model = renormed(momentum=momentum)
        for _ in range(5):
            model(torch.randn(4, 3, 10, 10))
        told, true = shares(model, model)

        assert told == true
        assert min(true) < max(true)

    def test_function_transforms(self):
        """It is told of a pass through `torch.func` too, where a layer could keep nothing by itself."""
        model = renormed()
        state = dict(model.named_parameters()), dict(model.named_buffers())
        told, true = shares(model, lambda x: torch.func.functional_call(model, state, (x,)))

        assert told == true

    def test_limits_of_plain_batch_norm(self):
        """At limits of 1 and 0 every channel is clipped, at wide ones none."""
        model = renormed()
        for r_max, d_max, share in ((1.0, 0.0, 1.0), (1e6, 1e6, 0.0)):
            for layer in (model[1], model[4]):
                layer.set_limits(r_max, d_max)

            assert shares(model, model, steps=1)[0] == [share]

    def test_layers_that_stood_still(self):
        """Layers in eval mode take no part; without any in training there is nothing to tell."""
        model = renormed()
        model[1].eval()
        clipping = Clipping(model)
        clipping.on_step(0)
        x = torch.randn(4, 3, 10, 10)
        model(x)
        with torch.no_grad():
            true = np.mean(clipped(renormed()[4], model[:4](x)))

        assert clipping.share() == true
        model.eval()
        clipping.on_step(1)
        model(x)
        assert clipping.share() is None

    def test_several_passes(self):
        """Of passes over one and the same batch it tells what it tells of one."""
        model = renormed(momentum=0.1)
        x = 1.5 * torch.randn(4, 3, 10, 10)
        model[0](x)
        found = []
        for passes in (1, 3):
            twin = renormed(momentum=0.1)
            clipping = Clipping(twin, passes=passes)
            clipping.on_step(0)
            for _ in range(passes):
                twin[1](twin[0](x))
            found.append(clipping.share())

        assert found[0] == found[1] > 0

    @pytest.mark.parametrize("model", [nn.Linear(2, 2), SwitchNorm2d(4)])
    def test_no_batch_renormalization(self, model):
        """A model without has no share."""
        clipping = Clipping(model)
        clipping.on_step(0)

        assert clipping.share() is None

    def test_before_the_first_step(self):
        """Without a look before there is nothing to tell."""
        assert Clipping(renormed()).share() is None


class TestGates:
    def test_by_name(self, model):
        """Every layer's gates come under its name, as weights in the order instance, layer, batch."""
        normswap.patch(model, "sn")
        model.bn.var_weight.data = torch.tensor([1000.0, 0.0, 0.0])
        found = gates(model)

        assert list(found) == ["stem.1", "bn"]
        np.testing.assert_array_equal(found["bn"][1], [1, 0, 0])
        assert all(part.sum() == pytest.approx(1) for pair in found.values() for part in pair)

    def test_without_batch_statistics(self, model):
        """Two gates are two."""
        normswap.patch(model, normswap.SwitchNorm(batch_statistics="none"))

        assert {part.shape for pair in gates(model).values() for part in pair} == {(2,)}

    def test_a_model_without(self, model):
        """A model without Switchable Normalization has none."""
        assert gates(model) == {}


class TestDrift:
    def test_a_share_of_the_teachers_spread(self):
        """It is the distance of the logits as a share of the teacher's, both about their sample's mean."""
        teacher = np.array([[1.0, -1.0], [2.0, -2.0]])

        assert drift(1.5 * teacher, teacher) == pytest.approx(0.5)
        assert drift(np.zeros((2, 2)), teacher) == pytest.approx(1)

    def test_what_a_softmax_does_not_see(self):
        """A number added to all of a sample's logits is no drift."""
        teacher = np.random.default_rng(0).normal(size=(5, 10)).astype(np.float32)

        assert drift(teacher + np.arange(5)[:, None], teacher) < 1e-6
        assert drift(teacher, teacher) == 0

    def test_a_constant_teacher(self):
        """Beside logits that tell no classes apart, all that does is infinitely far."""
        assert drift(np.ones((2, 3)), np.zeros((2, 3))) == 0
        assert drift(np.eye(3), np.zeros((3, 3))) == float("inf")


CODE = """
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a bundle with gates, and one without."""
    path = tmp_path_factory.mktemp("plot")
    (path / "net.py").write_text(CODE)
    for target in ("sn", "gn"):
        arguments = [f"{path}/net.py:build", "--input-shape", "3,8,8", "--to", target, "-o", f"{path}/{target}"]
        assert CliRunner().invoke(main, ["patch", *arguments]).exit_code == 0
    return path


class TestPlot:
    @pytest.fixture
    def run(self, folder, tmp_path, monkeypatch):
        """A function that runs `normswap plot` in the folder; outputs named "out" lie in a fresh one."""
        monkeypatch.chdir(folder)

        def run(*arguments):
            return CliRunner().invoke(main, ["plot", *(str(a).replace("out", f"{tmp_path}/out") for a in arguments)])

        return run

    @pytest.mark.parametrize(("suffix", "begin"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
    def test_a_picture(self, run, tmp_path, suffix, begin):
        """The suffix says which picture is written; the JSON holds the gates that are on it."""
        done = run("sn", "-o", f"out{suffix}", "--json")
        said = json.loads(done.stdout)

        assert (done.exit_code, said["bundle"], said["output"]) == (0, "sn", f"{tmp_path}/out{suffix}")
        assert sum(said["gates"]["1"]["variance"]) == pytest.approx(1)
        assert (tmp_path / f"out{suffix}").read_bytes().startswith(begin)

    def test_an_output_that_exists(self, run, tmp_path):
        """It is kept, unless it may be overwritten."""
        (tmp_path / "out.png").write_text("mine")
        done = run("sn", "-o", "out.png")

        assert done.exit_code == 2
        assert (
            done.stderr
            == f"error: expected an output path that does not exist, received {tmp_path}/out.png; add --overwrite\n"
        )
        assert (tmp_path / "out.png").read_text() == "mine"
        assert run("sn", "-o", "out.png", "--overwrite").exit_code == 0
        assert (tmp_path / "out.png").stat().st_size > 1000

    def test_curves(self, run, folder, tmp_path):
        """A bundle without gates has a picture once a run has written its curves."""
        done = run("gn", "-o", "out.png")
        assert done.exit_code == 4
        assert done.stderr == (
            "error: expected a bundle with curves or gates, received gn without; `normswap finetune` writes curves, "
            "and `normswap patch --to sn` makes layers with gates\n"
        )
        assert not list(tmp_path.iterdir())
        with Journal(folder / "gn" / "run") as journal:
            journal.row(1, loss=1.0)

        assert run("gn", "-o", "out.png").exit_code == 0

    @pytest.mark.parametrize("output", ["out.gif", "out"])
    def test_an_unknown_suffix(self, run, tmp_path, output):
        """A format that cannot be written is a wrong use, told before the bundle is read."""
        done = run("nothing", "-o", output)

        assert done.exit_code == 2
        assert done.stderr.splitlines()[-1] == (
            f"Error: Invalid value for '-o': expected a file ending in .png, .svg, .pdf, received {tmp_path}/{output}"
        )
