"""The hook that lets a part of a Keras model learn, and what was frozen before."""

import keras
import pytest
from keras import layers

from normswap.finetune import Freeze

pytestmark = pytest.mark.keras


@pytest.mark.parametrize(("train", "number"), [("last:1", 2), ("all", 3)])
def test_what_was_frozen_stays_so(train, number):
    """Layers within layers, and single variables, do not learn meanwhile, and all have their flags again in the end."""
    wrapper = layers.TimeDistributed(layers.Dense(3))
    model = keras.Sequential([keras.Input((4, 3)), layers.Dense(3), wrapper, layers.Dense(2)])
    model.layers[0].kernel.trainable = wrapper.layer.trainable = False
    parts = [*model.layers, wrapper.layer, *model.weights]
    before = [part.trainable for part in parts]
    hook = Freeze(model, train).open()
    assert len(model.trainable_variables) == number
    hook.on_end()

    assert [part.trainable for part in parts] == before
