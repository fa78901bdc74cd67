"""Experiments as a whole: what each leaves in its folder, what it goes on from, and what it says of missing data."""

import gzip
import json

import keras
import numpy as np
import pytest

from normswap.cli import main
from normswap.data.dataset import open_data
from normswap.data.preprocessing import Preprocessing
from normswap.errors import InputError
from normswap.finetune import finetune
from normswap.finetune.run.interruption import StoppedError
from normswap.reproduce import experiment as experiments
from normswap.reproduce import gn_fashion, renorm_wrn, sn_toy
from normswap.reproduce.data import cifar10, fashion_mnist
from normswap.reproduce.experiment import Curve, Experiment, Finding, Outcome, reproduce

from ..helpers import exactly

SMALL = Preprocessing((8, 8, 1), "channels_last")
STEPS = {"lr": 0.1, "warmup": 0.0, "steady_statistics": False}


def network(seed, *norm):
    keras.utils.set_random_seed(seed)
    return keras.Sequential([keras.Input((8, 8, 1)), *norm, keras.layers.Flatten(), keras.layers.Dense(2)])


def halves(spec, preprocessing, output):
    """Bright and dark images."""
    labels = np.arange(24) % 2
    images = np.random.default_rng(0).uniform(0, 0.4, (24, 8, 8, 1)) + 0.5 * labels[:, None, None, None]
    output.mkdir(exist_ok=True)
    path = output / "halves.npz"
    np.savez(path, x=images.astype(np.float32), y=labels)
    return (open_data(str(path), preprocessing),) * 2


def judge(outcomes, scale):
    best = {name: outcome.best for name, outcome in outcomes.items()}
    return [Finding("both learn", str(sorted(best)), min(best.values()) > 50), Finding("more", scale, None)]


def experiment(epochs=8):
    curves = [
        Curve(
            "BN", lambda seed: network(seed, keras.layers.BatchNormalization(momentum=0.5)), epochs, 4, settings=STEPS
        ),
        Curve("None, half", lambda seed: network(seed), epochs, 4, 12, STEPS),
    ]
    return Experiment(
        "halves", "Halves", "a test", SMALL, halves, lambda scale: curves, judge, {"small": ["it is small"], "full": []}
    )


def run(output, told=None, **options):
    return reproduce(
        experiment(**options), output, data=None, scale="small", seed=0, on_curve=lambda *it: (told or []).append(it[1])
    )


def test_what_is_left(tmp_path):
    """A bundle a curve, which can be loaded, and results: figures by curve, findings, and what differs."""
    results = run(tmp_path)

    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["bn", "none-half"]
    assert [curve["name"] for curve in results["curves"]] == ["BN", "None, half"]
    assert results["curves"][0]["ratio"] == 1.0
    assert results["differs"] == ["it is small"]
    assert results["findings"] == [
        "both learn: reproduced (['BN', 'None, half'])",
        "more: not told by this scale (small)",
    ]


def test_what_is_done_is_not_done_again(tmp_path):
    """The second time nothing is trained, and the results are the same."""
    first = run(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*") if path.is_file()}

    assert run(tmp_path) == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("*") if path.is_file()} == before


def test_a_folder_is_of_one_experiment(tmp_path):
    """What was run with another scale or seed is not taken for this one's."""
    run(tmp_path)
    with pytest.raises(
        InputError,
        match=exactly(
            f"expected {tmp_path} to hold scale=full, seed=1, received scale=small, seed=0; give another folder with -o"
        ),
    ):
        reproduce(experiment(), tmp_path, data=None, scale="full", seed=1, on_curve=lambda *it: None)


def test_a_stopped_one_goes_on(tmp_path, monkeypatch):
    """The message says how, and the same call ends what was begun, as if it had not been stopped."""
    whole, calls = run(tmp_path / "whole"), []

    def stopping(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            raise StoppedError(15, 7)
        return finetune(*arguments, **options)

    monkeypatch.setattr(experiments, "finetune", stopping)
    message = "stopped by SIGTERM after step 7, which is saved; the same command goes on"
    with pytest.raises(StoppedError, match=exactly(message)) as stopped:
        run(tmp_path / "stopped")
    again = run(tmp_path / "stopped")

    assert stopped.value.exit_code == 143
    assert [curve["eval_loss"] for curve in again["curves"]] == [curve["eval_loss"] for curve in whole["curves"]]


def test_seeds_are_kept(tmp_path):
    """Two runs of one seed are the same but for the time they take, another seed's is another."""
    found = [run(tmp_path / name) for name in ("a", "b")]
    other = reproduce(
        experiment(), tmp_path / "c", data=None, scale="small", seed=1, on_curve=lambda *it: None
    )  # fmt: skip
    losses = [[curve["eval_loss"] for curve in each["curves"]] for each in (*found, other)]

    assert losses[0] == losses[1] != losses[2]


def outcome(name, accuracies, seconds=1.0, losses=(1.0,)):
    return Outcome(name, list(losses), [0.0], accuracies, seconds)


@pytest.mark.parametrize(
    ("module", "scale"), [(m, s) for m in (sn_toy, renorm_wrn, gn_fashion) for s in ("small", "full")]
)
def test_the_experiments_build(module, scale):
    """Every curve of every experiment has a network of its own for its images, and says where it differs."""
    experiment = module.EXPERIMENT
    curves = module.curves(scale)

    assert len({curve.folder for curve in curves}) == len(curves)
    assert experiment.differs[scale]
    for curve in curves[:2]:
        assert curve.build(0).input_shape == (None, *experiment.preprocessing.shape)


def test_a_collapse_is_told_from_learning():
    """SN's second claim holds if both slow momenta fall and the fast one does not."""
    names = ["BN", "SN .98", "SN .99", "SN .997"]
    falling = {name: outcome(name, [50.0, 80.0, 81.0 if name in names[:2] else 20.0]) for name in names}
    steady = {name: outcome(name, [50.0, 80.0, 79.0]) for name in names}

    assert [finding.holds for finding in sn_toy.judge(falling, "small")] == [True, True]
    half = {**falling, "SN .99": steady["SN .99"]}
    assert [finding.holds for finding in sn_toy.judge(steady, "small")] == [True, False]
    assert [finding.holds for finding in sn_toy.judge(half, "small")] == [True, False]
    assert sn_toy.judge(steady, "small")[1].found == (
        "deepest fall of an evaluation below the best so far in points: BN 1.0, SN .98 1.0, SN .99 1.0, SN .997 1.0; "
        "the three trainings have the same losses, bit for bit, in their first 1 of 1 steps"
    )


def test_figures_decide():
    """A point of accuracy and .15 of a step are what BRN may lose; GN and SN have to be clearly above BN."""
    brn = {n: outcome(n, [80.0], 1.0) for n in ("BN", renorm_wrn.PAPER, renorm_wrn.SEED)}
    slow = {**brn, renorm_wrn.SEED: outcome("slow", [78.9], 1.2)}
    gn = {name: outcome(name, [70.0 if name == "BN" else 85.0]) for name in gn_fashion.NORMS}

    assert [finding.holds for finding in renorm_wrn.judge(brn, "small")] == [True, True]
    assert [finding.holds for finding in renorm_wrn.judge(slow, "small")] == [False, False]
    assert [finding.holds for finding in gn_fashion.judge(gn, "small")] == [True, True]
    assert [finding.holds for finding in gn_fashion.judge({**gn, "GN": outcome("GN", [72.0])}, "small")] == [
        False,
        False,
    ]


def idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(header + array.tobytes()))


def test_fashion_mnist_files_are_read(tmp_path):
    """The four files give images and labels, and a damaged one is named."""
    x, y = np.arange(3 * 28 * 28, dtype=np.uint8).reshape(3, 28, 28), np.array([3, 1, 2], np.uint8)
    for name in ("train", "t10k"):
        idx(tmp_path / f"{name}-images-idx3-ubyte.gz", x)
        idx(tmp_path / f"{name}-labels-idx1-ubyte.gz", y)
    train, test = fashion_mnist(str(tmp_path), Preprocessing((28, 28, 1), "channels_last"), tmp_path / "out")
    images, labels = test.batch([1])

    np.testing.assert_allclose(images[0, ..., 0], x[1] / np.float32(255), rtol=1e-6)
    assert (len(train), labels.tolist()) == (3, [1])

    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(b"\x1f\x8b nothing")
    with pytest.raises(InputError, match="^expected an IDX file of bytes at .*train-labels"):
        fashion_mnist(str(tmp_path), SMALL, tmp_path / "other")


def test_missing_data_is_named(tmp_path, capsys):
    """The package or the folder that is missing, exit 3, and nothing is left."""
    for name, folder, message in (
        (
            "gn-fashion",
            "none",
            "error: expected Fashion-MNIST in none, received no file train-images-idx3-ubyte.gz there; install "
            "Debian's package dataset-fashion-mnist, or give --data with the folder of its four .gz files",
        ),
        (
            "sn-toy",
            "none",
            "error: expected CIFAR-10 in none, as folders train and test, received no folder none/train",
        ),
        (
            "renorm-wrn",
            None,
            "error: expected --data with CIFAR-10, received none; give a folder with train and test, each with a "
            "subfolder of images for each of the ten classes, or hf:uoft-cs/cifar10",
        ),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["reproduce", name, *([] if folder is None else ["--data", folder]), "-o", str(tmp_path / name)])

        assert (ended.value.code, capsys.readouterr().err.strip()) == (3, message)
        assert not (tmp_path / name).exists()


def test_cifar_is_opened(tmp_path):
    """Folders of classes."""
    from PIL import Image

    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (32, 32)).save(tmp_path / split / name / "0.png")
    train, test = cifar10(str(tmp_path), sn_toy.EXPERIMENT.preprocessing, tmp_path)

    assert (len(train), test.classes) == (2, ["cat", "dog"])
