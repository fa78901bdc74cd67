"""How far a patched Keras model is from the original, and rules on Keras names."""

import numpy as np
import pytest

import normswap
from normswap import GroupNorm, SwitchNorm
from normswap.convert.recipe import Rule, Rules
from normswap.errors import InputError, UnsupportedError
from normswap.frameworks.keras import named_layers
from normswap.patchers.measured_drift import drift_between

from .models import MODELS, output

pytestmark = [
    pytest.mark.keras,
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
]


def twins(make, kind):
    """Two models alike."""
    model, original = make(kind), make(kind)
    original.set_weights(model.get_weights())
    return model, original


@pytest.mark.parametrize("kind", sorted(MODELS))
@pytest.mark.parametrize("target", ["gn", "sn", "brn"])
def test_against_the_original(make, images, kind, target):
    """For models of every kind the figures are those against the original itself."""
    model, original = make(kind), make(kind)
    original(images), model(images)
    original.set_weights(model.get_weights())
    report = normswap.patch(model, target, example=images)
    names = [decision.site.name for decision in report.replaced]
    before = model.get_weights()
    found = report.drift(images)
    new, old = (output(net, images) for net in (model, original))

    assert {each.name for each in found} == {*names, "output"}
    assert found[-1].rms == pytest.approx(np.linalg.norm(new - old) / np.linalg.norm(old), abs=1e-5)
    assert all(map(np.array_equal, model.get_weights(), before))
    for each, same in zip(found, drift_between(model, original, names, images), strict=True):
        assert (each.rms, each.max) == pytest.approx((same.rms, same.max), abs=1e-5)


def test_nothing_changes(make, images):
    """Classes and contents are as before, also where the example fails; training and undo refuse."""
    model = make("functional")
    output(model, images)
    report = normswap.patch(model, "gn")

    def contents():
        return [(type(layer), dict(layer.__dict__)) for _, layer in named_layers(model)]

    before = contents()
    report.drift(images)
    assert contents() == before
    with pytest.raises(InputError, match="^expected an example the model accepts, received one on which it fails: "):
        report.drift(images[..., :1])

    assert contents() == before
    report.undo()
    with pytest.raises(UnsupportedError, match="^expected a patched model, received one whose patch was undone$"):
        report.drift(images)


def test_mixed_rules_replay_bit_equal(make, images):
    """What rules made is a recipe of exact sites, which makes the same of a model with the same weights."""
    model, fresh = twins(make, "functional")
    rules = Rules((Rule(GroupNorm(groups=2), depth=(0, 0.5)), Rule(SwitchNorm("even", "frozen"), "*")))
    report = normswap.patch(model, rules)
    normswap.patch(fresh, normswap.Recipe.from_json(report.recipe.to_json()))

    assert [choice.target.kind for choice in report.recipe.choices] == ["gn", "sn"]
    assert all(map(np.array_equal, fresh.get_weights(), model.get_weights()))
    np.testing.assert_array_equal(model.predict(images, verbose=0), fresh.predict(images, verbose=0))
