"""Which linear layer is seen in front of a BatchNorm by a model's graph alone, as on JAX and PyTorch."""

import keras
import numpy as np
import pytest
from keras import layers, ops

from normswap.patchers.keras import fronts
from normswap.patchers.patch import patch, plan

from .test_fronts import ELSEWHERE, KINDS, Code, Renamed, conv, net, refused, seen

pytestmark = [
    pytest.mark.keras,
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _graph_alone(monkeypatch):
    """Look at the graph, as where the backend traces no code."""
    monkeypatch.setattr(fronts, "_TRACED", False)


@pytest.fixture
def x():
    """Seeded inputs for `net` and `Code`."""
    return np.random.default_rng(0).normal(size=(3, 8, 8, 4)).astype("float32")


@pytest.mark.parametrize("kind", KINDS)
def test_every_linear_layer_is_seen(kind):
    """Each kind of layer is in front of the norm that alone reads it, without an example."""
    make, shape = KINDS[kind]
    assert seen(net(make(name="front"), shape=shape)) == {"bn": ("front", "")}


@pytest.mark.parametrize("between", [layers.Identity(), layers.Dropout(0.5), layers.SpatialDropout2D(0.5)])
def test_what_passes_on_may_be_between(between, x):
    """What returns at inference what it is given does not hide the layer in front."""
    assert seen(net(conv(), between), x) == {"bn": ("conv", "")}


def test_a_published_network(monkeypatch):
    """Of a network of Keras's own the graph tells what the trace tells."""
    model = keras.applications.MobileNetV2(weights=None, input_shape=(32, 32, 3), alpha=0.35)
    found = seen(model)
    monkeypatch.setattr(fronts, "_TRACED", True)
    assert seen(model) == found
    assert all(front for front, _ in found.values())


READERS = {
    "a skip connection": "also read by Add",
    "an activation": "also read by ReLU",
    "squeeze and excite": "also read by GlobalAveragePooling2D",
    "another convolution": "also read by Conv2D",
    "the model's outputs": "one of the model's",
    "the model's outputs, reshaped": "also read by Reshape",
}


@pytest.mark.parametrize("reader", READERS)
def test_what_else_reads_the_output(reader, x):
    """Whatever reads the output of the layer beside the norm is named."""
    after, _ = ELSEWHERE[reader]
    assert seen(net(conv(), after=after), x) == refused(f"conv: its output is {READERS[reader]}")


def test_settings_of_the_layer(x):
    """A regularizer of the output reads it, and an axis of the map is not that of the channels."""
    reason = "conv: its output is also read by its activity regularizer"
    assert seen(net(conv(activity_regularizer="l2")), x) == refused(reason)
    norm = layers.BatchNormalization(axis=1, name="bn")
    assert seen(net(conv(), norm=norm), x) == refused("conv: its channels are not those of the norm")


def test_several_norms_and_calls(x):
    """A layer that two norms read, or that runs several times, is left, in models within a model too."""
    model = net(conv(), after=lambda x, y: layers.Add()([layers.BatchNormalization(name="bn2")(x), y]))
    reason = "conv: several norms read its output"
    assert seen(model, x) == {"bn": ("", reason), "bn2": ("", reason)}
    twice = conv()
    model = net(twice, after=lambda a, y: [y, layers.ReLU()(twice(layers.ZeroPadding2D(3)(y[..., :4])))])
    assert seen(model, x) == refused("conv: it runs several times")
    inner, inputs = net(conv()), keras.Input((8, 8, 4))
    inner.name = "inner"
    assert seen(keras.Model(inputs, inner(inputs)), x) == {"inner/bn": ("inner/conv", "")}
    both = keras.Model(inputs, layers.Add()([inner(inputs), inner(inputs * 2)]))
    assert seen(both, x) == {"inner/bn": ("", "it runs several times")}


class Wrapped(keras.Model):
    """A Functional model with code of its own."""

    def call(self, inputs, training=None, mask=None):
        """Do what the graph does, and more."""
        return super().call(inputs) + ops.sum(self.get_layer("conv").kernel)


def own_class():
    """A Functional model of a class with code of its own."""
    inputs = keras.Input((8, 8, 4))
    return Wrapped(inputs, layers.BatchNormalization(name="bn")(conv()(inputs)))


def overridden():
    """A model one of whose layers has a call of its own."""
    model = net(conv())
    layer = model.get_layer("conv")
    layer.call = lambda x: layers.Conv2D.call(layer, x)
    return model


def of_code():
    """A model of code alone."""
    model = Code(lambda model, x: model.bn(model.conv(x)))
    model(np.zeros((1, 8, 8, 4), "float32"))
    return model


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (own_class, "Wrapped"),
        (lambda: net(Renamed(6, 3, name="conv")), "Renamed"),
        (lambda: net(conv(), layers.Lambda(lambda x: x)), "Lambda"),
        (lambda: net(conv(), layers.Activation(lambda x: x)), "<lambda>"),
        (lambda: net(conv(), after=lambda x, y: ops.map(lambda each: each, y)), "<lambda>"),
        (overridden, "Conv2D"),
        (of_code, "Code"),
    ],
)
def test_code_of_others(make, name, x):
    """Where there is code that is not Keras's, which could read any layer, nothing is seen, and the code is named."""
    backend = keras.backend.backend()
    told = f"the {backend} backend shows who reads a layer's output in Keras's own layers alone, not {name}"
    assert seen(make(), x) == refused(told)


def test_a_patched_model_is_seen(x):
    """What was patched before hides nothing of the others."""
    model = net(conv(), after=lambda x, y: layers.BatchNormalization(name="bn2")(layers.Conv2D(3, 1, name="conv2")(y)))
    patch(model, "gn", example=x, include="bn")
    (done, found) = plan(model, "gn", example=x).decisions
    assert (done.action, found.front) == ("done", "conv2")
