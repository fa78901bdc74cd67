"""Programs of torch.export: as modules, and their files read if trusted, patched, and found again by a bundle."""

import json
import shutil
from collections import OrderedDict
from functools import partial

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import normswap
from normswap.bundles.source import load_model
from normswap.cli import main
from normswap.data.preprocessing import preprocessing_of
from normswap.errors import InputError

from ..helpers import exactly
from .models import Residual, batch_norms, exported, patched, trained_


def untrusted(path):
    """The whole message about a file that is not trusted."""
    return (
        f"expected a model that is read without running code, received {path}, which torch.export unpickles; "
        "if you trust whoever made it, add --trust"
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a program, its data, a bundle patched from it, and that bundle's ONNX file."""
    path = tmp_path_factory.mktemp("programs")
    torch.manual_seed(0)
    program = torch.export.export(
        trained_(Residual()), (torch.zeros(2, 3, 12, 12),), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    torch.export.save(program, path / "net.pt2")
    rng = np.random.default_rng(0)
    np.savez(path / "data.npz", x=rng.integers(0, 255, (48, 12, 12, 3), np.uint8), y=rng.integers(0, 5, 48))
    for command in (
        ["patch", f"{path}/net.pt2", "--to", "gn", "--trust", "-o", f"{path}/gn"],
        ["export", f"{path}/gn", "--trust", "-o", f"{path}/gn.onnx"],
    ):
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 0, result.stderr
    return path


@pytest.fixture
def run(folder, monkeypatch):
    """A function that runs a command in the folder and returns exit code, JSON and stderr."""
    monkeypatch.chdir(folder)

    def invoke(*arguments):
        result = CliRunner().invoke(main, [*map(str, arguments), "--json"])
        return result.exit_code, json.loads(result.stdout), result.stderr

    return invoke


COMMANDS = [
    ["inspect", "net.pt2"],
    ["patch", "net.pt2", "--to", "gn", "-o", "new"],
    ["export", "net.pt2", "-o", "new"],
    ["evaluate", "net.pt2", "--data", "data.npz"],
    ["evaluate", "gn", "--data", "data.npz"],
    ["export", "gn", "-o", "new"],
    ["verify", "gn", "gn.onnx"],
    ["finetune", "gn", "--data", "data.npz", "--steps", "1", "-o", "new"],
]


@pytest.mark.parametrize("command", COMMANDS)
def test_without_trust_nothing_is_read(run, folder, monkeypatch, command):
    """Every command refuses with the way out and exit code 3, unread, for the file and for a bundle made of it."""
    monkeypatch.setattr(torch.export, "load", lambda path: pytest.fail("was read"))
    code, result, stderr = run(*command)
    path = folder / "net.pt2" if "gn" in command[1:2] else "net.pt2"

    assert (code, result["error"]) == (3, untrusted(path))
    assert stderr == f"error: {untrusted(path)}\n"
    assert not (folder / "new").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_with_trust_every_command_works(run, folder, tmp_path, command):
    """The input's shape is the program's own, so no option is needed but --trust."""
    code, _, stderr = run(*(tmp_path / "new" if part == "new" else part for part in command), "--trust")

    assert code == 0, stderr


def test_without_trust_in_python(folder):
    """The way out is the argument there."""
    message = untrusted(folder / "net.pt2").replace("--trust", "trust=True")
    for call in (partial(load_model, f"{folder}/net.pt2"), partial(normswap.load, folder / "gn")):
        with pytest.raises(InputError, match=exactly(message)):
            call()


def test_the_bundle_is_the_patched_program(run, folder):
    """A bundle loads to what was patched; its ONNX file says the same; distillation finds the original."""
    module = normswap.load(folder / "gn", trust=True)
    source = trained_(load_model(f"{folder}/net.pt2", trust=True))
    x = torch.randn(3, 3, 12, 12)

    assert batch_norms(module) == []
    torch.testing.assert_close(module(x), normswap.patch(source, "gn", example=x).model(x))
    assert normswap.verify(module, folder / "gn.onnx")
    assert run("finetune", "gn", "--data", "data.npz", "--distill", "--steps", 2, "--trust", "-o", "tuned")[0] == 0
    assert batch_norms(normswap.load(folder / "tuned", trust=True)) == []


def test_a_bundle_and_its_program_move_together(folder, tmp_path):
    """The program is found relative to the bundle, and is asked for where it is not."""
    for name in ("gn", "net.pt2"):
        (shutil.copytree if name == "gn" else shutil.copy)(folder / name, tmp_path / name)

    assert batch_norms(normswap.load(tmp_path / "gn", trust=True)) == []
    (tmp_path / "net.pt2").unlink()
    with pytest.raises(InputError, match=exactly(f"expected a file at {tmp_path}/net.pt2, received nothing there")):
        normswap.load(tmp_path / "gn", trust=True)


def test_a_bundle_without_a_source_takes_the_program(folder, tmp_path):
    """What was saved from Python is loaded into the program given, which needs no trust."""
    program = torch.export.load(folder / "net.pt2")
    report = normswap.patch(program, "sn")
    normswap.save(report, tmp_path / "sn")
    x = torch.randn(3, 3, 12, 12)

    assert torch.equal(normswap.load(tmp_path / "sn", model=program)(x), report.model.eval()(x))


def test_a_damaged_file(tmp_path):
    """A file that is no archive is told, before torch logs what it says of it."""
    (tmp_path / "net.pt2").write_bytes(b"no archive")
    message = (
        f"expected a program of torch.export in {tmp_path}/net.pt2, received a truncated archive, or a file of another "
        "kind"
    )
    with pytest.raises(InputError, match=exactly(message)):
        load_model(f"{tmp_path}/net.pt2", trust=True)


def test_weights_for_a_program(folder, tmp_path):
    """A state dict of the source fits the program."""
    other = trained_(Residual(), seed=5)
    torch.save(other.state_dict(), tmp_path / "other.pth")
    x = torch.randn(2, 3, 12, 12)

    torch.testing.assert_close(load_model(f"{folder}/net.pt2", tmp_path / "other.pth", trust=True)(x), other(x))


@pytest.mark.parametrize(("size", "shape"), [(12, (3, 12, 12)), (None, None)])
def test_the_input_shape_of_a_program(size, shape):
    """A program tells the shape of its input, unless it takes images of any size."""
    free = {0: torch.export.Dim("n")} | ({} if size else {2: torch.export.Dim("h"), 3: torch.export.Dim("w")})
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    module = torch.export.export(model, (torch.zeros(2, 3, 12, 12),), dynamic_shapes=(free,)).module()
    known = preprocessing_of(module)

    assert (None if known is None else known.shape) == shape


def test_dropout_obeys_the_mode(images):
    """A program exported in training mode can be used for inference."""
    source = trained_(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Dropout2d(0.5)))
    module = normswap.patch(exported(source.train(), images), "gn").model

    assert (module(images) == 0).float().mean() > 0.5
    torch.testing.assert_close(module.eval()(images), patched(source, "gn")(images))


@pytest.mark.parametrize("training", [False, True])
def test_each_layer_keeps_its_mode(images, training):
    """Layers exported in different modes, as a frozen BatchNorm in training, start in those."""
    source = trained_(nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5), nn.BatchNorm2d(3)))
    source[2].train(training)
    module = normswap.patch(exported(source, images), "brn").model
    modes = {name: module.get_submodule(name).training for name in ("", "0", "dropout", "2")}

    assert modes == {"": training, "0": False, "dropout": False, "2": training}


def test_a_block_called_as_the_dropout_in_it(images):
    """The module that a call of dropout becomes takes no other module's name."""
    block = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Dropout(0.5))
    model = nn.Sequential(OrderedDict(dropout=block, norm=nn.BatchNorm2d(4)))
    module = normswap.patch(exported(trained_(model), images), "gn").model

    torch.testing.assert_close(module(images), patched(model, "gn")(images))
    assert set(patched(model, "gn").state_dict()) == set(module.state_dict())
