"""Bundles of Keras models that code builds: classes Keras does not know, and layers it names itself."""

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

from ..helpers import exactly
from .models import output

# Keras's own saving converts variables this way.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)

CODE = """
import keras
from keras import layers

class Net(keras.Model):
    def __init__(self):
        super().__init__()
        norms = [layers.BatchNormalization() for _ in range(2)]
        self.parts = [layers.Conv2D(4, 3), norms[0], layers.Conv2D(6, 3), norms[1]]
        self.head = layers.Dense(3)

    def call(self, inputs, training=None):
        x = inputs
        for part in self.parts:
            x = part(x, training=training) if isinstance(part, layers.BatchNormalization) else part(x)
        return self.head(keras.ops.mean(x, (1, 2)))

def graph():
    inputs = keras.Input((8, 8, 3))
    x = layers.BatchNormalization()(layers.Conv2D(4, 3)(inputs))
    return keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling2D()(layers.BatchNormalization()(x))))
"""


@pytest.fixture
def code(tmp_path, monkeypatch):
    """A folder with the code and data, in which commands run."""
    rng = np.random.default_rng(0)
    (tmp_path / "net.py").write_text(CODE)
    np.savez(tmp_path / "data.npz", x=rng.integers(0, 255, (16, 8, 8, 3), np.uint8), y=rng.integers(0, 3, 16))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments):
    """Run a command and return its JSON."""
    result = CliRunner().invoke(main, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("name", ["Net", "graph"])
def test_the_whole_job_on_code(name, code):
    """Patched, calibrated, distilled and exported from the command line: original and patched layers are matched."""
    patched = run(
        "patch", f"net.py:{name}", "--to", "gn", "--input-shape", "8,8,3", "--calibrate", "data.npz", "-o", "b"
    )
    assert {residual["name"] for residual in patched["calibration"]} >= set(patched["replaced"])
    assert [site["patched_to"] for site in run("inspect", "b")["sites"]] == ["gn", "gn"]
    run("finetune", "b", "--data", "data.npz", "--distill", "--steps", 2, "--batch-size", 8, "-o", "t")
    assert run("export", "t", "-o", "m.onnx")["verdict"]["passed"]


@pytest.mark.parametrize("name", ["Net", "graph"])
def test_the_original_is_the_model_that_was_patched(name, code, images):
    """Code that draws other weights each time is no other original."""
    run("patch", f"net.py:{name}", "--to", "brn", "--input-shape", "8,8,3", "-o", "b")
    opened = bundle.read("b")

    np.testing.assert_allclose(output(opened.model, images), output(opened.original(), images), rtol=1e-5, atol=1e-6)


def test_a_bundle_without_a_source(code, images):
    """A class that Keras does not know is refused, unless a fresh model is given, which gets recipe and weights."""
    model, fresh = load_model("net.py:Net"), load_model("net.py:Net")
    assert output(model, images).shape == output(fresh, images).shape
    report = normswap.patch(model, "sn")
    bundle.save(report, "b")
    with pytest.raises(InputError, match=r"received a file Keras refuses: .*Could not locate class 'Net'"):
        normswap.load("b")
    opened = bundle.read("b", model=fresh)
    np.testing.assert_array_equal(output(opened.model, images), output(model, images))
    bundle.save(opened, "c")
    again = load_model("net.py:Net")
    output(again, images)
    np.testing.assert_array_equal(output(normswap.load("c", model=again), images), output(model, images))


def test_a_model_that_does_not_fit(code, images):
    """A fresh model with other layers is refused."""
    model = load_model("net.py:Net")
    output(model, images)
    bundle.save(normswap.patch(model, "sn"), "b")
    other = load_model("net.py:graph")
    message = (
        "expected a recipe made for this model, received one that does not fit:\n"
        "  batch_normalization_1: 6 channels in the recipe, 4 in the model"
    )
    with pytest.raises(InputError, match=exactly(message)):
        normswap.load("b", model=other)


REGISTERED = """
import keras
from keras import layers

@keras.saving.register_keras_serializable()
class Scaled(layers.Layer):
    def call(self, x):
        return x * {}

def build():
    return keras.Sequential([keras.Input((4,)), layers.BatchNormalization(), Scaled()])
"""


def test_classes_of_one_name(tmp_path, monkeypatch):
    """Each bundle has the class of its source's code, whatever else is registered by that name, and keeps it."""
    objects = dict(keras.saving.get_custom_objects())
    monkeypatch.setattr("keras.src.saving.object_registration.GLOBAL_CUSTOM_OBJECTS", objects)
    for name, scale in (("a", 2), ("b", 3)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "scaled_by.py").write_text(REGISTERED.format(scale))
        source = f"{tmp_path}/{name}/scaled_by.py:build"
        bundle.save(normswap.patch(load_model(source), "brn"), tmp_path / name / "bundle", source=source)
    x = np.full((2, 4), 5.0, "float32")

    for name, scale in (("a", 2), ("b", 3), ("a", 2)):
        model = normswap.load(tmp_path / name / "bundle")
        np.testing.assert_allclose(output(model, x), 5 * scale, rtol=1e-2)
        normswap.save(model, tmp_path / name / "again", overwrite=True)
        np.testing.assert_allclose(output(normswap.load(tmp_path / name / "again"), x), 5 * scale, rtol=1e-2)
