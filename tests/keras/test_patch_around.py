"""Models that hold the layers of a patched one compute and train what it does, whichever was patched."""

import keras
import numpy as np
import pytest
from keras import layers

from normswap.convert.targets import GroupNorm, SwitchNorm
from normswap.patchers.keras.around import models_around
from normswap.patchers.keras.patch import patch

from .models import output

pytestmark = pytest.mark.backends


class Wrapper(keras.Model):
    """A subclassed model around another."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def call(self, inputs, training=None):
        """Hand on what the other computes."""
        return self.inner(inputs, training=training)


def classifier(backbone):
    """Return a graph around a model."""
    inputs = keras.Input((8, 8, 3))
    return keras.Model(inputs, layers.Dense(2)(backbone(inputs)))


def features(backbone):
    """Return a graph over layers of a model, beside it."""
    return keras.Model(backbone.input, backbone.layers[3].output)


def around_twice(backbone):
    """Return a model around a model around another."""
    return Wrapper(keras.Sequential([keras.Input((8, 8, 3)), backbone]))


@pytest.mark.parametrize("target", [GroupNorm(), SwitchNorm("even")])
@pytest.mark.parametrize("build", [classifier, features, Wrapper, around_twice])
def test_models_around_are_traced_anew(build, target, make, images):
    """A model around that has predicted computes the new function at once, and after undo the old one."""
    backbone = make("functional")
    around = build(backbone)
    before = around.predict(images, verbose=0)
    report = patch(backbone, target)
    after = around.predict(images, verbose=0)
    np.testing.assert_allclose(after, output(around, images), rtol=1e-4, atol=1e-5)
    assert not np.allclose(after, before, atol=1e-3)
    report.undo()
    np.testing.assert_array_equal(around.predict(images, verbose=0), before)


def test_a_model_around_trains_the_replacements(make, images):
    """A compiled and trained model around goes on with its own optimizer, and the new variables learn."""
    backbone = make("functional")
    around, optimizer = classifier(backbone), keras.optimizers.SGD(0.1, momentum=0.9)
    around.compile(optimizer, "mse")
    around.fit(images, np.ones((4, 2)), verbose=0)
    patch(backbone, SwitchNorm("even"), example=images)
    before = [keras.ops.convert_to_numpy(each) for each in around.trainable_variables]
    around.fit(images, np.ones((4, 2)), verbose=0)
    after = [keras.ops.convert_to_numpy(each) for each in around.trainable_variables]
    assert around.optimizer is optimizer
    assert not any(map(np.array_equal, before, after))


def test_models_beside_are_left_alone(make):
    """A model of other layers is not one around."""
    backbone, beside = make("functional"), make("functional")
    around = classifier(backbone)
    assert models_around(backbone) == [around]
    assert models_around(beside) == []


def test_a_model_that_was_never_finished_is_no_hindrance(make):
    """A model whose constructor raised, and which something still holds, is passed over."""
    half = Wrapper.__new__(Wrapper)
    backbone = make("functional")
    around = classifier(backbone)
    assert models_around(backbone) == [around]
    assert "built" not in vars(half)
