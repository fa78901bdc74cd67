"""How the sites of a Keras model are named, seen and selected, and how recipes name them."""

import keras
import numpy as np
import pytest
from keras import layers

from normswap.convert.targets import GroupNorm, SwitchNorm
from normswap.errors import InputError
from normswap.patchers.keras.patch import patch
from normswap.patchers.keras.sites import find_sites
from normswap.patchers.patch import plan

from ..helpers import exactly
from .models import output


class Late(layers.Layer):
    """A layer that makes its BatchNorm when it is built."""

    def build(self, shape):
        """Make the BatchNorm."""
        self.norm = layers.BatchNormalization(name="norm")
        self.norm.build(shape)
        self.built = True

    def call(self, x):
        """Normalize."""
        return self.norm(x)


def test_layers_that_an_example_builds(images):
    """BatchNorms that come into being with the first call are found and replaced when an example is given."""
    model = keras.Sequential([layers.BatchNormalization(name="first"), Late(name="late")])
    report = patch(model, GroupNorm(), example=images)
    assert [decision.site.name for decision in report.replaced] == ["first", "late/norm"]
    assert not any(isinstance(layer, layers.BatchNormalization) for layer in model._flatten_layers())


def unnamed():
    """Return a model whose three BatchNorms Keras names, as InceptionV3's."""
    inputs = keras.Input((4, 4, 3))
    x = keras.Sequential([layers.BatchNormalization(), layers.Conv2D(5, 1)])(inputs)
    return keras.Model(inputs, layers.BatchNormalization()(layers.Conv2D(6, 1)(layers.BatchNormalization()(x))))


def test_variables_of_the_old_layer_vanish(make):
    """A GroupNorm leaves no moving statistics among the model's variables, and undo brings them back in order."""
    model = make("functional")
    names = [v.path for v in model.weights]
    report = patch(model, GroupNorm())
    assert not [v.path for v in model.variables if "moving" in v.path]
    report.undo()
    assert [v.path for v in model.weights] == names


def test_a_layer_held_twice_has_every_name():
    """A BatchNorm in two submodels is one site with an alias, and either name selects it."""
    norm, inputs = layers.BatchNormalization(name="bn"), keras.Input((8, 8, 3))
    parts = [keras.Sequential([keras.Input((8, 8, 3)), norm], name=name) for name in ("a", "b")]
    model = keras.Model(inputs, parts[1](parts[0](inputs)))
    (site,) = find_sites(model)[1]
    assert (site.name, site.aliases) == ("a/bn", ("b/bn",))
    assert len(patch(model, GroupNorm(), include=["b/*"]).replaced) == 1


def test_siblings_of_one_name_are_told_apart():
    """Names are unique even where a layer gives its children one name."""
    block = layers.Layer(name="block")
    block.children = [layers.BatchNormalization(name="norm") for _ in range(2)]
    assert [site.name for site in find_sites(block)[1]] == ["norm", "norm#2"]


def test_shapes(make, images):
    """Static shapes tell the spatial extent; where they do not, an example does."""
    assert [site.spatial for site in find_sites(make("sequential"))[1]] == [(6, 6), ()]
    model = keras.Sequential([keras.Input((None, None, 3)), layers.BatchNormalization()])
    assert find_sites(model)[1][0].spatial is None
    assert find_sites(model, images)[1][0].spatial == (8, 8)
    assert find_sites(make("time_distributed"))[1][0].spatial == (8,)


def test_selection(make):
    """Patterns and ``where`` choose the sites; those left out stay BatchNorms."""
    model = make("functional")
    decided = plan(model, GroupNorm(), exclude=["bn1"])
    assert [(d.site.name, d.action) for d in decided.decisions] == [("bn1", "skip"), ("bn2", "replace")]
    assert decided.decisions[0].note == "excluded"
    report = patch(model, GroupNorm(), where=lambda layer, name: layer.name == "bn1")
    assert [d.site.name for d in report.replaced] == ["bn1"]
    assert type(model.get_layer("bn2")) is layers.BatchNormalization


def test_a_recipe_knows_names_that_keras_made_up():
    """Built again in one process, a model has other names; its recipe is replayed on the same layers."""
    recipe = patch(unnamed(), SwitchNorm("even")).recipe
    recipe = plan(unnamed(), recipe).recipe()
    again = unnamed()
    assert not {choice.name for choice in recipe.choices} & {site.name for site in find_sites(again)[1]}
    report = patch(again, recipe)
    assert [d.site.channels for d in report.replaced] == [choice.channels for choice in recipe.choices] == [3, 5, 6]
    assert report.recipe.choices[0].name == find_sites(again)[1][0].name == "sequential_2/batch_normalization_6"


def test_a_part_of_the_made_up_names_is_not_guessed(images):
    """A recipe for one of two layers alike does not tell which it means under other numbers: both are named."""
    recipe = patch(unnamed(), GroupNorm(), include=["*batch_normalization_2"]).recipe
    message = (
        "expected a recipe with the names of this model, received one that names 1 of 2 layers that Keras numbers "
        "otherwise here: batch_normalization_2 in the recipe, batch_normalization_4, batch_normalization_5 in the "
        "model; build the model in a fresh process, or give its BatchNormalization layers names"
    )
    model = unnamed()
    x, before = images[:, :4, :4], output(model, images[:, :4, :4])
    with pytest.raises(InputError, match=exactly(message)):
        patch(model, recipe)
    np.testing.assert_array_equal(output(model, x), before)
