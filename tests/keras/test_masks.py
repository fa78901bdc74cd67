"""The plan says of a norm that a mask reaches what that means for its target."""

import keras
import numpy as np
import pytest
from keras import layers

import normswap

NOTE = "a mask tells of padding, which a sample's statistics count too: use brn, or pad nothing"


@pytest.mark.backends
@pytest.mark.parametrize(("target", "noted"), [("gn", True), ("sn", True), ("brn", False)])
@pytest.mark.parametrize("masking", [True, False])
def test_a_mask_that_arrives_is_noted(target, noted, masking):
    """A norm by a sample's statistics behind a mask is noted, brn and a norm without a mask are not."""
    inputs = keras.Input((6, 4))
    x = layers.Masking()(inputs) if masking else inputs
    model = keras.Model(inputs, layers.LSTM(2)(layers.BatchNormalization(name="bn")(layers.Dense(3)(x))))
    plan = normswap.plan(model, target, example=np.ones((2, 6, 4), "float32"))
    assert (NOTE in plan.decisions[0].note) is (noted and masking)
