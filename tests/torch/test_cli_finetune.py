"""`normswap finetune` and `normswap plot`, as people and scripts use them."""

import json
import resource
import signal
import subprocess
import sys
import tomllib

import numpy as np
import pytest
import safetensors.numpy
from click.testing import CliRunner

from normswap.cli import main

from .runs import bundled, checkpoints, coloured


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with bundles and data."""
    path = tmp_path_factory.mktemp("finetune")
    bundled(path, "gn"), bundled(path, "sn")
    data = coloured()
    np.savez(path / "data.npz", x=data._images.images, y=data.labels)
    return path


@pytest.fixture
def run(folder, monkeypatch):
    """A function that runs `normswap finetune` in the folder and returns exit code, JSON and stderr."""
    monkeypatch.chdir(folder)

    def invoke(*arguments):
        given = [*map(str, arguments), "--json"]
        result = CliRunner().invoke(main, ["finetune", *given, *([] if "--data" in given else ["--data", "data.npz"])])
        return result.exit_code, json.loads(result.stdout) if result.stdout else None, result.stderr

    return invoke


def settings(output):
    return tomllib.loads((output / "run/run.toml").read_text())


class TestRecipes:
    def test_the_default(self, run, tmp_path):
        """Without options a run calibrates, trains the norms, then all, and learns from the original."""
        code, result, err = run("in-gn", "-o", tmp_path / "out", "--steps", 5, "--batch-size", 16)

        assert code == 0, err
        assert result["steps"] == 5
        assert err.startswith("warning: expected 256 images to calibrate on, received 96; see what the residuals say\n")
        kept = settings(tmp_path / "out")
        assert (kept["stages"], kept["teacher"], kept["lr"]) == ("calibrate,norm,all", "original", 0.0125)
        assert (kept["bundle"], kept["data"]) == ("in-gn", "data.npz")
        assert (tmp_path / "out/run/curves.png").stat().st_size > 10_000

    def test_epochs(self, run, tmp_path):
        """--epochs counts passes over the data, of batches and what is accumulated of them."""
        options = "--batch-size", 16, "--accumulate", 2, "--epochs", 2, "--teacher", "none", "--train", "all"
        code, result, err = run("in-gn", *options, "-o", tmp_path / "out")

        assert code == 0, err
        assert result["steps"] == 6

    def test_the_largest_batch(self, run, tmp_path):
        """--batch-size auto is found once, and kept for resuming."""
        options = "in-gn", "--batch-size", "auto", "--steps", 5, "-o", tmp_path / "out"
        code, _, err = run(*options)

        assert code == 0, err
        assert settings(tmp_path / "out")["batch_size"] == 64
        assert run(*options, "--resume")[0] == 0

    def test_as_good_already(self, run, tmp_path):
        """A model that is as accurate as its original ends where it began, with --eval-data and early stopping."""
        options = "in-sn", "--eval-data", "data.npz", "--steps", 5, "--batch-size", 16
        code, result, _ = run(*options, "-o", tmp_path / "stopped")
        assert (code, result["steps"]) == (0, 0)
        assert result["eval"]["top1"] >= result["original"]["top1"]
        assert run(*options, "-o", tmp_path / "on", "--no-early-stop")[1]["steps"] == 5


class TestConfig:
    def test_a_run_can_be_repeated(self, run, tmp_path):
        """run.toml given back makes the same run; the command line comes before it."""
        options = "--steps", 5, "--batch-size", 16, "--seed", 3, "--augment", "crop,flip", "--mean", "0.4,0.5,0.6"
        run("in-gn", *options, "-o", tmp_path / "one")
        config = "-c", tmp_path / "one/run/run.toml"
        code, _, err = run("in-gn", *config, "-o", tmp_path / "two")
        assert code == 0, err
        one, two = (safetensors.numpy.load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
        assert all(np.array_equal(one[name], two[name]) for name in one)

        run("in-gn", *config, "--seed", 4, "--train", "norm", "-o", tmp_path / "three")
        changed = settings(tmp_path / "three")
        assert (changed["seed"], changed["stages"], changed["train"], changed["steps"]) == (4, "", "norm", 5)
        assert changed["mean"] == "0.4,0.5,0.6"

    def test_what_is_refused(self, run, tmp_path):
        """A file that is no TOML, or has options there are not."""
        (tmp_path / "bad.toml").write_text("steps 5")
        (tmp_path / "other.toml").write_text("stepps = 5\nlr = 0.1\n")
        code, _, err = run("in-gn", "-c", tmp_path / "bad.toml", "-o", tmp_path / "out")
        assert (code, f"expected a TOML file, received {tmp_path}/bad.toml: " in err) == (2, True)
        code, _, err = run("in-gn", "-c", tmp_path / "other.toml", "-o", tmp_path / "out")
        assert code == 2
        assert f"expected options of this command in {tmp_path}/other.toml, received stepps" in err
        assert not (tmp_path / "out").exists()


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "code", "message"),
        [
            (["--steps", 5, "--epochs", 1], 2, "expected one of --steps and --epochs"),
            (["--batch-size", "many"], 2, "expected 'auto' or a positive number, received 'many'"),
            (["--stages", "all,calibrate"], 3, "after calibrate or not, received stages='all,calibrate'"),
            (["--stages", "norm=200"], 3, "that take 100 together, received stages='norm=200', which take 200 = 200"),
            (["--train", "last:99", "--steps", 5], 3, "up to the model's 3 blocks, received train='last:99'"),
            (["--lr", 0], 3, "expected `lr` above 0, received lr=0.0"),
            (["--augment", "swirl"], 3, "swirl"),
        ],
    )
    def test_before_training(self, run, tmp_path, options, code, message):
        """What cannot be is told before a step is taken, and leaves no output."""
        found, _, err = run("in-gn", "-o", tmp_path / "out", *options)

        assert (found, message in err) == (code, True), err
        assert not (tmp_path / "out").exists()

    def test_a_file_that_cannot_grow(self, run, tmp_path):
        """A checkpoint the disk has no room for exits 7, and the one before it is whole."""
        options = "in-gn", "--steps", 40, "--checkpoint-every", 1, "--batch-size", 16, "-o", tmp_path / "out"
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, hard))  # what metrics.csv comes to on the way
        try:
            code, _, err = run(*options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

        assert code == 7, err
        assert len(checkpoints(tmp_path / "out")) == 2
        assert run(*options, "--resume")[1]["steps"] == 40


def test_sigterm(folder, tmp_path):
    """The process ends with the shell's code for the signal, says how to go on, and shows no traceback."""
    command = [sys.executable, "-m", "normswap", "finetune", "in-gn", "--data", "data.npz", "--steps", "100000"]
    command += ["--batch-size", "16", "--train", "all", "-o", str(tmp_path / "out")]
    with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr.readline().startswith("fine-tuning: 1/100000, loss ")
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)

    assert process.returncode == 143
    assert "error: stopped by SIGTERM after step " in err
    assert "which is saved; go on with --resume" in err
    assert "Traceback" not in err
