"""Arguments that other systems' layers have, given to ours: taken with their compat, or told what they are here."""

import keras
import numpy as np
import pytest

from normswap.layers.keras import BatchRenormalization, SwitchNormalization, group_normalization

from ..helpers import exactly

pytestmark = [pytest.mark.keras, pytest.mark.backends]


def test_what_keras_switchnorm_takes():
    """With compat every argument of theirs is the one of ours that means it."""
    theirs, penalty = {"final_gamma": True}, keras.regularizers.L2(0.1)
    for gate in ("mean_weights", "variance_weights"):
        theirs |= {f"{gate}_initializer": "zero", f"{gate}_regularizer": penalty, f"{gate}_constraints": "non_neg"}
    layer = SwitchNormalization(-1, 0.98, 1e-3, **theirs, compat="keras-switchnorm", name="sn")

    own = {"zero_init": True}
    for gate in ("mean_weight", "var_weight"):
        own |= {f"{gate}_initializer": "zeros", f"{gate}_regularizer": penalty, f"{gate}_constraint": "non_neg"}
    expected = SwitchNormalization(-1, 0.98, 1e-3, **own, compat="keras-switchnorm", name="sn")
    assert layer.get_config() == expected.get_config()
    layer.build((None, 4, 4, 3))
    assert layer.gamma.numpy().tolist() == layer.mean_weight.numpy().tolist() == [0] * 3


def test_what_batch_renormalization_takes():
    """With compat the arguments of both its versions are those of ours, and mode 0 is how it computes."""
    theirs = {"r_max_value": 2.0, "d_max_value": 4.0, "gamma_init": "zero", "beta_init": "one", "mode": 0}
    layer = BatchRenormalization(**theirs, t_delta=0.5, compat="titu1994", name="brn")

    own = {"r_max": 2.0, "d_max": 4.0, "gamma_initializer": "zeros", "beta_initializer": "ones"}
    expected = BatchRenormalization(**own, t_delta=0.5, compat="titu1994", name="brn")
    assert layer.get_config() == expected.get_config()


@pytest.mark.parametrize("switched", [True, False])
@pytest.mark.parametrize("absent", [(), ("scale",), ("center",), ("scale", "center")])
def test_weights(switched, absent):
    """A layer starts with the arrays given, in the order of the systems' files; its configuration has none."""
    names = ["gamma", "beta", *(["mean_weight", "var_weight"] if switched else []), "moving_mean", "moving_variance"]
    names = [name for name in names if {"gamma": "scale", "beta": "center"}.get(name) not in absent]
    arrays = [np.arange(3.0) + index for index in range(len(names))]
    kind, compat = (SwitchNormalization, "keras-switchnorm") if switched else (BatchRenormalization, "titu1994")

    layer = kind(**dict.fromkeys(absent, False), weights=arrays, compat=compat)
    layer(np.ones((2, 4, 4, 3)))

    for name, array in zip(names, arrays, strict=True):
        np.testing.assert_array_equal(getattr(layer, name), array)
    again = kind.from_config(layer.get_config())
    again.build((None, 4, 4, 3))
    assert again.moving_mean.numpy().tolist() == ([1] * 3 if switched else [0] * 3)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            [np.ones(3)] * 2,
            "expected `weights` as gamma, beta, moving_mean, moving_variance, received 2 arrays",
        ),
        (
            [np.ones(3), np.ones(4), np.ones(3), np.ones(3)],
            "expected `weights` with beta of shape=(3,), received shape=(4,)",
        ),
    ],
)
def test_weights_that_do_not_fit(arrays, message):
    """What is missing or of another shape is told when the layer is built."""
    layer = BatchRenormalization(weights=arrays)
    with pytest.raises(ValueError, match=exactly(message)):
        layer.build((None, 4, 4, 3))


GATES = {
    f"{theirs}_{what}": f"{ours}_{what.removesuffix('s')}"
    for theirs, ours in (("mean_weights", "mean_weight"), ("variance_weights", "var_weight"))
    for what in ("initializer", "regularizer", "constraints")
}


@pytest.mark.parametrize(("theirs", "ours"), GATES.items())
def test_gates_arguments_without_compat(theirs, ours):
    """Each of the six is named with what it is called here."""
    message = (
        f"SwitchNormalization: expected {ours}='l2', as it is called here, received {theirs}='l2'; "
        "compat='keras-switchnorm' takes it as well"
    )
    with pytest.raises(TypeError, match=exactly(message)):
        SwitchNormalization(**{theirs: "l2"})


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: SwitchNormalization(final_gamma=True),
            "SwitchNormalization: expected zero_init=True, as it is called here, received final_gamma=True; "
            "compat='keras-switchnorm' takes it as well",
        ),
        (
            lambda: SwitchNormalization(last_gamma=True, compat="keras-switchnorm"),
            "SwitchNormalization: expected zero_init=True, as it is called here, received last_gamma=True",
        ),
        (
            lambda: SwitchNormalization(using_bn=False),
            "SwitchNormalization: expected batch_statistics='none', as it is called here, received using_bn=False",
        ),
        (
            lambda: SwitchNormalization(using_moving_average=False),
            "SwitchNormalization: expected averages over batches to be taken after training, by "
            "normswap.finetune.update_statistics(model, batches), received using_moving_average=False; leave it out",
        ),
        (
            lambda: SwitchNormalization(eps=1e-5),
            "SwitchNormalization: expected epsilon=1e-05, as it is called here, received eps=1e-05",
        ),
        (
            lambda: SwitchNormalization(-1, 0.98, 1e-3, False, compat="keras-switchnorm"),
            "SwitchNormalization: expected arguments behind epsilon by name with compat='keras-switchnorm', whose "
            "layer has them in another order, received 1 without",
        ),
        (
            lambda: SwitchNormalization(final_gamma=True, zero_init=True, compat="keras-switchnorm"),
            "SwitchNormalization: expected final_gamma or zero_init, which are the same, received final_gamma=True and "
            "zero_init=True",
        ),
        (
            lambda: BatchRenormalization(r_max_value=3.0),
            "BatchRenormalization: expected r_max=3.0, as it is called here, received r_max_value=3.0; "
            "compat='titu1994' takes it as well",
        ),
        (
            lambda: BatchRenormalization(d_max_value=5.0),
            "BatchRenormalization: expected d_max=5.0, as it is called here, received d_max_value=5.0; "
            "compat='titu1994' takes it as well",
        ),
        (
            lambda: BatchRenormalization(gamma_init="one"),
            "BatchRenormalization: expected gamma_initializer='one', as it is called here, received gamma_init='one'; "
            "compat='titu1994' takes it as well",
        ),
        (
            lambda: BatchRenormalization(mode=0),
            "BatchRenormalization: expected no mode, as mode=0 is how it computes, received it; compat='titu1994' "
            "takes it as well",
        ),
        (
            lambda: BatchRenormalization(mode=1, compat="titu1994"),
            "BatchRenormalization: expected a norm of each sample to be a keras.layers.LayerNormalization, received "
            "mode=1; leave it out",
        ),
        (
            lambda: BatchRenormalization(mode=2, compat="titu1994"),
            "BatchRenormalization: expected the batch's statistics at inference to be asked for by a call, "
            "model(x, training=True), received mode=2; leave it out",
        ),
        (
            lambda: BatchRenormalization(-1, 0.99, True, True, 1e-3, compat="titu1994"),
            "BatchRenormalization: expected arguments behind momentum by name with compat='titu1994', whose layer has "
            "them in another order, received 3 without",
        ),
    ],
)
def test_what_is_refused(build, message):
    """An argument of another layer that is not taken is named with what it is here."""
    with pytest.raises(TypeError, match=exactly(message)):
        build()


def test_a_truth_value_is_no_epsilon():
    """Another order of arguments is not taken for an ε of 1."""
    with pytest.raises(ValueError, match=exactly("expected `epsilon` above 0, received epsilon=True")):
        BatchRenormalization(-1, 0.99, True, True, 1e-3)


class TestGroupNormalization:
    @pytest.mark.parametrize("first", [False, True])
    def test_it_computes_what_theirs_computes(self, first):
        """Groups are of neighbouring channels, variances biased, ε theirs, wherever the channels are."""
        data_format = "channels_first" if first else "channels_last"
        layer = group_normalization(group=3, gamma_init="one", beta_init="zero", data_format=data_format)
        x = np.random.default_rng(1).normal(2, 3, (2, 6, 4, 4) if first else (2, 4, 4, 6)).astype("float32")
        last = np.moveaxis(x, 1, -1) if first else x

        grouped = last.reshape(2, 4, 4, 3, 2).astype(np.float64)
        mean, variance = (f(grouped, (1, 2, 4), keepdims=True) for f in (np.mean, np.var))
        expected = ((grouped - mean) / np.sqrt(variance + 1e-6)).reshape(last.shape)
        expected = np.moveaxis(expected, -1, 1) if first else expected
        np.testing.assert_allclose(keras.ops.convert_to_numpy(layer(x)), expected, rtol=1e-4, atol=1e-5)

    def test_every_argument(self):
        """Each is one of Keras's, so that Keras saves and loads the layer by itself."""
        theirs = group_normalization(-1, "zero", "one", "l2", "l1", 1e-5, 4, name="gn")
        expected = keras.layers.GroupNormalization(
            4,
            epsilon=1e-5,
            gamma_initializer="zeros",
            beta_initializer="ones",
            gamma_regularizer="l2",
            beta_regularizer="l1",
            name="gn",
        )
        assert type(theirs) is keras.layers.GroupNormalization
        assert theirs.get_config() == expected.get_config()

    def test_another_data_format(self):
        """It is told with those that there are."""
        message = "expected `data_format` out of channels_first, channels_last, received data_format='th'"
        with pytest.raises(ValueError, match=exactly(message)):
            group_normalization(data_format="th")
