"""Models whose classes leave it to Keras to number their layers load in any process, however often."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import normswap
from normswap.bundles.bundle import read
from normswap.convert.targets import as_target
from normswap.patchers.keras.patch import patch

from .models import output

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)


@keras.saving.register_keras_serializable(package="normswap-tests")
class Unnamed(keras.Model):
    """A subclassed model of layers without names, one BatchNorm of which stays one."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.blocks = [
            (layers.Conv2D(width, 3, use_bias=False), layers.BatchNormalization(trainable=width < 16))
            for width in (4, 16, 8)
        ]
        self.head = layers.Dense(3)

    def call(self, inputs, training=None):
        """Compute the logits."""
        for first, norm in self.blocks:
            inputs = ops.relu(norm(first(inputs), training=training))
        return self.head(ops.mean(inputs, (1, 2)))


def built(train, images):
    """Return the model, built and with the values of a trained one."""
    model = Unnamed(name="net")
    model(images)
    return train(model)


def patched(model, target, images):
    """Patch all norms of the model but the second, and return the report."""
    second = model.blocks[1][1].name
    return patch(model, as_target(target), example=images, exclude=[second])


@pytest.mark.backends
@pytest.mark.parametrize("target", ["brn", "sn", "gn"])
def test_a_file_loads_under_other_numbers(target, train, images, tmp_path):
    """Keras's own load_model gives the very model each time, with the norms replaced that were, and no others."""
    model = built(train, images)
    patched(model, target, images)
    model.save(tmp_path / "m.keras")
    for _ in range(2):
        loaded = keras.models.load_model(tmp_path / "m.keras")
        np.testing.assert_array_equal(output(loaded, images), output(model, images))
        kinds = [type(norm).__name__ for _, norm in loaded.blocks]
        assert kinds == [type(norm).__name__ for _, norm in model.blocks]


@pytest.mark.parametrize("around", [False, True])
def test_a_bundle_loads_again_and_again(around, train, images, tmp_path):
    """A bundle loads as often as one likes in a process, its recipe with the names that the layers have there."""
    model = built(train, images)
    if around:
        inputs = keras.Input((8, 8, 3))
        model = keras.Model(inputs, layers.Dense(2, name="outer")(model(inputs)))
    report = patch(model, as_target("sn"), example=images)
    normswap.save(report, tmp_path / "b")
    for _ in range(2):
        bundle = read(tmp_path / "b")
        np.testing.assert_array_equal(output(bundle.model, images), output(model, images))
        found = {site.site.name: site.action for site in normswap.plan(bundle.model, "sn").decisions}
        assert {choice.name for choice in bundle.recipe.choices} == set(found)
        assert set(found.values()) == {"done"}
        assert [each.target for each in bundle.recipe.choices] == [each.target for each in report.recipe.choices]
