"""What patching does to Keras models of every kind: which layers it finds, and what the model computes after."""

import re

import keras
import numpy as np
import pytest
from keras import layers

from normswap.convert.carry_over import carry_over
from normswap.convert.targets import BatchRenorm, GroupNorm, SwitchNorm, as_target
from normswap.errors import InputError, UnsupportedError
from normswap.patchers.keras import find_sites, patch, plan, read_state

pytestmark = pytest.mark.keras

TARGETS = ["brn", "sn", "gn"]


SITES = {
    "functional": ["bn1", "bn2"],
    "sequential": ["bn1", "bn2"],
    "nested": ["middle/inner/bn", "middle/bn"],
    "shared": ["bn"],
    "time_distributed": ["each/bn"],
    "custom": ["block/norm"],
    "subclassed": ["norm"],
}
EVERY_MODEL = pytest.mark.parametrize(("kind", "names"), SITES.items(), ids=SITES)


def output(model, x):
    """Return what the model computes at inference."""
    return keras.ops.convert_to_numpy(model(x, training=False))


@EVERY_MODEL
@pytest.mark.parametrize("target", TARGETS)
def test_every_batch_norm_is_replaced_and_comes_back(kind, names, target, make, images):
    """In models of every kind all sites are found by name, BatchRenorm changes no bit, and undo restores all."""
    model = make(kind)
    weights, before = model.get_weights(), output(model, images)
    report = patch(model, as_target(target))
    assert [d.site.name for d in report.replaced] == names
    assert not any(isinstance(layer, layers.BatchNormalization) for layer in model._flatten_layers())
    after = output(model, images)
    if target == "brn":
        np.testing.assert_array_equal(after, before)
    else:
        assert not np.array_equal(after, before)
        assert np.isfinite(after).all()
    report.undo()
    assert all(map(np.array_equal, model.get_weights(), weights))
    np.testing.assert_array_equal(output(model, images), before)


@EVERY_MODEL
def test_patching_again_changes_nothing(kind, names, make):
    """A second patch to the same target reports what is there, another target is refused."""
    model = make(kind)
    patch(model, GroupNorm())
    weights = model.get_weights()
    again = patch(model, GroupNorm())
    assert str(again) == f"0 replaced, {len(names)} already patched, 0 skipped"
    assert all(map(np.array_equal, model.get_weights(), weights))
    lines = "\n".join(
        f"  {name} (GroupNormalization): already patched to gn: undo that first, or patch the original model to sn"
        for name in names
    )
    message = (
        f"expected BatchNorms that can be replaced, received {len(names)} that cannot:\n{lines}\n"
        "leave such a layer as it is with --exclude NAME (exclude=[NAME])"
    )
    with pytest.raises(UnsupportedError, match=f"^{re.escape(message)}$"):
        patch(model, SwitchNorm())


@pytest.mark.parametrize(
    "target",
    [GroupNorm(2), SwitchNorm("even"), SwitchNorm("warm", "frozen"), SwitchNorm("even", "none"), BatchRenorm(2.0, 1.0)],
)
@pytest.mark.parametrize("affine", [{}, {"scale": False}, {"center": False}])
def test_values_are_the_carry_over(target, affine, train):
    """Scale, shift and gates are the carry-over's; what BatchNorm lacked is created where it is needed."""
    model = train(keras.Sequential([keras.Input((5, 5, 6)), layers.BatchNormalization(**affine)]))
    layer = model.layers[-1]
    carried = carry_over(read_state(layer), target, groups=2, spatial=(5, 5))
    patch(model, target)
    if not isinstance(target, BatchRenorm) or not affine:
        np.testing.assert_allclose(layer.gamma.numpy(), carried.gamma, rtol=1e-6)
        np.testing.assert_allclose(layer.beta.numpy(), carried.beta, rtol=1e-6)
    else:
        assert (layer.gamma is None) == ("scale" in affine)
        assert (layer.beta is None) == ("center" in affine)
    if isinstance(target, SwitchNorm):
        np.testing.assert_allclose(layer.mean_weight.numpy(), carried.gate_logits, rtol=1e-6)
        np.testing.assert_allclose(layer.var_weight.numpy(), carried.gate_logits, rtol=1e-6)


@pytest.mark.parametrize("target", TARGETS)
def test_a_layer_keeps_what_is_its_own(target, train):
    """Name, policy, flags, regularizers, constraints, user attributes and the affine variables live on."""
    options = {"gamma_regularizer": keras.regularizers.L2(0.1), "beta_constraint": keras.constraints.NonNeg()}
    norm = layers.BatchNormalization(1, epsilon=1e-5, name="bn", dtype="mixed_float16", trainable=False, **options)
    model = train(keras.Sequential([keras.Input((4, 5, 5)), norm]))
    norm.note = "mine"
    gamma, beta, losses = norm.gamma, norm.beta, [float(loss) for loss in model.losses]
    patch(model, as_target(target))
    assert (norm.name, norm.axis, norm.epsilon, norm.note, norm.trainable) == ("bn", 1, 1e-5, "mine", False)
    assert norm.dtype_policy.name == "mixed_float16"
    assert norm.gamma is gamma
    assert norm.beta is beta
    assert not model.trainable_weights
    assert {v.dtype for v in norm.weights} == {"float32"}
    assert [len(losses), len(model.losses)] == [0, 0]  # frozen
    norm.trainable = True
    assert [v.name for v in norm.trainable_weights[:2]] == ["gamma", "beta"]
    assert len(model.losses) == 1
    assert keras.backend.standardize_dtype(model(np.zeros((1, 4, 5, 5), "float32")).dtype) == "float16"


def test_variables_of_the_old_layer_vanish(make):
    """A GroupNorm leaves no moving statistics among the model's variables, and undo brings them back in order."""
    model = make("functional")
    names = [v.path for v in model.weights]
    report = patch(model, GroupNorm())
    assert not [v.path for v in model.variables if "moving" in v.path]
    report.undo()
    assert [v.path for v in model.weights] == names


@pytest.mark.parametrize("axis", [1, 2, -1])
def test_axis(axis, train):
    """The channels stay where they are: with one site everywhere on the batch gate nothing changes."""
    model = train(keras.Sequential([keras.Input((4, 6, 8)), layers.BatchNormalization(axis)]))
    x = np.random.default_rng(1).normal(size=(2, 4, 6, 8)).astype("float32")
    before = output(model, x)
    assert find_sites(model)[1][0].spatial == {1: (6, 8), 2: (4, 8), -1: (4, 6)}[axis]
    patch(model, SwitchNorm("exact"))
    np.testing.assert_allclose(output(model, x), before, rtol=1e-5, atol=1e-5)


def test_group_norm_along_another_axis(train):
    """A channels-first GroupNorm computes what its channels-last twin does."""
    x = np.random.default_rng(1).normal(size=(2, 4, 5, 6)).astype("float32")
    first = train(keras.Sequential([keras.Input((4, 5, 6)), layers.BatchNormalization(1)]))
    last = train(keras.Sequential([keras.Input((5, 6, 4)), layers.BatchNormalization(-1)]))
    for model in (first, last):
        patch(model, GroupNorm(2))
    turned = np.moveaxis(output(last, np.moveaxis(x, 1, -1)), -1, 1)
    np.testing.assert_allclose(output(first, x), turned, rtol=1e-5, atol=1e-5)


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
    assert [(d.site.name, d.action, d.note) for d in decided.decisions] == [
        ("bn1", "skip", "excluded"),
        ("bn2", "replace", ""),
    ]
    report = patch(model, GroupNorm(), where=lambda layer, name: layer.name == "bn1")
    assert [d.site.name for d in report.replaced] == ["bn1"]
    assert type(model.get_layer("bn2")) is layers.BatchNormalization


def test_recipe_replays(make, images):
    """A recipe made from one model gives a fresh copy the same function."""
    first, second = make("functional"), make("functional")
    second.set_weights(first.get_weights())
    recipe = patch(first, SwitchNorm(), exclude=["bn2"]).recipe
    patch(second, recipe)
    np.testing.assert_array_equal(output(first, images), output(second, images))


def test_an_unbuilt_layer_needs_an_example(make, images):
    """A layer that has never seen an input is refused by name; an example builds it."""
    message = (
        "expected BatchNorms that can be replaced, received 1 that cannot:\n"
        "  norm (BatchNormalization): not built yet: give an example input, or call the model on one first\n"
        "leave such a layer as it is with --exclude NAME (exclude=[NAME])"
    )
    with pytest.raises(UnsupportedError, match=f"^{re.escape(message)}$"):
        patch(make("unbuilt"), GroupNorm())
    assert len(patch(make("unbuilt"), GroupNorm(), example=images).replaced) == 1


def test_a_subclass_with_its_own_call_is_refused():
    """What an overridden ``call`` adds would be lost; a subclass without one is an ordinary BatchNorm."""

    class Plain(layers.BatchNormalization):
        pass

    class Doubling(layers.BatchNormalization):
        def call(self, inputs, training=None, mask=None):
            return 2 * super().call(inputs, training, mask)

    model = keras.Sequential([keras.Input((4,)), Plain(), Doubling(name="double")])
    message = (
        "expected BatchNorms that can be replaced, received 1 that cannot:\n"
        "  double (Doubling): Doubling overrides call: a replacement would lose what it adds\n"
        "leave such a layer as it is with --exclude NAME (exclude=[NAME])"
    )
    with pytest.raises(UnsupportedError, match=f"^{re.escape(message)}$"):
        patch(model, GroupNorm())
    assert len(patch(model, GroupNorm(), exclude=["double"]).replaced) == 1


@pytest.mark.parametrize("option", ["renorm", "synchronized"])
@pytest.mark.parametrize("target", TARGETS)
def test_native_variants(option, target, train, images):
    """Native batch renormalization and synchronization are BatchNorms at inference and are replaced as such."""
    model = train(keras.Sequential([keras.Input((8, 8, 3)), layers.BatchNormalization(**{option: True})]))
    before, weights = output(model, images), model.get_weights()
    report = patch(model, as_target(target))
    if target == "brn":
        np.testing.assert_array_equal(output(model, images), before)
    report.undo()
    assert all(map(np.array_equal, model.get_weights(), weights))


def test_a_failure_leaves_the_model_whole(make):
    """A negative variance in the second layer is named, and the first layer is still a BatchNorm."""
    model = make("functional")
    model.get_layer("bn2").moving_variance.assign([1.0, -1.0, 1.0, 1.0])
    weights = model.get_weights()
    message = "bn2: expected finite parameters and variances >= 0, received 1 negative running variances"
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        patch(model, GroupNorm())
    assert [type(layer) for layer in find_sites(model)[0]] == [layers.BatchNormalization] * 2
    assert all(map(np.array_equal, model.get_weights(), weights))


def test_a_wrong_example_is_an_input_error(make):
    """An example that the model refuses is the caller's error, with the model's own words."""
    with pytest.raises(InputError, match=r"^expected an example the model accepts, received one on which it fails: "):
        plan(make("functional"), GroupNorm(), example=np.zeros((1, 5), "float32"))
