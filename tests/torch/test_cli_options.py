"""Options nothing reads are errors, with a way out; those that are read say what the library is told."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from normswap.bundles import bundle
from normswap.bundles.opening import ModelOptions, Opened, require_read
from normswap.cli import main
from normswap.errors import UsageError, command_line

from ..helpers import exactly

CODE = """
from torch import nn

def build(): # its weights are others each time
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)).eval()

def normed():
    model = build()
    model[0] = nn.utils.weight_norm(model[0])
    return model

MODEL = build()

def same():
    return MODEL
"""
SHAPE = ["--input-shape", "3,8,8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a network, its weights, a bundle, an ONNX file and data."""
    path = tmp_path_factory.mktemp("options")
    (path / "net.py").write_text(CODE)
    namespace = {}
    exec(CODE, namespace)
    torch.save(namespace["build"]().state_dict(), path / "net.pth")
    rng = np.random.default_rng(0)
    np.savez(path / "data.npz", x=rng.integers(0, 255, (24, 8, 8, 3), np.uint8), y=rng.integers(0, 3, 24))
    model = [f"{path}/net.py:build", "--weights", f"{path}/net.pth"]
    for arguments in (["patch", *model, *SHAPE, "--to", "gn", "-o", f"{path}/gn"],
                      ["export", f"{path}/gn", "-o", f"{path}/gn.onnx", "--no-latency"]):  # fmt: skip
        assert CliRunner().invoke(main, arguments).exit_code == 0
    return path


@pytest.fixture
def run(folder, monkeypatch):
    """A function that runs a command in the folder and returns exit code and the last line of stderr."""
    monkeypatch.chdir(folder)

    def invoke(*arguments):
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        return result.exit_code, result.stderr.strip().splitlines()[-1]

    return invoke


OWN = "which tells its own, received"
OUT = "leave that out"
WEIGHTS = ["--weights", "net.pth"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "gn", *WEIGHTS], f"expected no --weights beside the bundle gn, {OWN} --weights net.pth; {OUT}"),
        (
            ["patch", "gn", *WEIGHTS, "--to", "gn", "-o", "new"],
            f"expected no --weights beside the bundle gn, {OWN} --weights net.pth; {OUT}",
        ),
        (
            ["export", "gn", *WEIGHTS, "-o", "new"],
            f"expected no --weights beside the bundle gn, {OWN} --weights net.pth; {OUT}",
        ),
        (
            ["verify", "gn", "gn.onnx", *WEIGHTS],
            f"expected no --weights beside the bundle gn, {OWN} --weights net.pth; {OUT}",
        ),
        (
            ["evaluate", "gn", *WEIGHTS, "--data", "data.npz"],
            f"expected no --weights beside the bundle gn, {OWN} --weights net.pth; {OUT}",
        ),
        (
            ["inspect", "gn.onnx", *WEIGHTS],
            f"expected no --weights beside the ONNX file gn.onnx, {OWN} --weights net.pth; {OUT}",
        ),
        (
            ["evaluate", "gn.onnx", *WEIGHTS, "--size", "8", "--data", "data.npz"],
            f"expected no --weights, --size beside the ONNX file gn.onnx, {OWN} --weights net.pth, --size 8; {OUT}",
        ),
        (
            ["evaluate", "gn.onnx", *SHAPE, "--data", "data.npz"],
            f"expected no --input-shape beside the ONNX file gn.onnx, {OWN} --input-shape 3,8,8; {OUT}",
        ),
        (
            ["evaluate", "gn.onnx", "--against", "gn", *WEIGHTS, "--data", "data.npz"],
            "expected no --weights beside the ONNX file gn.onnx and the bundle gn, which tell their own, "
            f"received --weights net.pth; {OUT}",
        ),
        (
            ["inspect", "net.py:build", *SHAPE, "--size", "8"],
            "expected one of --input-shape and --size, received --input-shape 3,8,8, --size 8",
        ),
        (
            ["export", "net.py:build", "--mean", "0.5,0.5,0.5", "--std", "0.3", "-o", "new"],
            "expected the shape of one image beside --mean 0.5,0.5,0.5, --std 0.3, received none: give --input-shape",
        ),
        (
            ["patch", "net.py:build", "--to", "gn", "--no-refit", "--calibration-size", "3", "-o", "new"],
            "expected --calibrate DATA beside what is said of it, received --calibration-size, --no-refit",
        ),
        (
            ["patch", "net.py:build", "--recipe", "gn/normswap.json", "--groups", "2", "--start", "warm", "-o", "new"],
            "expected a recipe that says what layers become, received --groups, --start",
        ),
        (
            ["patch", "net.py:build", "--to", "gn", "--trust", "-o", "new"],
            "expected a .pt2 file, or a bundle, for --trust, received net.py:build; leave that out",
        ),
        (
            ["evaluate", "gn.onnx", "--against", "net.py:build", "--trust", "--data", "data.npz"],
            "expected a .pt2 file, or a bundle, for --trust, received gn.onnx and net.py:build; leave that out",
        ),
        (
            ["evaluate", "gn.onnx", "--batch-size", "0", "--data", "data.npz"],
            "Invalid value for '--batch-size': expected a finite number above 0, received 0",
        ),
        (
            ["patch", "net.py:build", "--to", "gn", "--calibrate", "data.npz", "--calibration-size", "-3", "-o", "new"],
            "Invalid value for '--calibration-size': expected a finite number above 0, received -3",
        ),
        (
            ["patch", "net.py:build", "--recipe", "gn/normswap.json", "--no-equalize", "-o", "new"],
            "expected a recipe alone, which tells what layers in front of norms take, received --no-equalize beside "
            "it; leave that out",
        ),
        (
            ["patch", "net.py:build", "--recipe", "gn/normswap.json", "--equalize", "scale", "-o", "new"],
            "expected a recipe alone, which tells what layers in front of norms take, received --equalize scale beside "
            "it; leave that out",
        ),
        (
            ["patch", "net.py:build", "--to", "brn", "--equalize", "scale", "-o", "new"],
            "expected no word on layers in front, which --to brn leaves as they are, received --equalize",
        ),
        (
            ["patch", "gn", "--to", "bn", "--calibrate", "data.npz", "--no-equalize", "-o", "new"],
            "expected no word on layers in front, which --to bn leaves as they are, received --no-equalize",
        ),
        (
            ["finetune", "gn", "--data", "data.npz", "--resume", "--overwrite", "-o", "new"],
            "expected one of --resume and --overwrite, received both",
        ),
        (
            ["export", "net.py:build", *SHAPE, "--latency", "-o", "new"],
            "expected a bundle saved with its original beside --latency, received net.py:build; leave the option out",
        ),
    ],
)
def test_what_nothing_reads(run, folder, arguments, message):
    """The command exits 2, says so, and writes nothing."""
    code, last = run(*arguments)

    assert (code, last.partition(": ")[2]) == (2, message)
    assert not (folder / "new").exists()


def test_a_file_reads_mean_and_deviation(run, folder):
    """Of an ONNX file the images' mean and deviation may be said, which move its answers."""
    said = []
    for options in ([], ["--mean", "0.5", "--std", "0.01"]):
        result = CliRunner().invoke(main, ["evaluate", "gn.onnx", "--data", "data.npz", *options, "--json"])
        said.append(json.loads(result.stdout)["top1"])

    assert result.exit_code == 0
    assert len(said) == 2


def test_options_for_one_of_two(run):
    """Compared with a model that has a use for them, an ONNX file is no reason to refuse weights."""
    arguments = ["evaluate", "gn.onnx", "--against", "net.py:build", *WEIGHTS, *SHAPE, "--data", "data.npz"]

    assert run(*arguments)[0] == 0


def test_in_python_the_message_names_arguments():
    """The same refusal in the other voice."""
    with pytest.raises(UsageError, match=exactly(
        "expected no weights beside the ONNX file m.onnx, which tells its own, received weights='w.pth'; leave that out"
    )):  # fmt: skip
        require_read(ModelOptions(weights=Path("w.pth")), "m.onnx")


class TestTheOriginal:
    """`patch` keeps the model it patched, not another one that its source builds."""

    @pytest.mark.parametrize("name", ["build", "normed", "same"])
    def test_weights_of_a_source_without_a_seed(self, run, folder, tmp_path, name):
        """What is no norm's is the same in the model and its original."""
        code, last = run("patch", f"net.py:{name}", *SHAPE, "--to", "gn", "--calibrate", "data.npz", "--no-refit",
                         "--no-equalize", "-o", tmp_path / "b")  # fmt: skip
        assert code == 0, last
        model, original = (load_file(tmp_path / "b" / f"{which}.safetensors") for which in ("model", "original"))

        assert {key for key in original if key not in model} == {
            "1.running_mean", "1.running_var", "1.num_batches_tracked"
        }  # fmt: skip
        assert all(torch.equal(model[key], original[key]) for key in model if not key.startswith("1."))

    def test_a_source_that_cannot_be_copied(self, folder, monkeypatch):
        """It is built again, and given the weights of the first."""
        monkeypatch.chdir(folder)
        opened = Opened("net.py:build", ModelOptions())
        monkeypatch.setattr("normswap.bundles.opening.copy.deepcopy", raising)
        found, wanted = opened.copy().state_dict(), opened.model.state_dict()

        assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def raising(model):
    """What copying does where Python cannot."""
    raise RuntimeError("only leaves can be copied")


def test_a_bundle_without_its_original_is_exported(run, folder, tmp_path):
    """There is nothing to time it beside, and no need to."""
    bundle.save(replace(bundle.read(folder / "gn"), has_original=False), tmp_path / "b")

    assert run("export", tmp_path / "b", "--trust-code", "-o", tmp_path / "b.onnx")[0] == 0
    assert onnx.load(tmp_path / "b.onnx").producer_name == "normswap"


def test_what_is_typed_next(run, folder, tmp_path):
    """After an export comes the proof on images, with the model as it was named."""
    output = tmp_path / "m.onnx"
    code, last = run("export", "net.py:build", *WEIGHTS, *SHAPE, "--half", "-o", output)

    assert (code, last) == (0, f"next: normswap verify net.py:build --weights net.pth {output} --data DATA")


def test_voices():
    """Within a command the options are told as it takes them."""
    options = ModelOptions(input_shape=(3, 8, 8), trust=True)
    with command_line():
        assert options.told(*options.given()) == "--input-shape 3,8,8, --trust"
    assert options.told("input_shape") == "input_shape='3,8,8'"
