"""A stranger's Keras bundle runs no code of its author, whether Keras can read its file by itself or not."""

import json

import keras
import numpy as np
import pytest
from click.testing import CliRunner

import normswap
from normswap.bundles import bundle
from normswap.bundles.source import load_model
from normswap.cli import main
from normswap.errors import InputError
from normswap.finetune.run.figures import gates
from normswap.formats.seal import sealed
from normswap.sources.files import sha256

from ..helpers import exactly
from ..strangers import PAYLOAD, commands, invoke, marks, refusal, stranger, work_in, write_own
from .models import output
from .test_bundles import CODE

# Keras's own saving converts variables this way.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with code, bundles of it whose file Keras can read ("graph") and cannot ("Net"), a file, and data."""
    path = tmp_path_factory.mktemp("own")
    bundles = {name: [name, "--to", "sn", "--input-shape", "8,8,3"] for name in ("Net", "graph")}
    write_own(path, CODE, bundles, exported="graph")
    return path


@pytest.fixture
def folder(written, tmp_path, monkeypatch):
    """The working folder."""
    return work_in(tmp_path, written, monkeypatch)


@pytest.mark.parametrize("source", ["payload.py:build", "working_folder:build", "sys:exit", "timm:hf-hub:stranger/x"])
def test_no_code(written, folder, source):
    """A file whose classes code alone knows is refused by every command that needs the model, and in Python."""
    path, named = stranger(written / "Net", folder, source)

    for command in commands(path).values():
        assert (command[0], *invoke(*command)) == (command[0], 3, f"error: {refusal(path, named)}\n")
    with pytest.raises(
        InputError, match=exactly(refusal(path, named, "pass trust_code=True, or a fresh model as model="))
    ):
        normswap.load(path)
    assert invoke("plot", path, "-o", "plot.png")[0] == 0
    assert marks(folder) == []
    assert not (folder / "new").exists()


@pytest.mark.parametrize("command", [["plot", "-o", "plot.png"], ["export", "-o", "new"]])
def test_no_module_of_the_working_folder(written, folder, command):
    """Where a file is read in a process of its own, that does not look for libraries there, as Python would."""
    path, _ = stranger(written / "graph", folder, "payload.py:build")
    for name in ("h5py", "numpy", "zipfile"):
        (folder / f"{name}.py").write_text(PAYLOAD)
    code, said = invoke(command[0], path, *command[1:])

    assert code == 0, said
    assert marks(folder) == []


@pytest.mark.parametrize("command", [["plot", "-o", "plot.png"], ["export", "-o", "new"]])
def test_a_damaged_archive(written, folder, command):
    """A flipped byte of the weights is told, also where the manifest lists the file as it is."""
    path, _ = stranger(written / "graph", folder, "payload.py:build")
    file, manifest = path / "model.keras", json.loads((path / "normswap.json").read_text())
    content = bytearray(file.read_bytes())
    content[content.index(b"\x89HDF") + 1000] ^= 1
    file.write_bytes(content)
    manifest["sha256"]["model.keras"] = sha256(file)
    del manifest["seal"]
    (path / "normswap.json").write_text(json.dumps(sealed(manifest)))

    message = (
        f"expected a Keras model in {file}, received a damaged file: model.weights.h5 is not what its checksum says; "
        "get the file once more"
    )
    assert invoke(command[0], path, *command[1:]) == (3, f"error: {message}\n")


def test_a_file_that_keras_reads_by_itself(written, folder, images):
    """Nothing of the source is run, and what is saved of the model does not answer for it either."""
    path, _ = stranger(written / "graph", folder, "payload.py:build")
    model = normswap.load(path)
    normswap.save(model, "again")

    np.testing.assert_array_equal(output(normswap.load("again"), images), output(model, images))
    assert bundle.read("again").trust.own is False
    assert marks(folder) == []


def test_trusted(written, folder, images):
    """With trust in the code the model is built by it; so is its original."""
    path, _ = stranger(written / "Net", folder, "payload.py:Net")
    (path / "payload.py").write_text(CODE)
    opened = bundle.read(path, trust_code=True)

    np.testing.assert_array_equal(output(opened.model, images), output(normswap.load(written / "Net"), images))
    assert output(opened.original(), images).shape == (4, 3)


def test_classes_that_the_reader_has_registered(tmp_path, monkeypatch):
    """A stranger's source does not hide what the reader's own code has registered, which a file may need."""
    objects = dict(keras.saving.get_custom_objects())
    monkeypatch.setattr("keras.src.saving.object_registration.GLOBAL_CUSTOM_OBJECTS", objects)
    (tmp_path / "mine").mkdir()
    code = "import keras\n\n@keras.saving.register_keras_serializable()\nclass Own(keras.layers.Layer):\n"
    code += "    def call(self, x):\n        return 2 * x\n\ndef build():\n    return keras.Sequential("
    code += "[keras.Input((4,)), keras.layers.BatchNormalization(), Own()])\n"
    (tmp_path / "mine" / "own_layer.py").write_text(code)
    report = normswap.patch(load_model(f"{tmp_path}/mine/own_layer.py:build"), "brn")
    normswap.save(report, tmp_path / "b")
    path, _ = stranger(tmp_path / "b", tmp_path, "payload.py:build")

    assert type(normswap.load(path).layers[-1]).__name__ == "Own"
    assert marks(tmp_path) == []


@pytest.mark.parametrize("name", ["Net", "graph"])
def test_gates_without_the_model(written, folder, name):
    """`plot` tells the gates that the model has, by their layers' names, from the file's numbers alone."""
    model = normswap.load(written / name)
    switches = [each for each in model._flatten_layers() if hasattr(each, "gates")]
    for number, layer in enumerate(switches):
        layer.mean_weight.assign([number, 1.0, 2.0])
        layer.var_weight.assign([1.0, -number, 0.0])
    normswap.save(model, "b")
    result = CliRunner().invoke(main, ["plot", "b", "-o", "plot.png", "--json"])
    told, wanted = json.loads(result.stdout)["gates"], list(gates(model).values())
    sites = [choice.name for choice in bundle.read("b").recipe.choices]

    assert list(told) == sites
    for found, expected in zip(told.values(), wanted, strict=True):
        np.testing.assert_allclose([found["mean"], found["variance"]], expected, rtol=1e-5)


def test_norms_without_the_model(folder):
    """`inspect` tells what was left too, in models in models."""
    inner = keras.Sequential(
        [keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3), keras.layers.BatchNormalization(name="deep")], name="inner"
    )
    inputs = keras.Input((8, 8, 3))
    x = keras.layers.BatchNormalization(name="first")(inner(inputs))
    model = keras.Model(inputs, keras.layers.BatchNormalization(name="last")(x))
    normswap.save(normswap.patch(model, "gn", include="first"), "b")
    result = CliRunner().invoke(main, ["inspect", "b", "--json"])
    keys = "name", "type", "channels", "patched_to"

    assert [tuple(site[key] for key in keys) for site in json.loads(result.stdout)["sites"]] == [
        ("first", "BatchNormalization", 4, "gn"),
        ("inner/deep", "BatchNormalization", 4, None),
        ("last", "BatchNormalization", 4, None),
    ]
