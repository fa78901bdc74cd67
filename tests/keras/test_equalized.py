"""What a Keras norm and the layer in front of it become: the function, the way back, saving and training."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers, ops

import normswap
from normswap.convert.equalize import equalize
from normswap.convert.recipe import Recipe
from normswap.errors import InputError, UnsupportedError
from normswap.frameworks.keras import named_layers
from normswap.patchers.keras.equalized import BIASED
from normswap.patchers.keras.fronts import read_front
from normswap.patchers.keras.sites import find_sites
from normswap.patchers.keras.swap import FRONT, read_state

from ..helpers import exactly
from .models import output
from .test_fronts import KINDS, net

pytestmark = [
    pytest.mark.keras,
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
]

TARGETS = {
    "gn": normswap.GroupNorm(1),
    "sn": normswap.SwitchNorm(),
    "frozen": normswap.SwitchNorm(batch_statistics="frozen"),
}


def settle(model, x):
    """Give every BatchNorm other γ and β, and the moving statistics of what it sees of ``x``."""
    rng = np.random.default_rng(0)
    for layer in model._flatten_layers():
        if isinstance(layer, layers.BatchNormalization):
            layer.gamma.assign(rng.uniform(0.5, 1.5, layer.gamma.shape))
            layer.beta.assign(rng.normal(size=layer.beta.shape))
            layer.momentum = 0.0
    for _ in range(3):
        model(x, training=True)
    for layer in model._flatten_layers():
        if isinstance(layer, layers.BatchNormalization):
            layer.momentum = 0.99
    return model


def unlike(model):
    """Give the channels in front of every norm deviations as unlike as those of trained networks."""
    for layer in model._flatten_layers():
        if isinstance(layer, layers.Conv2D):
            layer._kernel.assign(layer._kernel.numpy() * np.geomspace(0.1, 3, layer.filters))
    return model


def classifier(bias=False):
    """Two convolutions, each with a BatchNorm, and a head."""
    x = inputs = keras.Input((8, 8, 3))
    for number in (1, 2):
        x = layers.Conv2D(8, 3, use_bias=bias, name=f"conv{number}")(x)
        x = layers.ReLU()(layers.BatchNormalization(name=f"bn{number}")(x))
    return keras.Model(inputs, layers.Dense(3, name="head")(layers.GlobalAveragePooling2D()(x)))


@pytest.fixture
def x():
    """Seeded images, many enough for moving statistics."""
    return np.random.default_rng(1).normal(size=(32, 8, 8, 3)).astype("float32")


@pytest.fixture
def trained(x):
    """A trained classifier whose convolutions have no bias."""
    return settle(unlike(classifier()), x)


def paths(model):
    """The paths of the model's variables, in order."""
    return [variable.path for variable in model.weights]


def distance(a, b):
    """The distance of two arrays as a share of the second's deviation from its mean."""
    return float(np.sqrt(np.square(a - b).mean()) / b.std())


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_the_layer_in_front_returns_what_was_chosen(kind, bias, target):
    """In front of the norm comes a·x̂ + b of the BatchNorm's input x, whatever kind of layer computes that."""
    make, shape = KINDS[kind]
    example = np.random.default_rng(2).normal(size=(16, *shape)).astype("float32")
    model = settle(net(make(use_bias=bias, name="front"), shape=shape), example)
    front, norm = model.get_layer("front"), model.get_layer("bn")
    state, seen = read_state(norm), read_front(front)
    (site,) = (d.site for d in normswap.plan(model, TARGETS[target], example=example).decisions)
    groups = 1 if target == "gn" else None
    found = equalize(state, TARGETS[target], seen, groups=groups, spatial=site.spatial)
    before = np.asarray(front(example), np.float64)
    normswap.patch(model, TARGETS[target], example=example)
    wanted = found.scale * (before - state.mean) / np.sqrt(state.var + state.eps) + found.shift
    np.testing.assert_allclose(np.asarray(front(example)), wanted, atol=2e-5 * np.abs(wanted).max())
    assert front.use_bias
    np.testing.assert_allclose(norm.gamma.numpy(), found.gamma, rtol=1e-6)
    np.testing.assert_allclose(norm.beta.numpy(), found.beta, rtol=1e-5, atol=1e-6)
    if target != "gn":
        np.testing.assert_allclose(norm.moving_mean.numpy(), found.mean, rtol=1e-6)
        np.testing.assert_allclose(norm.moving_variance.numpy(), found.var, rtol=1e-6)


@pytest.mark.parametrize("target", TARGETS)
def test_the_function_is_kept_better(target, trained, x):
    """An equalized network is nearer to the original than one whose norms alone are carried over."""
    before = output(trained, x)
    away = {}
    for choice in (True, "scale", False):
        report = normswap.patch(trained, TARGETS[target], example=x, equalize=choice)
        away[choice] = distance(output(trained, x), before)
        report.undo()
    assert away[True] < 0.75 * away[False]
    assert away["scale"] < away[False]


def test_the_original_is_known(trained, x):
    """What the patched model computes as the original is what the original computed, up to rounding."""
    before = output(trained, x)
    report = normswap.patch(trained, "gn", example=x)
    drift = report.drift(x)[-1]
    assert drift.rms == pytest.approx(np.linalg.norm(output(trained, x) - before) / np.linalg.norm(before), rel=1e-4)


@pytest.mark.parametrize("target", [*TARGETS, "brn"])
@pytest.mark.parametrize("bias", [True, False])
def test_undo(target, bias, x):
    """Undo gives every variable, its path and place, and every setting back, bit for bit."""
    model = settle(classifier(bias), x)
    weights, names, before = model.get_weights(), paths(model), output(model, x)
    config = model.get_config()
    report = normswap.patch(model, TARGETS.get(target, target), example=x)
    if target != "brn":
        assert not np.array_equal(model.get_layer("conv1").kernel.numpy(), weights[0])
    report.undo()
    assert paths(model) == names
    assert all(map(np.array_equal, model.get_weights(), weights))
    assert model.get_config() == config
    np.testing.assert_array_equal(output(model, x), before)
    assert not any(BIASED in vars(layer) or FRONT in vars(layer) for layer in model.layers)


def test_a_new_bias(trained, x):
    """A bias that the layer lacks is in plan, recipe and table, and in the model where the layer's own would be."""
    plan = normswap.plan(trained, "gn", example=x)
    assert [d.to_dict()["equalize"] for d in plan.decisions] == [
        {"front": f"conv{number}", "mode": "full", "new_bias": True} for number in (1, 2)
    ]
    report = normswap.patch(trained, "gn", example=x)
    assert "scaled, new bias" in str(report)
    assert [(c.front, c.mode) for c in report.recipe.choices] == [("conv1", "full"), ("conv2", "full")]
    names = [
        "conv1/kernel",
        "conv1/bias",
        "bn1/gamma",
        "bn1/beta",
        "conv2/kernel",
        "conv2/bias",
        "bn2/gamma",
        "bn2/beta",
    ]
    assert paths(trained) == [*names, "head/kernel", "head/bias"]
    assert len(trained.trainable_variables) == 10
    assert trained.get_layer("bn1").__dict__[FRONT] == "conv1"


def test_a_layer_has_its_bias_as_it_says(x):
    """The new bias has the regularizer that the layer was given for one, and the layer can be cloned."""
    model = net(layers.Conv2D(6, 3, use_bias=False, bias_regularizer="l2", name="conv"), shape=(8, 8, 3))
    normswap.patch(settle(model, x), "gn", example=x)
    bias = model.get_layer("conv").bias
    assert float(model.losses[0]) == pytest.approx(0.01 * np.square(bias.numpy()).sum(), rel=1e-5)
    twin = keras.models.clone_model(model)
    twin.set_weights(model.get_weights())
    np.testing.assert_array_equal(output(twin, x), output(model, x))


def test_no_bias_by_scale(trained, x):
    """``"scale"`` adds no variable."""
    plan = normswap.plan(trained, "gn", example=x, equalize="scale")
    assert [(d.front, d.mode, d.adds_bias) for d in plan.decisions] == [(f"conv{n}", "scale", False) for n in (1, 2)]
    kernel = trained.get_layer("conv1").kernel.numpy()
    normswap.patch(trained, "gn", example=x, equalize="scale")
    assert trained.get_layer("conv1").bias is None
    assert not np.array_equal(trained.get_layer("conv1").kernel.numpy(), kernel)


def test_nothing_else_changes_without(trained, x):
    """``equalize=False`` and Batch Renormalization leave every other layer alone."""
    for target, choice in (("gn", False), ("sn", False), ("brn", True)):
        before = {v.path: v.numpy() for v in trained.weights if "bn" not in v.path}
        report = normswap.patch(trained, target, example=x, equalize=choice)
        assert [(d.front, d.site.unequal) for d in report.plan.decisions] == [("", "")] * 2
        after = {v.path: v.numpy() for v in trained.weights if "bn" not in v.path}
        assert after.keys() == before.keys()
        assert all(np.array_equal(after[path], value) for path, value in before.items())
        report.undo()


def test_a_failure_leaves_the_model(trained, x, monkeypatch):
    """If anything fails half-way, layers in front are what they were as well."""
    weights, names = trained.get_weights(), paths(trained)
    last = trained.get_layer("bn2").moving_variance
    last.assign(-last.numpy())
    with pytest.raises(InputError, match="bn2/moving_variance: 8 of 8 below 0"):
        normswap.patch(trained, "gn", example=x)
    last.assign(-last.numpy())
    monkeypatch.setattr("normswap.patchers.keras.patch.find_sites", _failing_the_second_time())
    with pytest.raises(RuntimeError, match="at the end"):
        normswap.patch(trained, "gn", example=x)
    assert paths(trained) == names
    assert all(map(np.array_equal, trained.get_weights(), weights))


def _failing_the_second_time():
    from normswap.patchers.keras.sites import find_sites

    calls = []

    def find(model, example=None):
        calls.append(model)
        if len(calls) > 1:
            raise RuntimeError("at the end")
        return find_sites(model, example)

    return find


def test_a_trained_front_is_not_undone(trained, x):
    """Once the layer in front has learned, no BatchNorm computes what both do."""
    report = normswap.patch(trained, "gn", example=x)
    bias = trained.get_layer("conv1").bias
    bias.assign(bias.numpy() + 1)
    message = (
        "expected untrained replacements, received 1 that have changed since the patch (first: bn1); no BatchNorm "
        "computes what they do: reload the original model"
    )
    with pytest.raises(UnsupportedError, match=exactly(message)):
        report.undo()


def test_a_compiled_model_trains_on(trained, x):
    """The optimizer keeps its step and the state of what stays, and trains the new biases."""
    y = np.random.default_rng(0).normal(size=(32, 3))
    trained.compile(keras.optimizers.Adam(1e-3), "mse")
    trained.fit(x, y, epochs=1, verbose=0)
    optimizer = trained.optimizer
    state = {v.path: v.numpy() for v in optimizer.variables}
    normswap.patch(trained, "gn", example=x)
    now = {v.path: v.numpy() for v in optimizer.variables}
    assert trained.optimizer is optimizer
    kept = [path for path in now if "head" in path or "kernel" in path]
    assert len(kept) == 8
    for path in [*kept, "adam/iteration"]:
        np.testing.assert_array_equal(now[path], state[path])
    assert any("conv1_bias" in path for path in now)
    bias = trained.get_layer("conv1").bias.numpy()
    trained.fit(x, y, epochs=1, verbose=0)
    assert not np.array_equal(trained.get_layer("conv1").bias.numpy(), bias)


def test_a_recipe_is_replayed(trained, x):
    """A recipe says what is equalized, on a copy that Keras numbers otherwise too, with or without an example."""
    twin = keras.models.clone_model(trained)
    twin.set_weights(trained.get_weights())
    recipe = normswap.patch(trained, "gn", example=x).recipe
    recipe = Recipe.from_json(recipe.to_json())
    normswap.patch(twin, recipe)
    assert all(map(np.array_equal, twin.get_weights(), trained.get_weights()))
    other = classifier(bias=True)
    (first, _) = normswap.plan(other, recipe).decisions
    assert (first.front, first.adds_bias) == ("conv1", False)


def test_a_recipe_for_made_up_names(x):
    """The layer in front is found where Keras has given it another number."""

    def build():
        body = [layers.Conv2D(4, 3), layers.Conv2D(8, 3, use_bias=False), layers.BatchNormalization()]
        return keras.Sequential([keras.Input((8, 8, 3)), *body, layers.Conv2D(2, 1)])

    model = settle(build(), x)
    recipe = normswap.patch(model, "gn", example=x).recipe
    again = build()
    report = normswap.patch(again, recipe)
    assert report.recipe.choices[0].front == again.layers[1].name != recipe.choices[0].front


def test_a_recipe_that_does_not_fit(trained, x):
    """A recipe whose layer in front is not there, or has other channels, is refused and changes nothing."""
    recipe = normswap.plan(trained, "gn", example=x).recipe()
    model = keras.Sequential(
        [keras.Input((8, 8, 8)), layers.BatchNormalization(name="bn1"), layers.BatchNormalization(name="bn2")]
    )
    message = "bn1: expected the recipe's layer in front, conv1, received a model without it"
    with pytest.raises(InputError, match=exactly(message)):
        normswap.patch(model, recipe)


@keras.saving.register_keras_serializable(package="normswap-equalized")
class Block(layers.Layer):
    """A layer that makes its own convolution without bias, and one with, and their norms."""

    def __init__(self, width=4, **kwargs):
        super().__init__(**kwargs)
        self.width = width
        self.convs = [layers.Conv2D(width, 3, use_bias=bias, name=f"conv{bias:d}") for bias in (False, True)]
        self.norms = [layers.BatchNormalization(name=f"norm{number}") for number in (0, 1)]

    def build(self, shape):
        """Build what is within."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            conv.build(shape)
            shape = conv.compute_output_shape(shape)
            norm.build(shape)

    def call(self, inputs, training=None):
        """Convolve and normalize, twice."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            inputs = ops.relu(norm(conv(inputs), training=training))
        return inputs

    def get_config(self):
        """Return the constructor's arguments."""
        return {**super().get_config(), "width": self.width}


@keras.saving.register_keras_serializable(package="normswap-equalized")
class Bare(layers.Conv2D):
    """A convolution whose class says that it has no bias."""

    def __init__(self, filters, **kwargs):
        super().__init__(filters, 3, use_bias=False, **kwargs)

    def get_config(self):
        """Return the constructor's arguments."""
        return {"filters": self.filters, "name": self.name}


def block():
    """A model of a layer that builds its convolutions."""
    return keras.Sequential([keras.Input((8, 8, 3)), Block(name="block"), layers.Flatten(), layers.Dense(2)])


def bare():
    """A model whose convolution's class gives it no bias."""
    return keras.Sequential([keras.Input((8, 8, 3)), Bare(4, name="conv"), layers.BatchNormalization(name="bn")])


def apart():
    """A model with the convolution in one custom layer and the norm outside of it."""
    return keras.Sequential([keras.Input((8, 8, 3)), Holder(name="holder"), layers.BatchNormalization(name="bn")])


def inside():
    """A model in a model."""
    x = inputs = keras.Input((8, 8, 3))
    return keras.Model(inputs, layers.ReLU()(classifier()(x)))


@keras.saving.register_keras_serializable(package="normswap-equalized")
class Holder(layers.Layer):
    """A layer that makes a convolution without bias."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.conv = layers.Conv2D(4, 3, use_bias=False, name="conv")

    def build(self, shape):
        """Build the convolution."""
        self.conv.build(shape)

    def call(self, inputs):
        """Convolve."""
        return self.conv(inputs)


@keras.saving.register_keras_serializable(package="normswap-equalized")
class Net(keras.Model):
    """A subclassed model."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.conv = layers.Conv2D(4, 3, use_bias=False, name="conv")
        self.norm = layers.BatchNormalization(name="norm")

    def call(self, inputs, training=None):
        """Normalize what the convolution returns."""
        return self.norm(self.conv(inputs), training=training)


MODELS = {"functional": classifier, "block": block, "bare": bare, "apart": apart, "nested": inside, "subclassed": Net}


@pytest.mark.parametrize("target", ["gn", "sn"])
@pytest.mark.parametrize("kind", MODELS)
def test_saved_and_loaded(kind, target, x, tmp_path):
    """A bundle of an equalized model of any kind computes the same, knows its fronts, and can be saved again."""
    model = MODELS[kind]()
    model(x)
    report = normswap.patch(settle(model, x), target, example=x)
    assert all(d.front for d in report.replaced)
    assert any(d.adds_bias for d in report.replaced)
    wanted = output(model, x)
    normswap.save(report, tmp_path / "one")
    loaded = normswap.load(tmp_path / "one")
    np.testing.assert_array_equal(output(loaded, x), wanted)
    assert [v.shape for v in loaded.weights] == [v.shape for v in model.weights]
    marks = [vars(layer).get(FRONT) for layer in find_sites(loaded)[0]]
    assert marks == [d.front for d in report.replaced]
    normswap.save(loaded, tmp_path / "two")
    np.testing.assert_array_equal(output(normswap.load(tmp_path / "two"), x), wanted)


@pytest.mark.parametrize("kind", ["functional", "block", "subclassed"])
def test_loaded_into_a_fresh_model(kind, x, tmp_path):
    """A bundle's weights fit a fresh copy that is given, which gets the new biases as well."""
    model = MODELS[kind]()
    model(x)
    report = normswap.patch(settle(model, x), "gn", example=x)
    normswap.save(report, tmp_path / "one")
    fresh = MODELS[kind]()
    fresh(x)
    loaded = normswap.load(tmp_path / "one", model=fresh)
    assert loaded is fresh
    np.testing.assert_array_equal(output(loaded, x), output(model, x))


def test_a_copy(trained, x):
    """``inplace=False`` leaves the model and patches a copy, with its new biases; a copy of that is undone no more."""
    before, weights = output(trained, x), trained.get_weights()
    report = normswap.patch(trained, "gn", example=x, inplace=False)
    np.testing.assert_array_equal(output(trained, x), before)
    assert all(map(np.array_equal, trained.get_weights(), weights))
    assert "conv1/bias" in paths(report.model)


def test_undone_layers_are_saved_as_ever(x, tmp_path):
    """After undo a custom layer saves what it saved before."""
    model = block()
    model(x)
    config = model.get_config()
    normswap.patch(settle(model, x), "gn", example=x).undo()
    assert model.get_config() == config
    assert type(model.get_layer("block")) is Block


@pytest.mark.filterwarnings("ignore:Skipping nested container", "ignore:A total of")
@pytest.mark.parametrize(("file", "settings"), [("old.weights.h5", {}), ("old.keras", {"skip_mismatch": True})])
@pytest.mark.parametrize("target", ["gn", "sn", "brn"])
@pytest.mark.parametrize("kind", ["functional", "block", "nested", "subclassed"])
def test_weights_of_the_original_do_not_load(kind, target, file, settings, x, tmp_path):
    """The original's weights are refused by the patched model, which stays whole, also where Keras would only warn."""
    model = MODELS[kind]()
    model(x)
    model.save_weights(tmp_path / file) if "weights" in file else model.save(tmp_path / file)
    report = normswap.patch(settle(model, x), target, example=x)
    before = model.get_weights()
    changed = {d.site.name for d in report.replaced} | {d.front for d in report.replaced if d.adds_bias}
    assert len(changed) >= (1 if target == "brn" else 2)
    names = "".join(f"\n  {name}" for name, _ in named_layers(model) if name in changed)
    message = (
        f"expected weights of the patched model, received {tmp_path / file}, which do not fit layers that it changed; "
        f"load a BatchNorm model's weights before the patch, and a bundle by normswap.load:{names}"
    )
    with pytest.raises(InputError, match=exactly(message)):
        model.load_weights(tmp_path / file, **settings)
    assert all(map(np.array_equal, model.get_weights(), before))


def test_weights_of_the_patched_model_load(trained, x, tmp_path):
    """Its own weights load into a patched model, and a loaded bundle, which also refuses those of the original."""
    trained.save_weights(tmp_path / "old.weights.h5")
    report = normswap.patch(trained, "gn", example=x)
    normswap.save(report, tmp_path / "bundle")
    wanted = trained.get_weights()
    trained.save_weights(tmp_path / "new.weights.h5")
    for model in (trained, normswap.load(tmp_path / "bundle")):
        model.set_weights([weight + 1 for weight in wanted])
        model.load_weights(tmp_path / "new.weights.h5")
        assert all(map(np.array_equal, model.get_weights(), wanted))
        with pytest.raises(InputError, match="expected weights of the patched model"):
            model.load_weights(tmp_path / "old.weights.h5")


def test_weights_load_after_undo(trained, x, tmp_path):
    """Once the patch is undone a model loads weights as it did."""
    trained.save_weights(tmp_path / "old.weights.h5")
    wanted = trained.get_weights()
    report = normswap.patch(trained, "gn", example=x)
    assert trained.load_weights.__doc__ == keras.Model.load_weights.__doc__
    report.undo()
    assert "load_weights" not in vars(trained)
    trained.set_weights([weight + 1 for weight in wanted])
    trained.load_weights(tmp_path / "old.weights.h5")
    assert all(map(np.array_equal, trained.get_weights(), wanted))


def test_weights_with_another_head(trained, x, tmp_path):
    """What Keras raises for a layer that was not patched is raised and the model is whole; told to skip it, it is."""
    normswap.patch(trained, "gn", example=x)
    trained.compile("adam", "mse")
    trained.fit(x, np.zeros((32, 3)), verbose=0)
    wider = keras.Model(trained.input, layers.Dense(5)(trained.layers[-2].output))
    wider.save_weights(tmp_path / "wider.weights.h5")
    wanted = trained.get_weights()
    trained.set_weights([weight + 1 for weight in wanted])
    before = [variable.numpy() for variable in (*trained.variables, *trained.optimizer.variables)]
    with pytest.raises(ValueError, match="A total of 1 objects could not be loaded"):
        trained.load_weights(tmp_path / "wider.weights.h5")
    after = [variable.numpy() for variable in (*trained.variables, *trained.optimizer.variables)]
    assert all(map(np.array_equal, after, before))
    with pytest.warns(UserWarning, match="A total of 1 objects could not be loaded"):
        trained.load_weights(tmp_path / "wider.weights.h5", skip_mismatch=True)
    same = list(map(np.array_equal, trained.get_weights(), wanted))
    assert same == [True] * (len(same) - 2) + [False] * 2


def test_the_same_as_in_torch(x):
    """The same weights become the same in a PyTorch and a Keras network, to 1e-5."""
    torch = pytest.importorskip("torch")
    model = settle(unlike(classifier()), x)
    nn = torch.nn
    parts = []
    for channels in (3, 8):
        parts += [nn.Conv2d(channels, 8, 3, bias=False), nn.BatchNorm2d(8, eps=1e-3), nn.ReLU()]
    twin = nn.Sequential(*parts).eval()
    for place, number in ((0, 1), (3, 2)):
        kernel = model.get_layer(f"conv{number}").kernel.numpy()
        norm = model.get_layer(f"bn{number}")
        twin[place].weight.data = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy())
        values = (norm.gamma, norm.beta, norm.moving_mean, norm.moving_variance)
        names = ("weight", "bias", "running_mean", "running_var")
        for name, value in zip(names, values, strict=True):
            getattr(twin[place + 1], name).data = torch.from_numpy(value.numpy().copy())
    normswap.patch(model, "gn", example=x)
    normswap.patch(twin, "gn", example=torch.from_numpy(x.transpose(0, 3, 1, 2).copy()))
    for place, number in ((0, 1), (3, 2)):
        conv, norm = model.get_layer(f"conv{number}"), model.get_layer(f"bn{number}")
        pairs = [
            (conv.kernel.numpy().transpose(3, 2, 0, 1), twin[place].weight),
            (conv.bias.numpy(), twin[place].bias),
            (norm.gamma.numpy(), twin[place + 1].weight),
            (norm.beta.numpy(), twin[place + 1].bias),
        ]
        for one, other in pairs:
            np.testing.assert_allclose(one, other.detach().numpy(), rtol=1e-5, atol=1e-5)


ELSEWHERE = """
import keras
import numpy as np

import normswap
from tests.keras.test_equalized import Net, classifier, output, paths, settle

keras.utils.set_random_seed(0)
x = np.random.default_rng(1).normal(size=(8, 8, 8, 3)).astype("float32")
model = settle(classifier(), x)
print(*[decision.front for decision in normswap.plan(model, "gn", example=x).decisions])
code = Net()
code(x)
(unseen,) = normswap.plan(code, "gn", example=x).decisions
print(unseen.site.unequal)
weights, before = model.get_weights(), output(model, x)
report = normswap.patch(model, "gn", example=x)
assert "conv1/bias" in " ".join(paths(model)), paths(model)
original = report.drift(x)[-1].rms
assert np.isclose(original, np.linalg.norm(output(model, x) - before) / np.linalg.norm(before), rtol=1e-3), original
report.undo()
assert all(map(np.array_equal, model.get_weights(), weights))
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", [name for name in ("torch", "jax") if find_spec(name) is not None])
def test_other_backends(backend):
    """Backends that trace no code see what a graph draws, name the code that they do not see through, and undo."""
    environment = {**os.environ, "KERAS_BACKEND": backend, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-c", ELSEWHERE]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    blind = f"the {backend} backend shows who reads a layer's output in Keras's own layers alone, not Net"
    assert done.stdout.splitlines() == ["conv1 conv2", blind]


def test_mirrored_variables_are_known():
    """Under a strategy, which keeps a variable for each replica, a layer in front is seen as ever."""
    import tensorflow as tf

    x = np.random.default_rng(1).normal(size=(4, 8, 8, 3)).astype("float32")
    with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
        model = classifier()
        assert [d.front for d in normswap.plan(model, "gn", example=x).decisions] == ["conv1", "conv2"]
