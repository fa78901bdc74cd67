"""Where BatchNorms sit in Keras models, how they are called, what is beside them, their axis."""

import keras
import numpy as np
import pytest
from keras import layers

from normswap.convert.targets import BatchRenorm, GroupNorm, SwitchNorm, as_target
from normswap.patchers.keras.patch import patch
from normswap.patchers.keras.sites import find_sites

from .models import batch_norms, output

pytestmark = pytest.mark.backends

TARGETS = ["brn", "sn", "gn"]
SITES = {
    "functional": ["bn1", "bn2"],
    "sequential": ["bn1", "bn2"],
    "nested": ["middle/inner/bn", "middle/bn"],
    "shared": ["bn"],
    "time_distributed": ["each/bn"],
    "custom": ["block/norm"],
    "subclassed": ["norm"],
    "backbone": ["bn1", "bn2"],
}
EVERY_MODEL = pytest.mark.parametrize(("kind", "names"), SITES.items(), ids=SITES)


@EVERY_MODEL
@pytest.mark.parametrize("target", TARGETS)
def test_every_batch_norm_is_replaced_and_comes_back(kind, names, target, make, images):
    """In models of every kind all sites are found by name, BatchRenorm changes no bit, and undo restores all."""
    model = make(kind)
    weights, before, count = model.get_weights(), output(model, images), len(batch_norms(model))
    report = patch(model, as_target(target))
    assert [d.site.name for d in report.replaced] == names
    assert len(report.replaced) == count
    assert batch_norms(model) == []
    after = output(model, images)
    if target == "brn":
        np.testing.assert_array_equal(after, before)
    else:
        assert not np.array_equal(after, before)
        assert np.isfinite(after).all()
    report.undo()
    assert all(map(np.array_equal, model.get_weights(), weights))
    assert len(batch_norms(model)) == count
    np.testing.assert_array_equal(output(model, images), before)


@EVERY_MODEL
def test_patching_again_changes_nothing(kind, names, make):
    """A second patch to the same target reports what is there and writes no weight."""
    model = make(kind)
    patch(model, GroupNorm())
    weights = model.get_weights()
    assert patch(model, GroupNorm()).summary == f"0 replaced, {len(names)} already patched, 0 skipped"
    assert all(map(np.array_equal, model.get_weights(), weights))


@EVERY_MODEL
def test_a_recipe_gives_a_copy_the_same_bits(kind, names, make, images):
    """Replayed on a fresh model with the same weights, a mixed recipe gives the same output bit for bit."""
    first, second = make(kind), make(kind)
    second.set_weights(first.get_weights())
    for name, target in zip(names, (SwitchNorm("even"), GroupNorm()), strict=False):
        recipe = patch(first, target, include=[name]).recipe
        patch(second, recipe)
    np.testing.assert_array_equal(output(first, images), output(second, images))


@pytest.mark.parametrize("target", TARGETS)
def test_arguments_recorded_in_the_graph_are_passed(target, train, images):
    """A graph that passes ``training=False`` and a mask to its BatchNorm goes on working, at inference and in fit."""
    inputs = keras.Input((8, 8, 3))
    x = layers.Masking()(layers.Reshape((8, 24))(inputs))
    x = layers.BatchNormalization(name="bn")(x, training=False)
    model = train(keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling1D()(x))))
    before = output(model, images)
    patch(model, as_target(target))
    if target == "brn":
        np.testing.assert_array_equal(output(model, images), before)
    assert output(model, images).shape == before.shape
    model.compile("sgd", "mse")
    model.fit(images, np.ones((4, 3)), epochs=1, verbose=0)


class InferenceOnly(layers.Layer):
    """A layer whose code keeps its BatchNorm at inference."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.norm = layers.BatchNormalization(name="norm")

    def call(self, inputs):
        """Normalize by the moving statistics."""
        return self.norm(inputs, training=False)


def moved(target, train, images, norm, body):
    """Return by how much one step of fit moves the moving mean of a BatchNorm, patched unless ``target`` is None."""
    inputs = keras.Input((8, 8, 3))
    model = train(keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling2D()(body(inputs)))))
    if target is not None:
        patch(model, target)
    before, gamma = norm.moving_mean.numpy(), norm.gamma.numpy()
    model.compile("sgd", "mse")
    model.fit(images, np.ones((4, 3)), epochs=1, verbose=0)
    assert np.array_equal(norm.gamma.numpy(), gamma) != norm.trainable
    return norm.moving_mean.numpy() - before


@pytest.mark.parametrize("target", [BatchRenorm(), SwitchNorm()])
def test_inference_mode_is_what_it_was(target, train, images):
    """``training=False`` in a graph, and ``trainable=False``, mean to the replacement what they do to a BatchNorm.

    Keras 3.15 does not keep to ``training=False`` in a graph when the model is called with ``training=True``.
    """
    for trainable in (True, False):
        results = []
        for kind in (None, target):
            norm = layers.BatchNormalization(trainable=trainable)
            results.append(moved(kind, train, images, norm, lambda x, norm=norm: norm(x, training=False)))
        np.testing.assert_allclose(results[1], results[0], rtol=1e-5, atol=1e-7)
    assert not results[1].any()


@pytest.mark.parametrize("target", [BatchRenorm(), SwitchNorm()])
def test_inference_mode_in_code_stays(target, train, images):
    """A BatchNorm that code calls with ``training=False`` keeps its statistics in fit, and so does a replacement."""
    layer = InferenceOnly()
    assert not moved(target, train, images, layer.norm, layer).any()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", ["nested", "backbone", "subclassed"])
def test_other_weights_are_the_same_variables(kind, target, make):
    """Every variable that is not a norm's is the same object under the same path, with the same value."""
    model = make(kind)
    norms = {variable.path for layer in batch_norms(model) for variable in layer.variables}
    before = {v.path: (v, v.numpy()) for v in model.variables if v.path not in norms}
    patch(model, as_target(target), mode=None)
    after = {v.path: v for v in model.variables}
    assert before
    for path, (variable, value) in before.items():
        assert after[path] is variable
        np.testing.assert_array_equal(variable.numpy(), value)


@pytest.mark.parametrize(
    ("shape", "axis", "spatial"),
    [
        ((4, 6, 8), 1, (6, 8)),
        ((4, 6, 8), 2, (4, 8)),
        ((4, 6, 8), -1, (4, 6)),
        ((3, 4, 5, 6), -1, (3, 4, 5)),
        ((6,), -1, ()),
    ],
)
def test_channels_stay_on_their_axis(shape, axis, spatial, train):
    """The channels stay where they are, in inputs of 2 to 5 dimensions: on the batch gate alone nothing changes."""
    model = train(keras.Sequential([keras.Input(shape), layers.BatchNormalization(axis)]))
    x = np.random.default_rng(1).normal(size=(2, *shape)).astype("float32")
    before = output(model, x)
    assert find_sites(model)[1][0].spatial == spatial
    patch(model, SwitchNorm("exact"))
    np.testing.assert_allclose(output(model, x), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 6, 4), (3, 5, 6, 4)])
def test_a_channels_first_group_norm_is_its_channels_last_twin(shape, train):
    """A channels-first GroupNorm computes what its channels-last twin does."""
    x = np.random.default_rng(1).normal(size=(2, *shape)).astype("float32")
    first = train(keras.Sequential([keras.Input((shape[-1], *shape[:-1])), layers.BatchNormalization(1)]))
    last = train(keras.Sequential([keras.Input(shape), layers.BatchNormalization(-1)]))
    for model in (first, last):
        patch(model, GroupNorm(2))
    turned = np.moveaxis(output(first, np.moveaxis(x, -1, 1)), 1, -1)
    np.testing.assert_allclose(turned, output(last, x), rtol=1e-5, atol=1e-5)
