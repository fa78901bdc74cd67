"""Networks whose own code folds BatchNorms or sets their mode, before and after a patch."""

import copy

import pytest
import torch
from torch import nn

import normswap
from normswap import SwitchNorm

from ..helpers import exactly
from . import folding_helpers
from .folding_helpers import fuse_conv_and_bn
from .models import trained_

FUSES = "the model ({}.{}) reads running statistics: fuse or reparameterize before the patch, not after"
KEEPS = "the model ({}.{}) sets the mode of BatchNorms by their class: set that of the replacement there"


class Detector(nn.Module):
    """A network with ``conv`` and ``bn``."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)

    def forward(self, x):
        """Convolve and normalize."""
        return self.bn(self.conv(x))


class ByFunction(Detector):
    """Folds in a function."""

    def fuse(self):
        """Fold."""
        return fuse_conv_and_bn(self.conv, self.bn)


class ByModule(Detector):
    """Folds in a function of a module, from a method of its own."""

    def switch_to_deploy(self):
        """Fold."""
        return self._fused()

    def _fused(self):
        return folding_helpers.fuse_conv_and_bn(self.conv, self.bn)


class ByImport(Detector):
    """Folds in a function that it imports when it is called, in a comprehension."""

    def reparameterize(self):
        """Fold."""
        from .folding_helpers import fuse_conv_and_bn

        return [fuse_conv_and_bn(self.conv, bn) for bn in [self.bn]]


class Inheriting(ByFunction):
    """Folds by what it inherits."""


class Initializing(Detector):
    """Sets running statistics as it is made, as transformers' models do."""

    def post_init(self):
        """Initialize."""
        self._init_weights(self.bn)

    def _init_weights(self, module):
        module.running_mean.zero_()
        module.running_var.fill_(1)


class Plain(Detector):
    """Fuses nothing of a norm, and has a train that only counts."""

    def fuse_features(self, x):
        """Return a sum."""
        return x.sum()

    def train(self, mode=True):
        """Count."""
        self.count = 1
        return super().train(mode)


class NormEval(Detector):
    """Keeps BatchNorms in eval mode, as backbones do."""

    def train(self, mode=True):
        """Train, but for BatchNorms."""
        super().train(mode)
        folding_helpers.keep_norms_in_eval(self)
        return self


@pytest.mark.parametrize("target", ["sn", "gn"])
@pytest.mark.parametrize(
    ("cls", "method"),
    [
        (ByFunction, "fuse"),
        (ByModule, "switch_to_deploy"),
        (ByImport, "reparameterize"),
        (Inheriting, "fuse"),
    ],
)
def test_a_method_that_folds_in_a_helper_is_noted(cls, method, target):
    """What a method calls is followed, into other functions, modules and methods."""
    note = normswap.plan(cls(), target).decisions[0].note

    assert note.partition(";")[0] == FUSES.format(cls.__name__, method)


@pytest.mark.parametrize("cls", [Initializing, Plain])
def test_other_code_is_not_noted(cls):
    """Initialization sets statistics without folding, and not every name with fuse in it is about norms."""
    assert normswap.plan(cls(), "sn").decisions[0].note == ""


@pytest.mark.parametrize("target", ["sn", "brn"])
def test_a_train_that_freezes_by_class_is_noted(target):
    """A replaced layer is no BatchNorm by class, so its running statistics would move."""
    assert normswap.plan(NormEval(), target).decisions[0].note == KEEPS.format("NormEval", "train")


@pytest.mark.parametrize("target", ["gn", SwitchNorm(batch_statistics="frozen")])
def test_where_nothing_moves_the_mode_does_not_matter(target):
    """There is no note for a layer without statistics that move."""
    assert "mode" not in normswap.plan(NormEval(), target).decisions[0].note


def test_a_batch_renorm_folds_as_a_batch_norm(images):
    """At inference it is one, and the helper that reads its attributes is right."""
    model = trained_(Detector())
    normswap.patch(model, "brn")

    torch.testing.assert_close(fuse_conv_and_bn(model.conv, model.bn)(images), model(images))


def test_a_switch_norm_is_not_folded_by_mistake():
    """Its statistics are not those of the batch alone: the helper fails, and is told what to do."""
    model = trained_(Detector())
    normswap.patch(model, "sn")
    message = (
        "bn: expected a BatchNorm, which folds into the layer in front, received a SwitchNorm2d, which does not, as "
        "each sample has a share in its statistics; fuse the model before the patch or not at all (ε is the attribute "
        "`epsilon`)"
    )
    for twin in (model, copy.deepcopy(model)):
        with pytest.raises(AttributeError, match=exactly(message)):
            fuse_conv_and_bn(twin.conv, twin.bn)
        with pytest.raises(AttributeError, match=exactly(message)):
            nn.utils.fusion.fuse_conv_bn_eval(twin.conv.eval(), twin.bn.eval())


def test_an_epsilon_set_on_a_switch_norm_is_its_own(images):
    """Code that sets ``eps`` on every norm sets it."""
    model = trained_(Detector())
    normswap.patch(model, "sn")
    before = model(images)
    model.bn.eps = 10.0

    assert model.bn.epsilon == 10.0
    assert not torch.allclose(model(images), before)


def test_a_group_norm_is_not_folded_by_mistake():
    """It has no running statistics to be read."""
    model = trained_(Detector())
    normswap.patch(model, "gn")
    with pytest.raises(AttributeError, match=exactly("'GroupNorm' object has no attribute 'running_var'")):
        fuse_conv_and_bn(model.conv, model.bn)
