"""The optimizers of a Keras training, by their formulas."""

import keras
import numpy as np
import pytest
from keras import layers

from ..rules import RULES, agree, trained, training
from .fitting import fitted, small_net, stripes, values

pytestmark = pytest.mark.keras


@pytest.mark.backends
@pytest.mark.parametrize("options", RULES, ids=str)
def test_formulas(options):
    """A linear network comes to what the rule's formula says, its bias spared by weight decay."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((6, 6, 1)), layers.Flatten(), layers.Dense(2)])
    data, how = stripes(), training(**options)
    images, labels = data.batch(range(len(data)))
    weight, bias = trained(images.reshape(len(images), -1), labels, *model.get_weights(), how, rate_first=True)
    fitted(model, data, **{**options, "steps": how.steps, "lr": how.lr})

    assert agree(model.get_weights()[0], weight)
    assert agree(model.get_weights()[1], bias)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "amsgrad"])
def test_accumulated_batches_are_one_large_one(optimizer):
    """Two batches of 8 to a step are one of 16 to a rule that counts its steps."""
    whole, parts = small_net("gn"), small_net("gn")
    fitted(whole, optimizer=optimizer, lr=0.01)
    fitted(parts, optimizer=optimizer, lr=0.01, batch_size=8, accumulate=2)

    for one, other in zip(whole.get_weights(), parts.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


@pytest.mark.backends
@pytest.mark.parametrize("optimizer", ["adam", "adamw", "amsgrad"])
def test_what_is_spared(optimizer):
    """Weight decay is of all but norms, biases and gates, and gates have their multiple of the rate."""
    plain, decayed, fast = (small_net("sn") for _ in range(3))
    start = values(plain)
    fitted(plain, optimizer=optimizer, steps=1)
    fitted(decayed, optimizer=optimizer, steps=1, weight_decay=0.5)
    fitted(fast, optimizer=optimizer, steps=1, gate_lr=5.0)
    one, other, third = values(plain), values(decayed), values(fast)

    assert {name for name in one if not np.array_equal(one[name], other[name])} <= {"conv/kernel", "scores/kernel"}
    assert not np.array_equal(one["scores/kernel"], other["scores/kernel"])
    for name in one:
        times = 5 if name in ("norm/mean_weight", "norm/var_weight") else 1
        np.testing.assert_allclose(third[name] - start[name], times * (one[name] - start[name]), rtol=1e-3, atol=1e-6)
