"""Optimizers that were there before the patch go on after it, whatever they are."""

import keras
import numpy as np
import pytest

from normswap.convert.targets import GroupNorm, SwitchNorm
from normswap.patchers.keras.patch import patch

from .models import functional, output

pytestmark = pytest.mark.backends


class OwnSchedule(keras.optimizers.schedules.LearningRateSchedule):
    """A schedule without a config."""

    def __call__(self, step):
        """Return one rate."""
        return 1e-3


KINDS = {
    "own schedule": lambda: keras.optimizers.Adam(OwnSchedule()),
    "function": lambda: keras.optimizers.SGD(lambda: 1e-3, momentum=0.9),
    "loss scale": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(1e-3)),
    "product": lambda: keras.optimizers.Nadam(1e-3),
    "accumulated": lambda: keras.optimizers.Adam(1e-3, gradient_accumulation_steps=2),
}


@pytest.fixture
def fit(images):
    """Return the function that trains a model for three steps."""
    return lambda model: model.fit(images, np.ones((4, 3)), epochs=3, verbose=0)


def values(variables):
    """Return the variables by identity, and what they hold."""
    return {id(each): keras.ops.convert_to_numpy(each) for each in variables}


@pytest.mark.parametrize("kind", KINDS)
def test_every_slot_stays_and_new_variables_get_theirs(kind, make, fit, images):
    """A trained optimizer of any kind is the same object with the same slots, in the order that a new one has."""
    model, optimizer = make("functional"), KINDS[kind]()
    model.compile(optimizer, "mse")
    fit(model)
    before = values(optimizer.variables)
    patch(model, SwitchNorm(), example=images)
    after = values(optimizer.variables)
    assert model.optimizer is optimizer
    assert all(np.array_equal(after[key], before[key]) for key in before)
    fresh = KINDS[kind]()
    fresh.build(model.trainable_variables)
    assert [each.shape for each in optimizer.variables] == [each.shape for each in fresh.variables]
    assert len(after) > len(before)
    fit(model)


@pytest.mark.parametrize("target", [GroupNorm(), SwitchNorm()])
@pytest.mark.parametrize("scaled", [False, True])
def test_averages_start_at_the_weights(target, scaled, make, fit, images):
    """At a rate of nothing, an epoch that ends in averaged weights leaves the patched model what it was."""
    model, optimizer = make("functional"), keras.optimizers.SGD(0.0, use_ema=True)
    model.compile(keras.optimizers.LossScaleOptimizer(optimizer) if scaled else optimizer, "mse")
    model.optimizer.build(model.trainable_variables)  # on JAX Keras's own second fit with averages fails
    patch(model, target, example=images)
    before = [keras.ops.convert_to_numpy(each) for each in model.trainable_variables]
    fit(model)
    for variable, value in zip(model.trainable_variables, before, strict=True):
        np.testing.assert_allclose(keras.ops.convert_to_numpy(variable), value, rtol=1e-5, atol=1e-6)


def test_a_second_optimizer_of_a_part_gets_the_new_variables_of_its_layers(make, images):
    """Of two optimizers in one model each knows the new variables of the layers that it knew, and no others."""
    model = make("functional")
    body, head = keras.optimizers.SGD(1e-3, momentum=0.9), keras.optimizers.SGD(1e-3)
    model.body, model.head = body, head
    body.build([each for layer in model.layers[:-1] for each in layer.trainable_variables])
    head.build(model.layers[-1].trainable_variables)
    patch(model, SwitchNorm(), example=images)
    assert {id(v) for v in body._trainable_variables} == {
        id(v) for layer in model.layers[:-1] for v in layer.trainable_variables
    }
    assert head._trainable_variables == model.layers[-1].trainable_variables


def test_an_optimizer_that_cannot_be_built_again_undoes_the_patch(make, fit, images):
    """Where an optimizer refuses the new variables, model and optimizer are what they were."""

    class Once(keras.optimizers.SGD):
        """An optimizer that is built once."""

        builds = 0

        def build(self, variables):
            """Build, or raise."""
            self.builds += 1
            if self.builds > 1:
                raise RuntimeError("only once")
            super().build(variables)

    model, optimizer = make("functional"), Once(1e-3, momentum=0.9)
    model.compile(optimizer, "mse")
    fit(model)
    expected, before = output(model, images), values(optimizer.variables)
    with pytest.raises(RuntimeError, match="^only once$"):
        patch(model, SwitchNorm(), example=images)
    np.testing.assert_array_equal(output(model, images), expected)
    after = values(optimizer.variables)
    assert list(after) == list(before)
    assert all(map(np.array_equal, after.values(), before.values()))
    fit(model)


def test_undo_gives_an_optimizer_the_variables_it_had(make, fit, images):
    """After patch and undo an optimizer lists the very slots it had, in their order."""
    model, optimizer = functional(), keras.optimizers.Adam(1e-3)
    model.compile(optimizer, "mse")
    fit(model)
    before = list(map(id, optimizer.variables))
    patch(model, SwitchNorm(), example=images).undo()
    assert list(map(id, optimizer.variables)) == before
