"""Arguments that other systems' layers have, given to ours: taken with their compat, or told what they are here."""

import inspect

import pytest
import torch

from normswap.layers.torch import BatchRenorm2d, SwitchNorm1d, SwitchNorm2d, SwitchNorm3d

from ..helpers import exactly

LAYERS = [SwitchNorm1d, SwitchNorm2d, SwitchNorm3d]


@pytest.mark.parametrize("layer", LAYERS)
def test_what_switchablenorms_takes(layer):
    """With compat every argument of theirs makes the layer that ours make."""
    arguments = {"using_moving_average": True, "using_bn": False, "last_gamma": True}
    theirs = layer(4, momentum=0.5, **arguments, compat="switchablenorms")
    ours = layer(4, momentum=0.5, batch_statistics="none", zero_init=True, compat="switchablenorms")

    assert repr(theirs) == repr(ours)
    assert theirs.weight.tolist() == ours.weight.tolist() == [0] * 4
    default = layer(4, using_bn=True, last_gamma=False, compat="switchablenorms")
    assert (default.batch_statistics, default.weight.tolist()) == ("moving", [1] * 4)


def test_momentum_weighs_the_old_value_as_theirs():
    """A momentum of 0.9 with compat moves the mean by a tenth, and by nine tenths without."""
    moved = {}
    for compat in ("switchablenorms", None):
        layer = SwitchNorm2d(1, momentum=0.9, compat=compat)
        layer(torch.ones(2, 1, 3, 3) * 5)
        moved[compat] = float(layer.running_mean)

    assert moved == pytest.approx({"switchablenorms": 0.5, None: 4.5})


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: SwitchNorm2d(4, last_gamma=True),
            "SwitchNorm2d: expected zero_init=True, as it is called here, received last_gamma=True; "
            "compat='switchablenorms' takes it as well",
        ),
        (
            lambda: SwitchNorm2d(4, using_bn=False),
            "SwitchNorm2d: expected batch_statistics='none', as it is called here, received using_bn=False; "
            "compat='switchablenorms' takes it as well",
        ),
        (
            lambda: SwitchNorm1d(4, using_moving_average=True),
            "SwitchNorm1d: expected no using_moving_average, as using_moving_average=True is how it computes, received "
            "it; compat='switchablenorms' takes it as well",
        ),
        (
            lambda: SwitchNorm3d(4, using_moving_average=False, compat="switchablenorms"),
            "SwitchNorm3d: expected averages over batches to be taken after training, by "
            "normswap.finetune.update_statistics(model, batches), received using_moving_average=False; leave it out",
        ),
        (
            lambda: SwitchNorm2d(4, final_gamma=True, compat="switchablenorms"),
            "SwitchNorm2d: expected zero_init=True, as it is called here, received final_gamma=True",
        ),
        (
            lambda: SwitchNorm2d(4, mean_weights_initializer="zeros"),
            "SwitchNorm2d: expected gates to be given to the layer, as `mean_weight` and `var_weight`, and penalties "
            "and constraints to be a training loop's, received mean_weights_initializer='zeros'; leave it out",
        ),
        (
            lambda: SwitchNorm2d(4, variance_weights_constraints="non_neg"),
            "SwitchNorm2d: expected gates to be given to the layer, as `mean_weight` and `var_weight`, and penalties "
            "and constraints to be a training loop's, received variance_weights_constraints='non_neg'; leave it out",
        ),
        (
            lambda: SwitchNorm2d(4, epsilon=1e-3),
            "SwitchNorm2d: expected eps=0.001, as it is called here, received epsilon=0.001",
        ),
        (
            lambda: SwitchNorm2d(4, zero_init=False, last_gamma=True, compat="switchablenorms"),
            "SwitchNorm2d: expected last_gamma or zero_init, which are the same, received last_gamma=True and "
            "zero_init=False",
        ),
        (
            lambda: SwitchNorm2d(4, 1e-5, 0.9, True, True, False, compat="switchablenorms"),
            "SwitchNorm2d: expected arguments behind momentum by name with compat='switchablenorms', whose layer has "
            "them in another order, received 3 without",
        ),
        (
            lambda: BatchRenorm2d(4, r_max_value=2.0),
            "BatchRenorm2d: expected r_max=2.0, as it is called here, received r_max_value=2.0",
        ),
        (
            lambda: BatchRenorm2d(4, d_max_value=1.0),
            "BatchRenorm2d: expected d_max=1.0, as it is called here, received d_max_value=1.0",
        ),
        (
            lambda: BatchRenorm2d(4, mode=2),
            "BatchRenorm2d: expected the batch's statistics at inference to come of a layer in training mode, received "
            "mode=2; leave it out",
        ),
        (
            lambda: BatchRenorm2d(4, weights=[1, 2]),
            "BatchRenorm2d: expected arrays to be given to the layer, by load_state_dict, received weights=[1, 2]; "
            "leave it out",
        ),
        (
            lambda: BatchRenorm2d(4, gamma_init="one"),
            "BatchRenorm2d: expected γ to be given to the layer, as `weight`, received gamma_init='one'; leave it out",
        ),
    ],
)
def test_what_is_refused(build, message):
    """An argument of another layer that is not taken is named with what it is here."""
    with pytest.raises(TypeError, match=exactly(message)):
        build()


def test_an_unknown_argument_is_as_unknown_as_ever():
    """A misspelt name is none of another system's."""
    with pytest.raises(TypeError, match="got an unexpected keyword argument 'using_mean'$"):
        SwitchNorm2d(4, using_mean=True)


def test_the_signature_is_that_of_the_layer():
    """Editors and help() show our own arguments."""
    assert list(inspect.signature(SwitchNorm2d).parameters)[:3] == ["num_features", "eps", "momentum"]
