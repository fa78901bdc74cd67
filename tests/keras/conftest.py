"""Models with trained BatchNorms of every kind, and one seed and naming for every Keras test."""

import keras
import numpy as np
import pytest
from keras import layers

from normswap.patchers.keras import find_sites


@pytest.fixture(autouse=True)
def _fresh_session():
    """Start each test from seed 0 and layer names without numbers."""
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(0)


@pytest.fixture
def images():
    """Return seeded inputs that every model of `make` takes."""
    return np.random.default_rng(1).normal(size=(4, 8, 8, 3)).astype("float32")


@pytest.fixture
def train():
    """Return the function that gives every BatchNorm of a model the values of a trained one."""

    def train(model):
        rng = np.random.default_rng(0)
        for layer in find_sites(model)[0]:
            for variable in layer.weights:
                variable.assign(rng.uniform(0.5, 1.5, variable.shape))
        return model

    return train


@pytest.fixture
def make(train):
    """Return the function that makes a model of one kind, with trained BatchNorms."""
    return lambda kind: train(MODELS[kind]())


@keras.saving.register_keras_serializable(package="normswap-tests")
class Block(layers.Layer):
    """A custom layer that holds a BatchNorm and calls it with every argument."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.norm = layers.BatchNormalization(name="norm")

    def build(self, shape):
        """Build the norm."""
        self.norm.build(shape)

    def call(self, inputs, training=None):
        """Normalize with explicit arguments."""
        return self.norm(inputs, training=training, mask=None)


class Net(keras.Model):
    """A subclassed model, which `keras.models.clone_model` refuses."""

    def __init__(self):
        super().__init__()
        self.first = layers.Conv2D(4, 3, name="first")
        self.norm = layers.BatchNormalization(name="norm")
        self.head = layers.Dense(3, name="head")

    def call(self, inputs, training=None):
        """Compute the logits."""
        return self.head(keras.ops.mean(self.norm(self.first(inputs), training=training), (1, 2)))


def functional():
    """Return a small image classifier with two BatchNorms."""
    x = inputs = keras.Input((8, 8, 3))
    for number in (1, 2):
        x = layers.ReLU()(layers.BatchNormalization(name=f"bn{number}")(layers.Conv2D(4, 3)(x)))
    return keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling2D()(x)))


def sequential():
    """Return a Sequential model with two BatchNorms, one behind a Dense layer."""
    body = [layers.Conv2D(4, 3), layers.BatchNormalization(name="bn1"), layers.Flatten(), layers.Dense(6)]
    return keras.Sequential([keras.Input((8, 8, 3)), *body, layers.BatchNormalization(name="bn2")])


def nested():
    """Return a model in a model in a model."""
    inner = keras.Sequential([keras.Input((6, 6, 4)), layers.BatchNormalization(name="bn")], name="inner")
    inputs = keras.Input((6, 6, 4))
    middle = keras.Model(inputs, layers.BatchNormalization(name="bn")(inner(inputs)), name="middle")
    inputs = keras.Input((8, 8, 3))
    return keras.Model(inputs, middle(layers.Conv2D(4, 3)(inputs)))


def shared():
    """Return a model that calls one BatchNorm twice."""
    norm, inputs = layers.BatchNormalization(name="bn"), keras.Input((8, 8, 3))
    return keras.Model(inputs, norm(layers.ReLU()(norm(inputs))))


def time_distributed():
    """Return a model with a BatchNorm inside TimeDistributed, over rows."""
    body = layers.TimeDistributed(layers.BatchNormalization(name="bn"), name="each")
    return keras.Sequential([keras.Input((8, 8, 3)), body])


def custom():
    """Return a model with a BatchNorm inside a custom layer."""
    return keras.Sequential([keras.Input((8, 8, 3)), Block(name="block")])


def unbuilt():
    """Return a subclassed model that has not seen an input."""
    return Net()


def subclassed():
    """Return a subclassed model, built by a call."""
    model = Net()
    model(np.zeros((1, 8, 8, 3), "float32"))
    return model


MODELS = {
    build.__name__: build
    for build in (functional, sequential, nested, shared, time_distributed, custom, unbuilt, subclassed)
}
