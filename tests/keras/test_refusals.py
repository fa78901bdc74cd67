"""What a Keras patch refuses: by the site's name, with the reason and the way out, and the model as it was."""

import hashlib
import json

import keras
import numpy as np
import pytest
from keras import layers

from normswap.convert.targets import GroupNorm, SwitchNorm
from normswap.errors import InputError, UnsupportedError
from normswap.patchers.keras.patch import patch
from normswap.patchers.patch import patch as patch_any
from normswap.patchers.patch import plan

from ..helpers import exactly


class Plain(layers.BatchNormalization):
    """A subclass that adds nothing."""


class Doubling(layers.BatchNormalization):
    """A subclass whose call does more."""

    def call(self, inputs, training=None, mask=None):
        """Normalize and double."""
        return 2 * super().call(inputs, training, mask)


def fingerprint(model):
    """Return a hash of the classes, configuration and every variable of a model."""
    digest = hashlib.sha256()
    for layer in model._flatten_layers():
        digest.update(repr((type(layer), sorted(layer.__dict__))).encode())
        digest.update(json.dumps(layer.get_config(), sort_keys=True, default=repr).encode())
    for variable in model.variables:
        digest.update(variable.path.encode() + variable.numpy().tobytes())
    return digest.hexdigest()


def negative(make):
    """Return a model whose last BatchNorm has a negative variance."""
    model = make("functional")
    model.get_layer("bn2").moving_variance.assign([1.0, -1.0, 1.0, 1.0])
    return model


def patched(make):
    """Return a model patched to GroupNorm."""
    model = make("nested")
    patch(model, GroupNorm())
    return model


def doubling(make):
    """Return a model with a BatchNorm of a subclass that does more, within another."""
    inner = keras.Sequential([keras.Input((4,)), Plain(name="plain"), Doubling(name="double")], name="inner")
    return keras.Sequential([keras.Input((4,)), inner])


def along_the_batch(make):
    """Return a BatchNorm whose axis is the batch."""
    norm = layers.BatchNormalization(0, name="bn")
    norm.build((3, 4))
    return norm


CANNOT = "expected BatchNorms that can be replaced, received {} that cannot:\n{}\n" \
    "leave such a layer as it is with exclude='NAME'"  # fmt: skip
REFUSALS = {
    "negative": (
        negative,
        GroupNorm(),
        InputError,
        "bn2: expected finite parameters and variances >= 0, received 1 negative running variances",
    ),
    "patched": (
        patched,
        SwitchNorm(),
        UnsupportedError,
        CANNOT.format(
            2,
            "\n".join(
                f"  {name} (GroupNormalization): already patched to gn: undo that first, "
                "or patch the original model to sn"
                for name in ("middle/inner/bn", "middle/bn")
            ),
        ),
    ),
    "doubling": (
        doubling,
        GroupNorm(),
        UnsupportedError,
        CANNOT.format(1, "  inner/double (Doubling): Doubling overrides call: a replacement would lose what it adds"),
    ),
    "along the batch": (
        along_the_batch,
        GroupNorm(),
        UnsupportedError,
        CANNOT.format(1, "  bn (BatchNormalization): it normalizes along the batch (axis=0)"),
    ),
    "unbuilt": (
        lambda make: make("unbuilt"),
        GroupNorm(),
        UnsupportedError,
        CANNOT.format(
            1, "  norm (BatchNormalization): not built yet: give an example input, or call the model on one first"
        ),
    ),
    "indivisible": (
        lambda make: make("functional"),
        GroupNorm(3, indivisible="error"),
        UnsupportedError,
        CANNOT.format(
            2,
            "\n".join(
                f"  {name} (BatchNormalization): expected groups to divide the 4 channels, received groups=3; "
                "use groups=1, groups='auto', or indivisible='gcd'"
                for name in ("bn1", "bn2")
            ),
        ),
    ),
    "erased": (
        lambda make: make("sequential"),
        GroupNorm(channels_per_group=1),
        UnsupportedError,
        CANNOT.format(
            1,
            "  bn2 (BatchNormalization): a group of one value per sample normalises to zero and erases the signal "
            "(channels=6, groups=6, values per channel=1); "
            "use fewer groups, or leave the layer as it is with exclude='bn2'",
        ),
    ),
    "none": (
        lambda make: keras.Sequential([keras.Input((4,)), layers.Dense(2)]),
        GroupNorm(),
        UnsupportedError,
        "expected a model with BatchNorm layers to replace, received none",
    ),
}


@pytest.mark.parametrize(("build", "target", "error", "message"), REFUSALS.values(), ids=REFUSALS)
def test_a_refusal_leaves_the_model_untouched(build, target, error, message, make):
    """Type, exit code and whole message; classes, configuration and values are hashed before and after."""
    model = build(make)
    before = fingerprint(model)
    with pytest.raises(error, match=exactly(message)) as caught:
        patch(model, target)
    assert caught.value.exit_code == {InputError: 3, UnsupportedError: 4}[error]
    assert fingerprint(model) == before


def test_the_ways_out(make, images):
    """What the refusals advise works: leave a layer out, give an example."""
    assert len(patch(doubling(make), GroupNorm(), exclude=["inner/double"]).replaced) == 1
    assert len(patch(make("unbuilt"), GroupNorm(), example=images).replaced) == 1


def test_a_wrong_example_is_an_input_error(make):
    """An example that the model refuses is the caller's error, with the model's own words."""
    model = make("functional")
    before = fingerprint(model)
    with pytest.raises(InputError, match=r"^expected an example the model accepts, received one on which it fails: "):
        plan(model, GroupNorm(), example=np.zeros((1, 5), "float32"))
    assert fingerprint(model) == before


def test_models_of_keras_2_are_refused():
    """A tf_keras model, known by where its class comes from, is refused with what to do; so is a subclass of one."""
    functional = type("Functional", (), {"__module__": "tf_keras.src.engine.functional"})
    for cls in (functional, type("Mine", (functional,), {"__module__": "mine"})):
        message = (
            f"expected a Keras 3 model, received {cls.__module__}.{cls.__name__} of Keras 2; load it again with `keras`"
        )
        with pytest.raises(UnsupportedError, match=exactly(message)) as caught:
            patch_any(cls(), "gn")
        assert caught.value.exit_code == 4
