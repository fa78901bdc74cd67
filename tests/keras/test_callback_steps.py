"""The callback counts the batches of ``fit`` itself, whatever the model's ``train_step`` does with optimizers."""

import keras
import numpy as np
import pytest
from keras import layers

from normswap.finetune import KerasCallback
from normswap.finetune.hooks.hook import Hook

X, Y = np.ones((8, 3), "float32"), np.ones((8, 2), "float32")


class Noting(Hook):
    """Note the steps it is told of."""

    def __init__(self):
        self.steps = []

    def on_step(self, step):
        """Note it."""
        super().on_step(step)
        self.steps.append(step)


class Own(keras.Sequential):
    """A model that updates its parts by optimizers of its own, and not by the one it is compiled with."""

    def train_step(self, data):
        """Take one step."""
        if keras.backend.backend() != "tensorflow":
            pytest.skip("a train_step as TensorFlow takes it")
        import tensorflow as tf

        x, y = data
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(self(x, training=True) - y))
        gradients = tape.gradient(loss, self.trainable_variables)
        self.first.apply_gradients(zip(gradients[:1], self.trainable_variables[:1], strict=True))
        self.second.apply_gradients(zip(gradients[1:], self.trainable_variables[1:], strict=True))
        return {"loss": loss}


def own(optimizer):
    """Return a model with two optimizers of its own, compiled with another or none."""
    model = Own([keras.Input((3,)), layers.Dense(2)])
    model.first, model.second = keras.optimizers.SGD(1e-3), keras.optimizers.SGD(1e-3)
    model.compile(optimizer=optimizer, loss="mse")
    return model


def steps(model, **settings):
    """Return the steps that a hook is told of in two epochs of four batches."""
    noting = Noting()
    model.fit(X, Y, batch_size=2, verbose=0, callbacks=[KerasCallback(noting)], **{"epochs": 2, **settings})
    return noting.steps


@pytest.mark.parametrize("optimizer", [None, "sgd"])
def test_batches_count_where_no_optimizer_does(optimizer):
    """With two optimizers of the model's own, beside one that is never used or none, hooks are told of every step."""
    assert steps(own(optimizer)) == list(range(8))


@pytest.mark.parametrize("optimizer", [None, "sgd"])
def test_a_later_fit_goes_on_where_no_optimizer_counts(optimizer):
    """A second fit with the same callback goes on from the last step of the first."""
    model, noting = own(optimizer), Noting()
    callback = KerasCallback(noting)
    for _ in range(2):
        model.fit(X, Y, batch_size=4, verbose=0, callbacks=[callback])
    assert noting.steps == [0, 1, 2, 3]


def test_the_first_number_is_the_optimizers_count():
    """A model that has been trained before goes on at its optimizer's count, and a new optimizer starts at 0."""
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2)])
    model.compile("sgd", "mse")
    assert steps(model) == list(range(8))
    assert steps(model, epochs=1) == [8, 9, 10, 11]
    model.compile("sgd", "mse")
    assert steps(model, epochs=1) == [0, 1, 2, 3]


def test_accumulated_batches_are_one_step():
    """A step is as many batches as the optimizer accumulates, also within a loss scale."""
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2)])
    optimizer = keras.optimizers.SGD(1e-3, gradient_accumulation_steps=2)
    model.compile(keras.optimizers.LossScaleOptimizer(optimizer), "mse")
    assert steps(model, epochs=1) == [0, 1]


def test_an_execution_of_several_steps_counts_them_all():
    """With steps_per_execution hooks are told of the first step of each execution."""
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2)])
    model.compile("sgd", "mse", steps_per_execution=2)
    assert steps(model) == [0, 2, 4, 6]
