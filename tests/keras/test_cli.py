"""The command line on Keras files, from patch to proven ONNX file."""

import json

import keras
import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from keras import layers
from onnx import numpy_helper

from normswap.cli import main

pytestmark = [
    pytest.mark.keras,
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a trained-looking model file and data."""
    path = tmp_path_factory.mktemp("cli")
    rng = np.random.default_rng(0)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3), name="image"),
            layers.Conv2D(8, 3, padding="same", name="conv"),
            layers.BatchNormalization(name="bn"),
            layers.ReLU(),
            layers.GlobalAveragePooling2D(),
            layers.Dense(3, activation="softmax", name="scores"),
        ]
    )
    norm = model.get_layer("bn")
    norm.set_weights([rng.uniform(0.5, 2, 8) for _ in range(4)])
    model.save(path / "net.keras")
    np.savez(path / "data.npz", x=rng.integers(0, 255, (48, 8, 8, 3), np.uint8), y=rng.integers(0, 3, 48))
    return path


@pytest.fixture
def run(folder, monkeypatch):
    """A function that runs a command in the folder and returns its JSON, or its exit code and stderr."""
    monkeypatch.chdir(folder)

    def invoke(*arguments, code=0):
        result = CliRunner().invoke(main, [*map(str, arguments), "--json"])
        assert result.exit_code == code, result.stderr
        return json.loads(result.stdout)

    return invoke


def test_inspect(run):
    """A Keras file tells its own shapes, and its values what replacing each layer is expected to change."""
    (site,) = run("inspect", "net.keras")["sites"]
    drift = site.pop("drift")

    assert 0 < drift["sn"] < drift["gn"] < drift["in"] < 1
    assert [site] == [
        {
            "name": "bn",
            "aliases": [],
            "type": "BatchNormalization",
            "channels": 8,
            "shape": [8, 8],
            "patched_to": None,
            "obstacle": "",
        }
    ]


@pytest.mark.parametrize("options", [["sn", "--batch-statistics", "frozen"], ["brn"], ["gn"], ["in"]])
def test_the_whole_job(run, tmp_path, options):
    """Patch, calibrate, fine-tune by distillation, export and evaluate: file and bundle score alike."""
    calibrate = [] if options == ["brn"] else ["--calibrate", "data.npz"]
    patched = run("patch", "net.keras", "--to", *options, *calibrate, "-o", tmp_path / "b")
    assert patched["replaced"] == ["bn"]
    assert [each["name"] for each in patched.get("drift", ())] == (["bn", "output"] if calibrate else [])
    tuned = run("finetune", tmp_path / "b", "--data", "data.npz", "--distill", "--steps", 3, "--batch-size", 16,
                "-o", tmp_path / "t")  # fmt: skip
    assert tuned["steps"] == 3
    exported = run("export", tmp_path / "t", "-o", tmp_path / "m.onnx")
    assert exported["verdict"]["passed"]
    assert exported["folded"] == ({"bn": "Conv"} if options == ["brn"] else {})

    found = [run("evaluate", path, "--data", "data.npz") for path in (tmp_path / "t", tmp_path / "m.onnx")]

    assert found[0]["top1"] == found[1]["top1"]
    assert run("verify", tmp_path / "t", tmp_path / "m.onnx", "--data", "data.npz")["passed"]


DRAWN = """
import keras
from keras import layers

def build(): # its weights are others each time
    return keras.Sequential([keras.Input((8, 8, 3)), layers.Conv2D(8, 3), layers.BatchNormalization(), layers.ReLU(),
                             layers.GlobalAveragePooling2D(), layers.Dense(3)])
"""


def test_a_source_without_a_seed(run, folder, tmp_path):
    """The original in a bundle is the model that was patched, and what it is elsewhere is another one."""
    (folder / "drawn.py").write_text(DRAWN)
    model = "drawn.py:build", "--input-shape", "8,8,3"
    patched = run("patch", *model, "--to", "brn", "--data", "data.npz", "-o", tmp_path / "b")
    assert [each["rms"] for each in patched["drift"]] == [0.0, 0.0]
    assert run("evaluate", tmp_path / "b", "--data", "data.npz")["n"] == 48

    run("export", *model, "-o", tmp_path / "m.onnx")
    assert run("verify", "drawn.py:build", tmp_path / "m.onnx", code=3)["error"] == (
        f"expected a MODEL with the weights that {tmp_path}/m.onnx was made of, received drawn.py:build, which has "
        "other ones each time it is built; give --weights, or a bundle"
    )


def test_a_loaded_bundle_knows_what_was_patched(run, tmp_path):
    """A GroupNorm of a bundle is known to have been a BatchNorm, and is not patched again."""
    run("patch", "net.keras", "--to", "gn", "-o", tmp_path / "b")

    assert [site["patched_to"] for site in run("inspect", tmp_path / "b")["sites"]] == ["gn"]
    assert "already patched to gn" in run("patch", tmp_path / "b", "--to", "sn", "-o", tmp_path / "c", code=4)["error"]


def test_verify_names_the_layer(run, tmp_path):
    """Each initializer of a good file off by a hundredth exits 5 with the layer's name."""
    run("patch", "net.keras", "--to", "sn", "-o", tmp_path / "b")
    run("export", tmp_path / "b", "-o", tmp_path / "m.onnx")
    named = set()
    for index, initializer in enumerate(onnx.load(tmp_path / "m.onnx").graph.initializer):
        values = numpy_helper.to_array(initializer)
        if values.dtype != np.float32 or values.size < 3 or not values.any():
            continue
        proto = onnx.load(tmp_path / "m.onnx")
        proto.graph.initializer[index].CopyFrom(numpy_helper.from_array(values * np.float32(1.01), initializer.name))
        onnx.save(proto, tmp_path / "bad.onnx")
        named.add(run("verify", tmp_path / "b", tmp_path / "bad.onnx", code=5)["first_diverging"])

    assert named == {"conv", "bn", "scores"}


def test_resuming_gives_the_uninterrupted_run(run, tmp_path):
    """Three steps and three more are six, bit for bit."""
    run("patch", "net.keras", "--to", "brn", "-o", tmp_path / "b")
    common = ["finetune", tmp_path / "b", "--data", "data.npz", "--batch-size", 16, "--checkpoint-every", 3,
              "--lr", 0.05, "--train", "all", "--teacher", "none"]  # fmt: skip
    run(*common, "--steps", 6, "-o", tmp_path / "whole")

    from normswap.bundles.bundle import read
    from normswap.data.dataset import open_data
    from normswap.finetune.run import run as runs

    class StoppedError(Exception):
        pass

    def stop(step, loss):
        if step == 4:
            raise StoppedError

    settings = runs.Settings(steps=6, batch_size=16, lr=0.05, checkpoint_every=3)
    data = open_data("data.npz", read(tmp_path / "b").preprocessing)
    with pytest.raises(StoppedError):
        runs.finetune(tmp_path / "b", tmp_path / "parts", data, settings, on_step=stop)
    run(*common, "--steps", 6, "-o", tmp_path / "parts", "--resume")

    whole, parts = (read(tmp_path / name).model.get_weights() for name in ("whole", "parts"))
    assert all(map(np.array_equal, whole, parts))


def test_a_damaged_file(run, folder, tmp_path):
    """A truncated file is refused as damaged and nothing is written."""
    (tmp_path / "half.keras").write_bytes((folder / "net.keras").read_bytes()[:500])

    assert "received a truncated archive" in run("inspect", tmp_path / "half.keras", code=3)["error"]
