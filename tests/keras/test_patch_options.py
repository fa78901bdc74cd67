"""The options a Keras BatchNorm may have."""

import json

import h5py
import keras
import numpy as np
import pytest
from keras import layers

from normswap.bundles.source import load_model
from normswap.convert.carry_over import carry_over
from normswap.convert.targets import BatchRenorm, GroupNorm, SwitchNorm, as_target
from normswap.errors import InputError
from normswap.patchers.keras.patch import patch
from normswap.patchers.keras.swap import read_state

from ..helpers import exactly
from .models import output

pytestmark = pytest.mark.backends

TARGETS = ["brn", "sn", "gn"]
NATIVE = ["renorm", "synchronized"] if keras.backend.backend() == "tensorflow" else ["renorm"]
"""Keras refuses synchronized layers on other backends itself."""


@pytest.mark.parametrize(
    "target",
    [GroupNorm(2), SwitchNorm("even"), SwitchNorm("warm", "frozen"), SwitchNorm("even", "none"), BatchRenorm(2.0, 1.0)],
)
@pytest.mark.parametrize("affine", [{}, {"scale": False}, {"center": False}, {"scale": False, "center": False}])
def test_missing_scale_and_shift_are_created_where_needed(target, affine, train):
    """Scale, shift and gates are the carry-over's; what BatchNorm lacked is created where it is needed."""
    model = train(keras.Sequential([keras.Input((5, 5, 6)), layers.BatchNormalization(**affine)]))
    layer = model.layers[-1]
    carried = carry_over(read_state(layer), target, groups=2, spatial=(5, 5))
    patch(model, target)
    if not isinstance(target, BatchRenorm) or not affine:
        np.testing.assert_allclose(layer.gamma.numpy(), carried.gamma, rtol=1e-6)
        np.testing.assert_allclose(layer.beta.numpy(), carried.beta, rtol=1e-6)
    else:
        assert (layer.gamma is None) == ("scale" in affine)
        assert (layer.beta is None) == ("center" in affine)
    if isinstance(target, SwitchNorm):
        np.testing.assert_allclose(layer.mean_weight.numpy(), carried.gate_logits, rtol=1e-6)
        np.testing.assert_allclose(layer.var_weight.numpy(), carried.gate_logits, rtol=1e-6)


@pytest.mark.parametrize("target", TARGETS)
def test_a_layer_keeps_what_is_its_own(target, train):
    """Name, policy, flags, regularizers, constraints, user attributes and the affine variables live on."""
    options = {"gamma_regularizer": keras.regularizers.L2(0.1), "beta_constraint": keras.constraints.NonNeg()}
    norm = layers.BatchNormalization(1, epsilon=1e-5, name="bn", dtype="mixed_float16", trainable=False, **options)
    model = train(keras.Sequential([keras.Input((4, 5, 5)), norm]))
    norm.note = "mine"
    gamma, beta, losses = norm.gamma, norm.beta, len(model.losses)
    patch(model, as_target(target))
    assert (norm.name, norm.axis, norm.epsilon, norm.note, norm.trainable) == ("bn", 1, 1e-5, "mine", False)
    assert norm.dtype_policy.name == "mixed_float16"
    assert norm.gamma is gamma
    assert norm.beta is beta
    assert not model.trainable_weights
    assert {v.dtype for v in norm.weights} == {"float32"}
    assert [losses, len(model.losses)] == [0, 0]  # frozen
    norm.trainable = True
    assert [v.name for v in norm.trainable_weights[:2]] == ["gamma", "beta"]
    assert len(model.losses) == 1
    assert type(norm.beta.constraint) is keras.constraints.NonNeg
    assert keras.backend.standardize_dtype(model(np.zeros((1, 4, 5, 5), "float32")).dtype) == "float16"


@pytest.mark.parametrize("option", NATIVE)
@pytest.mark.parametrize("target", TARGETS)
def test_native_renorm_and_synchronized_are_batch_norms(option, target, train, images):
    """Native batch renormalization and synchronization are BatchNorms at inference and are replaced as such."""
    model = train(keras.Sequential([keras.Input((8, 8, 3)), layers.BatchNormalization(**{option: True})]))
    before, weights = output(model, images), model.get_weights()
    report = patch(model, as_target(target))
    assert not {v.name for v in model.variables} & {"moving_stddev", "renorm_mean", "renorm_stddev"}
    if target == "brn":
        np.testing.assert_array_equal(output(model, images), before)
    if target == "sn":
        assert model.layers[-1].synchronized == (option == "synchronized")
    report.undo()
    assert all(map(np.array_equal, model.get_weights(), weights))


def test_native_renorm_trains_on_alike(images):
    """A native renorm with the default momenta keeps one average twice: ours trains on from it to the same numbers."""
    clipping = {"rmax": 3.0, "rmin": 1 / 3, "dmax": 5.0}
    native, ours = (
        keras.Sequential([keras.Input((8, 8, 3)), layers.BatchNormalization(renorm=True, renorm_clipping=clipping)])
        for _ in range(2)
    )
    for step in range(3):
        native(images * (step + 1), training=True)
    ours.set_weights(native.get_weights())
    patch(ours, BatchRenorm(3.0, 5.0))
    for step in range(2):
        outputs = [keras.ops.convert_to_numpy(model(images + step, training=True)) for model in (native, ours)]
        np.testing.assert_allclose(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)
    for name in ("moving_mean", "moving_variance"):
        expected, found = (getattr(model.layers[-1], name).numpy() for model in (native, ours))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("argument", [{"virtual_batch_size": 2}, {"fused": True}])
def test_arguments_that_keras_3_dropped_are_refused(argument, tmp_path):
    """A legacy file whose BatchNorm has an option that Keras 3 dropped is refused by layer and argument."""
    path = tmp_path / "old.h5"
    keras.Sequential([keras.Input((4, 3)), layers.BatchNormalization(name="bn")]).save(path)
    with h5py.File(path, "r+") as file:
        config = json.loads(file.attrs["model_config"])
        config["config"]["layers"][-1]["config"] |= argument
        file.attrs["model_config"] = json.dumps(config)
    message = (
        f"expected a Keras model in {path}, received a file Keras refuses: layer bn: "
        f"Unrecognized keyword arguments passed to BatchNormalization: {argument}"
    )
    with pytest.raises(InputError, match=exactly(message)) as caught:
        load_model(str(path))
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("target", TARGETS)
def test_legacy_files_are_patched_and_saved(target, train, images, tmp_path):
    """A model from a legacy .h5 file, whose axis is a list, is patched, saved as .h5 and loaded bit for bit."""
    body = [layers.Conv2D(4, 3), layers.BatchNormalization(name="bn"), layers.GlobalAveragePooling2D()]
    model = train(keras.Sequential([keras.Input((8, 8, 3)), *body]))
    model.save(tmp_path / "old.h5")
    with h5py.File(tmp_path / "old.h5", "r+") as file:
        config = json.loads(file.attrs["model_config"])
        config["config"]["layers"][2]["config"]["axis"] = [3]  # as Keras 2 writes it
        file.attrs["model_config"] = json.dumps(config)
    old = load_model(str(tmp_path / "old.h5"))
    np.testing.assert_array_equal(output(old, images), output(model, images))
    assert len(patch(old, as_target(target)).replaced) == 1
    old.save(tmp_path / "new.h5")
    np.testing.assert_array_equal(output(load_model(str(tmp_path / "new.h5")), images), output(old, images))
