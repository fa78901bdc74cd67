"""What a patched Keras model lives through: copies, masks, saving and loading."""

import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from normswap.convert.targets import BatchRenorm, GroupNorm, as_target
from normswap.errors import UnsupportedError
from normswap.patchers.keras.patch import patch
from normswap.patchers.keras.sites import find_sites

from .models import output

pytestmark = [
    pytest.mark.keras,
    # Keras's own saving converts variables this way.
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
]

FILED = ["functional", "sequential", "nested", "shared", "time_distributed"]
"""Kinds of models that Keras can save without their code."""

LOAD = """
import pathlib, sys
import keras, numpy
import normswap.layers.keras
folder = pathlib.Path(sys.argv[1])
expected = numpy.load(folder / "expected.npz")
models = {path.stem: keras.models.load_model(path) for path in folder.glob("*.keras")}
equal = all((model(expected["x"]).numpy() == expected[name]).all() for name, model in models.items())
print(len(models), "equal" if equal else "different")
"""


@pytest.mark.parametrize("kind", FILED)
def test_a_copy_leaves_the_model_alone(kind, make, images):
    """With inplace=False the model keeps its layers and values and the copy has the same weights elsewhere."""
    model = make(kind)
    weights, before = model.get_weights(), output(model, images)
    report = patch(model, BatchRenorm(), inplace=False)
    assert report.model is not model
    np.testing.assert_array_equal(output(report.model, images), before)
    np.testing.assert_array_equal(output(model, images), before)
    assert all(map(np.array_equal, model.get_weights(), weights))
    assert {type(layer) for layer in find_sites(model)[0]} == {layers.BatchNormalization}


def test_a_copy_remembers_what_was_patched(make):
    """A copy of a patched model is patched: its GroupNorms are not taken for foreign ones."""
    model = make("functional")
    patch(model, GroupNorm(), include=["bn1"])
    report = patch(model, GroupNorm(), inplace=False)
    assert report.summary == "1 replaced, 1 already patched, 0 skipped"


def test_a_masked_sequence(tmp_path, train):
    """A mask recorded in the graph stops no GroupNorm and reaches the layers behind, after loading too."""
    inputs = keras.Input((6,), dtype="int32")
    x = layers.BatchNormalization(name="bn")(layers.Embedding(9, 4, mask_zero=True)(inputs))
    model = train(keras.Model(inputs, layers.LSTM(3)(x)))
    patch(model, GroupNorm())
    tokens = np.array([[1, 2, 3, 4, 5, 0], [4, 5, 6, 7, 8, 1]])
    model.save(tmp_path / "m.keras")
    np.testing.assert_array_equal(output(keras.models.load_model(tmp_path / "m.keras"), tokens), output(model, tokens))
    seen = []
    model.layers[-1].compute_mask = lambda inputs, mask: seen.append(mask)
    model(tokens)
    assert keras.ops.convert_to_numpy(seen[0])[0].tolist() == [True] * 5 + [False]


def test_a_mask_given_by_code():
    """Custom code that passes a mask to its BatchNorm goes on doing so with a GroupNorm."""
    norm = layers.BatchNormalization(name="bn")
    x, mask = np.ones((2, 4, 6), "float32"), np.ones((2, 4), bool)
    norm(x)
    patch(norm, GroupNorm())
    assert norm(x, mask=mask, training=True).shape == (2, 4, 6)


def test_saved_files_load_in_a_fresh_process(tmp_path, make, images):
    """Where only the layers are imported, .keras files load bit-equal; .weights.h5 goes back into the model."""
    expected = {}
    for kind, target in [*((kind, "gn") for kind in FILED), ("functional", "sn"), ("functional", "brn")]:
        name, model = f"{kind}-{target}", make(kind)
        patch(model, as_target(target))
        model.save(tmp_path / f"{name}.keras")
        model.save_weights(tmp_path / f"{name}.weights.h5")
        expected[name] = output(model, images)
        for variable in model.weights:
            variable.assign(variable + 1.0)
        model.load_weights(tmp_path / f"{name}.weights.h5")
        np.testing.assert_array_equal(output(model, images), expected[name])
    np.savez(tmp_path / "expected.npz", x=images, **expected)
    done = subprocess.run([sys.executable, "-c", LOAD, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["7", "equal"], done.stderr


def test_a_loaded_model_knows_its_replacements(tmp_path, make):
    """Our layers are recognised by type after loading, so that patching again changes nothing."""
    for target in ("sn", "brn"):
        model = make("functional")
        patch(model, as_target(target))
        model.save(tmp_path / "m.keras")
        loaded = keras.models.load_model(tmp_path / "m.keras")
        assert patch(loaded, as_target(target)).summary == "0 replaced, 2 already patched, 0 skipped"


def test_a_class_that_cannot_be_saved_is_not_copied(make):
    """inplace=False says why it cannot and what to do instead."""

    class Local(keras.Model):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def call(self, inputs):
            return self.inner(inputs)

    model = Local(make("functional"))
    model(np.zeros((1, 8, 8, 3), "float32"))
    with pytest.raises(UnsupportedError) as error:
        patch(model, GroupNorm(), inplace=False)
    before, after = str(error.value).split("Local: ")[0], str(error.value).split("; ")[-1]
    assert before == "expected a model that Keras can save and load, which inplace=False needs, received "
    assert after == "patch the model itself, or a copy that your own code makes"


@pytest.mark.parametrize("kind", ["functional", "custom", "backbone", "subclassed"])
@pytest.mark.parametrize("target", ["brn", "sn", "gn"])
def test_a_saved_model_computes_the_same(kind, target, make, images, tmp_path):
    """TensorFlow runs what `model.export` wrote of a patched model as the model does."""
    model = make(kind)
    patch(model, as_target(target))
    model.export(tmp_path / "saved", verbose=False)
    loaded = tf.saved_model.load(tmp_path / "saved")
    np.testing.assert_allclose(loaded.serve(images), output(model, images), rtol=1e-5, atol=1e-5)
