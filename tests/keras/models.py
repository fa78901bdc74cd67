"""Models with BatchNorms of every kind, and what tests ask of one."""

import keras
import numpy as np
from keras import layers


def output(model, x):
    """Return what the model computes at inference."""
    return keras.ops.convert_to_numpy(model(x, training=False))


def batch_norms(model):
    """Return the BatchNorms among all layers of a model."""
    return [layer for layer in model._flatten_layers() if isinstance(layer, layers.BatchNormalization)]


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


@keras.saving.register_keras_serializable(package="normswap-tests")
class Net(keras.Model):
    """A subclassed model, which `keras.models.clone_model` refuses."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first = layers.Conv2D(4, 3, name="first")
        self.norm = layers.BatchNormalization(name="norm")
        self.head = layers.Dense(3, name="head")

    def call(self, inputs, training=None):
        """Compute the logits."""
        return self.head(keras.ops.mean(self.norm(self.first(inputs), training=training), (1, 2)))


@keras.saving.register_keras_serializable(package="normswap-tests")
class Backbone(keras.Model):
    """A graph that its class builds and saves as the arguments for that, as KerasHub's do."""

    def __init__(self, width=4, **kwargs):
        inner = functional(width)
        super().__init__(inputs=inner.input, outputs=inner.output, **kwargs)
        self.width = width
        self.presets = {"tiny": {"width": 4}}

    def get_config(self):
        """Return the constructor's arguments."""
        return {"width": self.width, "name": self.name}


def backbone():
    """Return a Functional subclass with two BatchNorms."""
    return Backbone(name="backbone")


def functional(width=4):
    """Return a small image classifier with two BatchNorms."""
    x = inputs = keras.Input((8, 8, 3))
    for number in (1, 2):
        x = layers.ReLU()(layers.BatchNormalization(name=f"bn{number}")(layers.Conv2D(width, 3)(x)))
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
    for build in (functional, sequential, nested, shared, time_distributed, custom, unbuilt, subclassed, backbone)
}
