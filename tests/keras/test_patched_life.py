"""What a patched Keras model lives through: copies, masks, training, undo, saving and loading."""

import re
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import layers

from normswap.convert.targets import BatchRenorm, GroupNorm, SwitchNorm, as_target
from normswap.errors import UnsupportedError
from normswap.patchers.keras import find_sites, patch

pytestmark = [
    pytest.mark.keras,
    # Keras's own saving converts variables this way.
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
]

TARGETS = ["brn", "sn", "gn"]
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


def output(model, x):
    """Return what the model computes at inference."""
    return keras.ops.convert_to_numpy(model(x, training=False))


@pytest.fixture
def fit(images):
    """Return the function that trains a model for two steps."""
    return lambda model: model.fit(images, np.ones((4, 3)), epochs=2, verbose=0)


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
    assert str(report) == "1 replaced, 1 already patched, 0 skipped"


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


@pytest.mark.parametrize("kind", ["functional", "nested", "subclassed"])
def test_traced_functions_are_dropped(kind, make, images):
    """A model that has predicted computes the new function at once, and the old one again after undo."""
    model = make(kind)
    before = model.predict(images, verbose=0)
    report = patch(model, SwitchNorm("even"))
    np.testing.assert_allclose(model.predict(images, verbose=0), output(model, images), rtol=1e-4, atol=1e-5)
    report.undo()
    np.testing.assert_array_equal(model.predict(images, verbose=0), before)


@pytest.mark.parametrize("target", TARGETS)
def test_a_compiled_model_trains_on(target, make, fit, images):
    """After a patch in mid-training fit goes on: every variable trains, and the optimizer keeps step and state."""
    model = make("functional")
    model.compile(keras.optimizers.Adam(1e-3), "mse")
    fit(model)
    report = patch(model, as_target(target))
    kernel = model.layers[1].kernel
    moment = next(v for v in model.optimizer.variables if v.path.endswith("conv2d_kernel_momentum")).numpy()
    assert int(model.optimizer.iterations.numpy()) == 2
    assert np.any(moment)
    before = [v.numpy() for v in model.trainable_variables]
    fit(model)
    assert int(model.optimizer.iterations.numpy()) == 4
    assert all(not np.array_equal(v.numpy(), old) for v, old in zip(model.trainable_variables, before, strict=True))
    assert model.layers[1].kernel is kernel
    if target == "brn":
        after = output(model, images)
        report.undo()
        np.testing.assert_array_equal(output(model, images), after)
        fit(model)
        return
    message = (
        "expected untrained replacements, received 2 that have changed since the patch "
        "(first: bn1); no BatchNorm computes what they do: reload the original model"
    )
    with pytest.raises(UnsupportedError, match=f"^{re.escape(message)}$"):
        report.undo()


def test_an_undone_model_trains_on(make, fit):
    """Undo before training gives the optimizer, still the same object, its old variables and state back."""
    model, optimizer = make("functional"), keras.optimizers.SGD(1e-3, momentum=0.9)
    model.compile(optimizer, "mse")
    fit(model)
    state = [variable.numpy() for variable in optimizer.variables]
    patch(model, SwitchNorm()).undo()
    assert model.optimizer is optimizer
    assert all(map(np.array_equal, [variable.numpy() for variable in optimizer.variables], state))
    fit(model)


def test_an_unbuilt_optimizer_is_left_alone(make, fit):
    """A model compiled but not trained yet keeps its optimizer object."""
    model = make("functional")
    optimizer = keras.optimizers.SGD()
    model.compile(optimizer, "mse")
    patch(model, SwitchNorm())
    assert model.optimizer is optimizer
    fit(model)


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
        assert str(patch(loaded, as_target(target))) == "0 replaced, 2 already patched, 0 skipped"


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
