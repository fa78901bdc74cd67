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
from PIL import Image

from normswap.cli import main
from normswap.finetune.run.journal import read

from .runs import bundled, checkpoints, coloured, same, weights


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
        """Without options a run calibrates, then trains all, and learns from the original."""
        code, result, err = run("in-gn", "-o", tmp_path / "out", "--steps", 5, "--batch-size", 16)

        assert code == 0, err
        assert result["steps"] == 5
        assert err.startswith("warning: expected 256 images to calibrate on, received 72 beside 24 to judge it by\n")
        kept = settings(tmp_path / "out")
        assert (kept["stages"], kept["teacher"], kept.get("lr")) == ("calibrate,all", "original", None)
        assert (kept["bundle"], kept["data"]) == ("in-gn", "data.npz")
        assert (tmp_path / "out/run/curves.png").stat().st_size > 10_000

    @pytest.mark.parametrize(("batch_size", "epochs", "steps"), [(16, 2, 6), (64, 4, 3)])
    def test_epochs(self, run, tmp_path, batch_size, epochs, steps):
        """--epochs counts passes over the data, of batches and what is accumulated of them."""
        options = "--accumulate", 2, "--epochs", epochs, "--teacher", "none", "--train", "all"
        code, result, err = run("in-gn", "--batch-size", batch_size, *options, "-o", tmp_path / "out")

        assert code == 0, err
        assert result["steps"] == steps

    def test_fewer_images_than_a_batch(self, run, folder, tmp_path):
        """A batch is the whole data then, and the rate from labels is in proportion to what it holds."""
        data = np.load(folder / "data.npz")
        np.savez(tmp_path / "few.npz", x=data["x"][:32], y=data["y"][:32])
        options = "--data", tmp_path / "few.npz", "--teacher", "none", "--train", "all", "--epochs", 2
        code, result, err = run("in-gn", *options, "-o", tmp_path / "out")

        assert code == 0, err
        assert (result["steps"], settings(tmp_path / "out")["batch_size"]) == (2, 32)
        rates = [row["learning_rate"] for row in read(tmp_path / "out/run/metrics.csv")]
        assert max(filter(None, rates)) == pytest.approx(0.025)

    def test_labels_a_teacher_does_not_need(self, run, folder, tmp_path):
        """Images to distil on may lie in any folders; those to evaluate on may be of one class."""
        for name in ("monday", "tuesday", "empty"):
            (tmp_path / "train" / name).mkdir(parents=True)
        for index in range(8):
            name = "monday" if index < 7 else "tuesday"
            Image.new("RGB", (12, 12), (30 * index,) * 3).save(tmp_path / "train" / name / f"{index}.png")
        data = np.load(folder / "data.npz")
        np.savez(tmp_path / "one.npz", x=data["x"][data["y"] == 1], y=data["y"][data["y"] == 1])
        options = "--train", "norm", "--steps", 2, "--eval-data", tmp_path / "one.npz", "--no-early-stop"
        code, result, err = run("in-gn", *options, "--data", tmp_path / "train", "-o", tmp_path / "out")

        assert code == 0, err
        assert (result["steps"], result["eval"]["n"]) == (2, int((data["y"] == 1).sum()))

    def test_a_seed_of_the_clock(self, run, tmp_path):
        """Nanoseconds are a seed."""
        options = "--train", "norm", "--steps", 2, "--seed", 1_763_726_400_123_456_789
        code, _, err = run("in-gn", *options, "-o", tmp_path / "out")

        assert code == 0, err
        assert settings(tmp_path / "out")["seed"] == 1_763_726_400_123_456_789

    def test_what_is_held(self, run, folder, tmp_path):
        """The network is built for the model and for its original, and not once more."""
        bundled(tmp_path, "gn")
        text = (tmp_path / "net.py").read_text()
        told = f"    print('built', file=open({str(tmp_path / 'built')!r}, 'a'))\n    return"
        (tmp_path / "net.py").write_text(text.replace("    return", told))
        code, _, err = run(tmp_path / "in-gn", "--train", "norm", "--steps", 2, "-o", tmp_path / "out")

        assert code == 0, err
        assert (tmp_path / "built").read_text() == "built\nbuilt\n"

    def test_the_largest_batch(self, run, tmp_path):
        """--batch-size auto is found once, leaves nothing behind in the model, and is kept for resuming."""
        options = "in-gn", "--batch-size", "auto", "--steps", 5, "-o", tmp_path / "out"
        code, result, err = run(*options)

        assert code == 0, err
        assert "\n--batch-size auto: 64 images\n" in f"\n{err}"
        assert settings(tmp_path / "out")["batch_size"] == result["batch_size"] == 64
        assert run(*options, "--resume")[0] == 0
        assert run("in-gn", "--batch-size", 64, "--steps", 5, "-o", tmp_path / "told")[0] == 0
        assert same(weights(tmp_path / "out"), weights(tmp_path / "told"))

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

    @pytest.mark.parametrize(
        ("text", "options", "expected"),
        [
            ("steps = 9", ["--epochs", 0.5], {"steps": 3}),
            ("epochs = 9", ["--steps", 2], {"steps": 2}),
            ('steps = 2\nstages = "all"', ["--train", "norm"], {"stages": "", "train": "norm"}),
            ('steps = 2\ntrain = "norm"', ["--stages", "all"], {"stages": "all", "train": "all"}),
            ('steps = 2\nteacher = "original"\ndistill = true', ["--train", "norm"], {"teacher": "original"}),
            ("steps = 2\nsize = 12", ["--input-shape", "3,12,12"], {"input_shape": "3,12,12"}),
            ('steps = 2\ninput_shape = "3,12,12"', ["--size", "12"], {"size": "12"}),
            ('steps = 2\noptimizer = "adam"', ["--optimizer", "sgd", "--momentum", "0.5"], {"momentum": 0.5}),
            ("steps = 2\nmomentum = 0.5", ["--optimizer", "adam"], {"optimizer": "adam", "momentum": None}),
            ('steps = 2\nschedule = "poly"\npower = 2', ["--schedule", "step"], {"schedule": "step", "power": None}),
            (
                'steps = 2\nschedule = "step"\nmilestones = [0.25, 0.5]\nfactor = 0.5',
                ["--milestones", "0.5"],
                {"milestones": [0.5], "factor": 0.5},
            ),
            ("steps = 2\nlr = 1\nmean = [0.5, 0.4, 0.6]", [], {"lr": 1.0, "mean": "0.5,0.4,0.6"}),
        ],
    )
    def test_the_command_line_comes_first(self, run, tmp_path, text, options, expected):
        """What is on it beats the file's options, those it excludes as well."""
        teacher = "" if "teacher" in text else 'teacher = "none"\n'
        (tmp_path / "run.toml").write_text(f"batch_size = 16\n{teacher}{text}\n")
        code, _, err = run("in-gn", "-c", tmp_path / "run.toml", *options, "-o", tmp_path / "out")

        assert code == 0, err
        kept = settings(tmp_path / "out")
        assert {name: kept.get(name) for name in expected} == expected

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("accumulate = 2.5", "expected an integer in {}, received accumulate=2.5"),
            ("accumulate = true", "expected an integer in {}, received accumulate=true"),
            ('steps = "5"', 'expected an integer in {}, received steps="5"'),
            ("seed = 2025-11-21", 'expected an integer in {}, received seed="2025-11-21"'),
            ('lr = "0.1"', 'expected a number in {}, received lr="0.1"'),
            ("ema = false", "expected a number in {}, received ema=false"),
            ("lr = [0.1]", "expected a number in {}, received lr=[0.1]"),
            ('harden = "no"', 'expected true or false in {}, received harden="no"'),
            ("early-stop = 0", "expected true or false in {}, received early_stop=0"),
            ("steps = [3]", "expected an integer in {}, received steps=[3]"),
            ('teacher = ["none"]', 'expected text or a number in {}, received teacher=["none"]'),
            ("data = true", "expected text or a number in {}, received data=true"),
            ("mean = [true]", "expected text, a number or a list of these in {}, received mean=[true]"),
            ("[train]\nnorm = 5", 'expected text or a number in {}, received train={{"norm": 5}}'),
        ],
    )
    def test_wrong_types(self, run, tmp_path, text, message):
        """Nothing is rounded or guessed."""
        (tmp_path / "run.toml").write_text(f"{text}\n")
        code, _, err = run("in-gn", "-c", tmp_path / "run.toml", "-o", tmp_path / "out")

        expected = f"Error: Invalid value for '-c' / '--config': {message.format(tmp_path / 'run.toml')}"
        assert (code, err.splitlines()[-1]) == (2, expected)

    @pytest.mark.parametrize(
        ("text", "names", "received", "one"),
        [
            ("steps = 9\nepochs = 2", "steps and epochs", "steps=9 and epochs=2.0", ["--steps", 2]),
            ('stages = "norm,all"\ntrain = "norm"', "stages and train", "stages=norm,all and train=norm",
             ["--train", "norm", "--steps", 2]),
            ('teacher = "none"\ndistill = true', "teacher and distill", "teacher=none and distill=True",
             ["--teacher", "none", "--steps", 2]),
        ],
    )  # fmt: skip
    def test_options_that_exclude_each_other(self, run, tmp_path, text, names, received, one):
        """A file with both is refused, unless one of them is on the command line."""
        (tmp_path / "run.toml").write_text(f"batch_size = 16\n{text}\n")
        code, _, err = run("in-gn", "-c", tmp_path / "run.toml", "-o", tmp_path / "out")

        assert (code, err.splitlines()[-1]) == (
            2,
            f"Error: expected one of {names} in the file of --config, received {received}; "
            "leave one out, or give one on the command line",
        )
        code, result, err = run("in-gn", "-c", tmp_path / "run.toml", *one, "-o", tmp_path / "out")
        assert (code, result["steps"]) == (0, 2), err

    def test_what_is_refused(self, run, tmp_path):
        """A file that is no TOML, or has options there are not."""
        (tmp_path / "bad.toml").write_text("steps 5")
        (tmp_path / "other.toml").write_text("stepps = 5\nlr = 0.1\n")
        code, _, err = run("in-gn", "-c", tmp_path / "bad.toml", "-o", tmp_path / "out")
        assert (code, f"expected TOML in {tmp_path}/bad.toml, received text that is not: " in err) == (2, True)
        code, _, err = run("in-gn", "-c", tmp_path / "other.toml", "-o", tmp_path / "out")
        assert code == 2
        expected = f"expected options of this command in {tmp_path}/other.toml, received stepps; there are accumulate, "
        assert expected in err
        assert ", steps, sync_statistics, teacher, temperature, train, warmup, weight_decay, weights, workers\n" in err
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

    @pytest.mark.parametrize(
        ("options", "code", "message"),
        [
            (["--epochs", 0], 2, "Error: Invalid value for '--epochs': expected a finite number above 0, received 0.0"),
            (["--epochs", -3], 2,
             "Error: Invalid value for '--epochs': expected a finite number above 0, received -3.0"),
            (["--epochs", "nan"], 2,
             "Error: Invalid value for '--epochs': expected a finite number above 0, received nan"),
            (["--epochs", "inf"], 2,
             "Error: Invalid value for '--epochs': expected a finite number above 0, received inf"),
            (["--accumulate", 0], 2,
             "Error: Invalid value for '--accumulate': expected a finite number above 0, received 0"),
            (["--train", "norm", "--stages", "all"], 2, "Error: expected one of --stages and --train"),
            (["--teacher", "none", "--distill"], 2, "Error: expected one of --teacher and --distill"),
            (["--size", "8,8,8"], 2, "Error: Invalid value for '--size': expected up to 2 numbers, received '8,8,8'"),
            (["--size", "8,0"], 2,
             "Error: Invalid value for '--size': expected finite numbers above 0, received '8,0'"),
            (["--mean", "nan"], 2, "Error: Invalid value for '--mean': expected finite numbers, received 'nan'"),
            (["--std", "0"], 2, "Error: Invalid value for '--std': expected finite numbers above 0, received '0'"),
            (["--data", ""], 3,
             "error: expected a folder of class folders, an .npz file or hf:NAME[SPLIT], received data="),
            (["--eval-data", ""], 3,
             "error: expected a folder of class folders, an .npz file or hf:NAME[SPLIT], received data="),
            (["--seed", -1], 3, "error: expected `seed` of at least 0, received seed=-1"),
            (["--optimizer", "adam", "--momentum", 0.9], 2,
             "error: expected --optimizer sgd for --momentum, received --optimizer adam; leave it out"),
            (["--power", 2], 2,
             "error: expected --schedule poly for --power, received --schedule cosine; leave it out"),
            (["--schedule", "poly", "--min-lr", 0.1], 2,
             "error: expected --schedule plateau for --min-lr, received --schedule poly; leave it out"),
            (["--schedule", "constant", "--factor", 0.1], 2, "error: expected --schedule step or --schedule plateau "
             "for --factor, received --schedule constant; leave it out"),
            (["--schedule", "plateau"], 2, "error: expected --eval-data with --schedule plateau, which goes by the "
             "loss on it, received none"),
            (["--schedule", "step", "--milestones", "0.5,x"], 2,
             "Error: Invalid value for '--milestones': expected numbers separated by commas, received '0.5,x'"),
            (["--schedule", "step", "--milestones", "2,4", "--epochs", 4, "--batch-size", 16, "--train", "all"], 2,
             "error: expected --milestones before the end of the longest stage, after 4 epochs, received 4; name "
             "shares of the steps, below 1, or train for longer"),
        ],
    )  # fmt: skip
    def test_options_that_cannot_be(self, run, tmp_path, options, code, message):
        """The last line names the option and what it takes."""
        found, _, err = run("in-gn", "-o", tmp_path / "out", *options)

        assert (found, err.splitlines()[-1]) == (code, message)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(("option", "name"), [("--data", "out"), ("--eval-data", "train/out"), ("--data", ".")])
    def test_an_output_among_the_images(self, run, tmp_path, option, name):
        """The run's pictures would be images of a class."""
        (tmp_path / "images/train").mkdir(parents=True)
        output, others = tmp_path / "images" / name, ["--data", "data.npz"] if option == "--eval-data" else []
        code, _, err = run("in-gn", option, tmp_path / "images", *others, "-o", output)

        expected = f"expected an output outside of {option} {tmp_path}/images, whose pictures are read as images"
        assert (code, err) == (3, f"error: {expected}, received output={output}\n")
        assert not (tmp_path / "images/train/out").exists()

    def test_options_without_effect(self, run, tmp_path):
        """They are named where the command line has them, and only for a model or teacher that has no use for them."""
        idle = "--temperature", 3, "--features", 0.1, "--gate-lr", 2, "--harden", "--limits", "paper"
        others = "--no-early-stop", "--calibration-size", 20
        options = "--train", "norm", "--steps", 2, "--batch-size", 16
        code, _, err = run("in-gn", *options, "--teacher", "none", *idle, *others, "-o", tmp_path / "out")

        assert code == 0, err
        assert [line for line in err.splitlines() if "no effect" in line] == [
            f"warning: expected {need} for {option}, received none; it has no effect"
            for option, need in (
                ("--temperature", "a teacher"),
                ("--features", "a teacher"),
                ("--gate-lr", "layers with gates"),
                ("--harden", "layers with gates"),
                ("--limits", "BRN layers"),
                ("--early-stop", "a teacher and --eval-data"),
                ("--calibration-size", "a stage calibrate"),
            )
        ]
        code, _, err = run("in-sn", *options, "--distill", *idle[:-2], "-o", tmp_path / "sn")
        assert (code, "no effect" in err) == (0, False), err
        options = "--steps", 2, "--batch-size", 16, "--eval-data", "data.npz"
        code, _, err = run("in-sn", *options, *others, "-o", tmp_path / "stages")
        assert (code, "no effect" in err) == (0, False), err

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
