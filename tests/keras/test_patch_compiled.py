"""Compiled models, and models that Keras saves as the arguments of their class."""

import copy
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers

from normswap.convert.targets import SwitchNorm, as_target
from normswap.errors import UnsupportedError
from normswap.patchers.keras.patch import patch
from normswap.patchers.keras.sites import find_sites

from ..helpers import exactly
from .models import Backbone, Block, Net, output

pytestmark = [
    pytest.mark.backends,
    # Keras's own saving converts variables this way.
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
]

TARGETS = ["brn", "sn", "gn"]
LOAD = """
import pathlib, sys
import keras, numpy
import normswap.patchers.keras.patch, tests.keras.models
folder = pathlib.Path(sys.argv[1])
expected = numpy.load(folder / "expected.npz")
for path in sorted(folder.glob("*.keras")):
    found = keras.models.load_model(path)(expected["x"], training=False)
    print(path.stem, (keras.ops.convert_to_numpy(found) == expected[path.stem]).all())
"""


@pytest.fixture
def fit(images):
    """Return the function that trains a model for two steps."""
    return lambda model: model.fit(images, np.ones((4, 3)), epochs=2, verbose=0)


@pytest.mark.parametrize("kind", ["functional", "nested", "subclassed"])
def test_traced_functions_are_dropped(kind, make, images):
    """A model that has predicted and evaluated computes the new function at once, and the old one again after undo."""
    model = make(kind)
    labels = np.zeros_like(output(model, images))
    model.compile(loss="mse")

    def results():
        return model.predict(images, verbose=0), model.evaluate(images, labels, verbose=0)

    before = results()
    report = patch(model, SwitchNorm("even"))
    predicted, loss = results()
    np.testing.assert_allclose(predicted, output(model, images), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(loss, np.mean(np.square(predicted)), rtol=1e-4)
    assert not np.allclose(predicted, before[0], atol=1e-3)
    report.undo()
    np.testing.assert_array_equal(results()[0], before[0])
    assert results()[1] == before[1]


@pytest.mark.parametrize("target", TARGETS)
def test_a_compiled_model_trains_on(target, make, fit, images):
    """After a patch in mid-training fit goes on: every variable trains; optimizer, step, loss and metrics stay."""
    model, optimizer = make("functional"), keras.optimizers.Adam(1e-3)
    model.compile(optimizer, "mse", metrics=["mae"])
    fit(model)
    report = patch(model, as_target(target))
    kernel = model.layers[1].kernel
    moment = next(v for v in optimizer.variables if v.path.endswith("conv2d_kernel_momentum")).numpy()
    assert model.optimizer is optimizer
    assert int(optimizer.iterations.numpy()) == 2
    assert np.any(moment)
    before = [v.numpy() for v in model.trainable_variables]
    assert set(fit(model).history) == {"loss", "mae"}
    assert int(optimizer.iterations.numpy()) == 4
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
    with pytest.raises(UnsupportedError, match=exactly(message)):
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
    model, optimizer = make("functional"), keras.optimizers.SGD()
    model.compile(optimizer, "mse")
    patch(model, SwitchNorm())
    assert model.optimizer is optimizer
    fit(model)


def nested_backbone():
    """Return a graph of a custom layer and a Functional subclass."""
    inputs = keras.Input((8, 8, 3))
    return keras.Model(inputs, layers.Dense(2)(Backbone(name="backbone")(Block(name="block")(inputs))))


def built_net():
    """Return a subclassed model, built by a call."""
    model = Net(name="net")
    model(np.zeros((1, 8, 8, 3), "float32"))
    return model


BUILDS = [Backbone, nested_backbone, built_net]


def test_classes_load_in_a_fresh_process(train, images, tmp_path):
    """A .keras file of classes that rebuild their layers loads bit-equal, with no custom_objects."""
    expected = {}
    for build in BUILDS:
        for target in TARGETS:
            model, name = train(build()), f"{build.__name__}-{target}"
            patch(model, as_target(target))
            model.save(tmp_path / f"{name}.keras")
            expected[name] = output(model, images)
    np.savez(tmp_path / "expected.npz", x=images, **expected)
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", LOAD, str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.stdout.split() == [word for name in sorted(expected) for word in (name, "True")], done.stderr


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("target", TARGETS)
def test_copies_and_weight_files_compute_the_same(build, target, train, images, tmp_path):
    """Copies compute the same and know their replacements; .weights.h5 goes back into the model."""
    model = train(build())
    report = patch(model, as_target(target))
    twin, expected = copy.deepcopy(model), output(model, images)
    np.testing.assert_array_equal(output(twin, images), expected)
    assert {site.kind for site in find_sites(twin)[1]} == {target}
    assert patch(twin, as_target(target)).summary == f"0 replaced, {len(report.replaced)} already patched, 0 skipped"
    model.save_weights(tmp_path / "m.weights.h5")
    for variable in model.weights:
        variable.assign(variable + 1.0)
    model.load_weights(tmp_path / "m.weights.h5")
    np.testing.assert_array_equal(output(model, images), expected)


def test_class_and_attributes_survive(make, images):
    """A patched Functional subclass is of its class, with the name and all it held; undo gives back the very class."""
    model = make("backbone")
    patch(copied := copy.deepcopy(model), SwitchNorm())
    for patched in (copied, copy.deepcopy(copied)):
        assert isinstance(patched, Backbone)
        assert type(patched).__name__ == "Backbone"
        assert (patched.name, patched.width, patched.presets) == ("backbone", 4, {"tiny": {"width": 4}})
    report = patch(model, SwitchNorm())
    report.undo()
    assert type(model) is Backbone
    np.testing.assert_array_equal(output(copy.deepcopy(model), images), output(model, images))
