"""The command line, as people and scripts use it."""

import json
import shutil

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx import numpy_helper

from normswap.cli import main

CODE = """
import torch
from torch import nn

def build():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
                          nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    model.pretrained_cfg = {"input_size": (3, 8, 8), "mean": (0.5, 0.5, 0.5), "std": (0.3, 0.3, 0.3)}
    return model

def without():
    return nn.Linear(2, 2)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a network, its weights, data, a bundle and its ONNX file."""
    path = tmp_path_factory.mktemp("cli")
    (path / "net.py").write_text(CODE)
    namespace = {}
    exec(CODE, namespace)
    torch.manual_seed(0)
    model = namespace["build"]()
    model[1].running_mean.uniform_(-1, 1)
    model[1].running_var.uniform_(0.5, 2)
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, path / "net.pth")
    rng = np.random.default_rng(0)
    np.savez(path / "data.npz", x=rng.integers(0, 255, (48, 8, 8, 3), np.uint8), y=rng.integers(0, 3, 48))
    model_arguments = [f"{path}/net.py:build", "--weights", f"{path}/net.pth"]
    assert CliRunner().invoke(main, ["patch", *model_arguments, "--to", "gn", "-o", f"{path}/gn"]).exit_code == 0
    assert CliRunner().invoke(main, ["export", f"{path}/gn", "-o", f"{path}/gn.onnx"]).exit_code == 0
    return path


@pytest.fixture
def run(folder, monkeypatch):
    """A function that runs a command in the folder and returns exit code, stdout and stderr."""
    monkeypatch.chdir(folder)

    def invoke(*arguments):
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        return result.exit_code, result.stdout, result.stderr

    return invoke


MODEL = ("net.py:build", "--weights", "net.pth")


class TestCommands:
    def test_inspect(self, run):
        """The BatchNorms are listed with width, shape and what replacing each is expected to change."""
        code, out, _ = run("inspect", *MODEL, "--json")
        (site,) = json.loads(out)["sites"]
        drift = site.pop("drift")

        assert code == 0
        assert 0 < drift["sn"] < drift["gn"] < drift["in"] < 1
        assert [site] == [
            {
                "name": "1",
                "aliases": [],
                "type": "BatchNorm2d",
                "channels": 8,
                "shape": [8, 8],
                "patched_to": None,
                "obstacle": "",
            }
        ]

    @pytest.mark.parametrize(
        "options",
        [
            ["--to", "sn", "--start", "even", "--batch-statistics", "frozen"],
            ["--to", "brn"],
            ["--to", "gn", "--groups", "4"],
            ["--to", "ln"],
            ["--to", "in", "--calibrate", "data.npz"],
        ],
    )
    def test_patch_export_evaluate(self, run, tmp_path, options):
        """Each target goes from bundle to ONNX file with the same accuracy in both."""
        code, out, err = run("patch", *MODEL, *options, "-o", tmp_path / "b", "--json")
        assert code == 0, err
        patched = json.loads(out)
        assert (patched["schema_version"], patched["replaced"], patched["skipped"]) == (1, ["1"], [])
        assert patched["output"] == str(tmp_path / "b")
        code, out, err = run("export", tmp_path / "b", "-o", tmp_path / "m.onnx", "--json")
        assert code == 0, err
        assert json.loads(out)["verdict"]["passed"] is True

        found = [json.loads(run("evaluate", m, "--data", "data.npz", "--json")[1]) for m in
                 (tmp_path / "b", tmp_path / "m.onnx")]  # fmt: skip

        assert found[0]["top1"] == found[1]["top1"]
        assert found[0]["n"] == 48

    def test_dry_run(self, run, tmp_path):
        """The plan is shown and nothing is written."""
        code, out, err = run("patch", *MODEL, "--to", "gn", "-o", tmp_path / "b", "--dry-run")

        assert (code, out) == (0, "")
        assert "BatchNorm2d" in err
        assert not (tmp_path / "b").exists()

    def test_a_recipe_is_replayed(self, run, tmp_path):
        """The output of a dry run, kept as a file, is a recipe that makes the same bundle."""
        text = run("patch", *MODEL, "--to", "gn", "--groups", "2", "--dry-run", "--json")[1]
        (tmp_path / "recipe.json").write_text(text)
        code, out, err = run("patch", *MODEL, "--recipe", tmp_path / "recipe.json", "-o", tmp_path / "b", "--json")

        assert code == 0, err
        assert json.loads(out)["recipe"] == json.loads(text)["recipe"]

    def test_rules(self, run, tmp_path):
        """A hand-written recipe is resolved: the bundle holds exact sites, which replay to the same weights."""
        rule = {"match": "re:\\d+", "depth": [0, 1], "stage": 0, "target": {"kind": "gn", "groups": 2}}
        rules = {"schema_version": 1, "rules": [rule]}
        (tmp_path / "rules.json").write_text(json.dumps(rules))
        code, out, err = run("patch", *MODEL, "--recipe", tmp_path / "rules.json", "-o", tmp_path / "a", "--json")
        assert code == 0, err
        recipe = json.loads(out)["recipe"]
        again = ["patch", *MODEL, "--recipe", tmp_path / "a" / "normswap.json", "-o", tmp_path / "b"]

        assert [(site["name"], site["target"]["groups"]) for site in recipe["sites"]] == [("1", 2)]
        assert run(*again)[0] == 0
        a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
        assert a == b

    @pytest.mark.parametrize("option", ["--data", "--calibrate"])
    def test_drift(self, run, tmp_path, option):
        """With images, the drift of each layer and the output is told, as figures and in the table."""
        arguments = ["patch", *MODEL, "--to", "in", option, "data.npz", "-o", tmp_path / "b"]
        code, out, err = run(*arguments, "--json")
        assert code == 0, err
        layer, output = json.loads(out)["drift"]
        table = run(*arguments, "--overwrite")[2]

        assert (layer["name"], output["name"]) == ("1", "output")
        assert 0 < layer["rms"] < 2
        assert f" {layer['rms']:.2f} " in table
        assert f"output: off by {100 * output['rms']:.1f} % of its root mean square, " in table

    def test_what_is_not_refitted(self, run, tmp_path, monkeypatch):
        """It is counted for people, and named with the reason in --json."""
        monkeypatch.setattr("normswap.finetune.calibration.refit.WORTH", 0.0)
        frozen = "    model[0].requires_grad_(False)\n    return model\n\ndef without"
        (tmp_path / "frozen.py").write_text(CODE.replace("    return model\n\ndef without", frozen))
        arguments = ["patch", f"{tmp_path}/frozen.py:build", *MODEL[1:], "--to", "gn", "--calibrate", "data.npz", "-o"]
        code, out, err = run(*arguments, tmp_path / "b", "--json")
        assert (code, json.loads(out)["not_refitted"]) == (0, {"0": "it is frozen"}), err
        table = run(*arguments, tmp_path / "c")[2]

        assert "; 1 layer not refitted (first: 0, since it is frozen); bundle written to " in " ".join(table.split())

    def test_verify(self, run):
        """A good file passes, on data too."""
        code, out, _ = run("verify", "gn", "gn.onnx", "--data", "data.npz", "--json")

        assert code == 0
        assert {k: json.loads(out)[k] for k in ("passed", "first_diverging")} == {
            "passed": True,
            "first_diverging": None,
        }

    def test_verify_names_the_layer(self, run, folder, tmp_path):
        """A file with one initializer off by a hundredth exits 5 and names the layer."""
        proto = onnx.load(folder / "gn.onnx")
        weight = next(i for i in proto.graph.initializer if i.name == "5.weight")
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.01), weight.name))
        onnx.save(proto, tmp_path / "bad.onnx")
        code, _, err = run("verify", "gn", tmp_path / "bad.onnx")

        assert code == 5
        assert "first diverging layer: 5\n" in err

    @pytest.mark.parametrize("command", sorted(main.commands))
    def test_help(self, run, command):
        """Each command explains itself with an example."""
        code, out, _ = run(command, "--help")

        assert code == 0
        assert f"\n    normswap {command} " in out or f"Example: normswap {command} " in out

    def test_help_on_all(self, run):
        """What the commands share is told once: forms of models and data, and all exit codes."""
        code, out, _ = run("--help")
        text = " ".join(out.split())

        assert code == 0
        assert (
            "DATA is a folder with one subfolder of images per class, an .npz with arrays x and y, or hf:NAME[SPLIT] "
            "(a data set of Hugging Face's); any folder of images, or an .npz without y, where labels are not used. "
        ) in text
        assert (
            "Exit codes: 0 ok, 1 internal error, 2 usage, 3 input rejected, 4 unsupported or nothing to do, "
            "5 verification failed or training went non-finite, 6 something not installed, 7 file system, "
            "130 stopped by Ctrl-C, 143 stopped by SIGTERM. "
        ) in text
        assert "Examples: normswap inspect timm:resnet50 " in text
        assert max(map(len, out.splitlines())) <= 80

    def test_the_list_of_commands(self, run):
        """Each stands in the order of the work, with a whole sentence."""
        out = run("--help")[1]
        listed = " ".join(out.partition("Commands:")[2].split())

        assert listed.startswith(
            "inspect List the BatchNorms of MODEL and what replacing each is expected to change. patch"
        )
        assert "..." not in listed
        assert listed.endswith("train a BatchNorm network, swap, fine-tune, export, prove.")
        assert listed.count(". ") == len(main.commands) - 1


class TestRefusals:
    def test_ctrl_c(self, run, monkeypatch):
        """Ctrl-C ends any command with the shell's code for it, without a traceback."""

        def interrupt(*_, **__):
            raise KeyboardInterrupt

        monkeypatch.setattr("normswap.bundles.opening.load_model", interrupt)
        assert run("inspect", *MODEL) == (130, "", "stopped\n")

    @pytest.mark.parametrize(
        ("arguments", "code", "message"),
        [
            (["patch", *MODEL, "--to", "gn"], 2, "expected -o BUNDLE, or --dry-run"),
            (["patch", *MODEL, "-o", "new"], 2, "expected one of --to and --recipe"),
            (["patch", *MODEL, "--to", "sn", "--groups", "2", "-o", "new"], 2, "--groups belongs to --to gn"),
            (["patch", *MODEL, "--to", "gn", "--groups", "0", "-o", "new"], 2, "expected 'auto' or a positive number"),
            (["patch", *MODEL, "--to", "gn", "-o", "gn"], 2, "expected an output path that does not exist"),
            (["patch", "net.py:gone", "--to", "gn", "-o", "new"], 3, "expected a callable gone in net.py"),
            (["patch", "net.py:build", "--weights", "no.pth", "--to", "gn", "-o", "new"], 3, "expected a file at no"),
            (["patch", "net.py:without", "--to", "gn", "-o", "new"], 4, "expected a model with BatchNorm layers"),
            (["patch", *MODEL, "--to", "gn", "--groups", "3", "-o", "new"], 4, "expected groups to divide the 8"),
            (["patch", *MODEL, "--to", "gn", "--exclude", "x", "-o", "new"], 3, "expected a pattern that matches"),
            (["patch", "gn", "--to", "sn", "-o", "new"], 4, "already patched to gn"),
            (["patch", "gn", "--to", "gn", "-o", "new"], 4, "received a bundle patched already"),
            (["finetune", "gn", "--data", "gone", "-o", "new"], 3, "expected a folder of class folders, an .npz"),
            (["evaluate", "gn", "--data", "random"], 3, "received data=random, which serves `verify` alone"),
            (["evaluate", "gone.onnx", "--data", "data.npz"], 3, "expected a file at gone.onnx"),
            (["export", "gn", "-o", "gn.onnx"], 2, "expected an output path that does not exist"),
            (["export", "gn", "-o", "new.onnx", "--opset", "99"], 4, "expected an opset from 17 to 24"),
            (["verify", "gn", "net.pth"], 3, "expected an ONNX model in net.pth"),
        ],
    )
    def test_each_has_its_code_and_leaves_nothing(self, run, folder, arguments, code, message):
        """A refused command says why, exits with the right code and writes nothing."""
        before = sorted(path.name for path in folder.iterdir())
        found, out, err = run(*arguments)

        assert (found, out) == (code, "")
        assert message in err
        assert "Traceback" not in err
        assert sorted(p.name for p in folder.iterdir() if p.name != "__pycache__") == [
            name for name in before if name != "__pycache__"
        ]

    def test_weights_of_another_network(self, run, tmp_path):
        """Keys that do not fit are listed."""
        torch.save({"other": torch.ones(1)}, tmp_path / "w.pth")
        code, _, err = run("patch", "net.py:build", "--weights", tmp_path / "w.pth", "--to", "gn", "-o", tmp_path / "b")

        assert code == 3
        assert "missing (8):" in err
        assert "unexpected (1):\n    other" in err

    def test_an_error_as_json(self, run):
        """With --json the error is one JSON object too."""
        code, out, _ = run("inspect", "gone.py:f", "--json")

        assert json.loads(out) == {
            "schema_version": 1,
            "error": "expected a file at gone.py, received nothing there",
            "exit_code": code,
        }

    def test_the_file_system(self, run, folder):
        """An output that cannot be written is an I/O error."""
        code, _, err = run("patch", *MODEL, "--to", "gn", "-o", folder / "net.py" / "b")

        assert (code, "error:" in err) == (7, True)

    def test_an_internal_error(self, run, monkeypatch):
        """A defect is told in one line, with a traceback only on demand."""
        from normswap.bundles import opening

        def broken(*_, **__):
            raise AssertionError("broken")

        monkeypatch.setattr(opening, "load_model", broken)
        assert run("inspect", "x:y")[::2] == (1, "error: AssertionError: broken (normswap --debug shows where)\n")
        with pytest.raises(AssertionError, match="^broken$"):
            CliRunner().invoke(main, ["--debug", "inspect", "x:y"], catch_exceptions=False)


def test_overwrite_replaces_a_bundle_whole(run, folder, tmp_path):
    """--overwrite leaves nothing of the old bundle."""
    shutil.copytree(folder / "gn", tmp_path / "b")
    (tmp_path / "b" / "stray").write_text("old")
    code, _, err = run("patch", *MODEL, "--to", "sn", "-o", tmp_path / "b", "--overwrite")

    assert code == 0, err
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == [
        "model.safetensors",
        "normswap.json",
        "original.safetensors",
    ]


@pytest.mark.parametrize(
    ("arguments", "expected", "found"),
    [
        (["export", "gn", "-o", "photos"], "a regular file", "a folder"),
        (["export", "gn", "-o", "gn"], "a regular file", "a folder"),
        (["export", "gn", "-o", "link"], "a regular file", "a symbolic link"),
        (["verify", "gn", "gn.onnx", "--save-reference", "photos"], "a regular file", "a folder"),
        (["plot", "gn", "-o", "photos.png"], "a regular file", "a folder"),
        (["patch", *MODEL, "--to", "sn", "-o", "photos"], "a bundle", "a folder"),
        (["patch", *MODEL, "--to", "sn", "-o", "net.pth"], "a bundle", "a file"),
        (["finetune", "gn", "--trust-code", "--data", "data.npz", "-o", "photos"], "a bundle", "a folder"),
    ],
    ids=lambda value: " ".join(value[:1]) if isinstance(value, list) else value,
)
def test_overwrite_replaces_like_by_like(run, folder, tmp_path, monkeypatch, arguments, expected, found):
    """A folder of photos, a bundle, a link: what is of another kind than the output stays, and the exit code is 2."""
    for name in ("gn", "gn.onnx", "net.py", "net.pth", "data.npz"):
        (shutil.copytree if name == "gn" else shutil.copy)(folder / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for name in ("photos", "photos.png"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.jpg").write_text("x")
    (tmp_path / "link").symlink_to("gn.onnx")
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    output = arguments[-1]

    result = CliRunner().invoke(main, [*arguments, "--overwrite"])

    message = f"error: expected {expected} to overwrite, received {output}, {found}; write to another output\n"
    assert (result.exit_code, result.stderr) == (2, message)
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_a_file_is_not_exported_over_what_it_is_made_from(run, folder, tmp_path):
    """Weights that the model is read from, and files of its bundle, survive --overwrite."""
    shutil.copytree(folder / "gn", tmp_path / "gn")
    for name in ("net.py", "net.pth"):
        shutil.copy(folder / name, tmp_path / name)
    before = (tmp_path / "net.pth").read_bytes()
    for arguments in (
        [MODEL[0], "--weights", f"{tmp_path}/net.pth", "-o", f"{tmp_path}/net.pth"],
        [f"{tmp_path}/gn", "-o", f"{tmp_path}/gn/original.safetensors"],
    ):
        code, _, err = run("export", *arguments, "--overwrite")
        needed = tmp_path / ("net.pth" if "--weights" in arguments else "gn")
        message = f"expected an output that is not read from, received {arguments[-1]}, which {needed} needs"
        assert (code, err) == (2, f"error: {message}; write to another output\n")

    assert (tmp_path / "net.pth").read_bytes() == before
    assert run("inspect", tmp_path / "gn")[0] == 0
