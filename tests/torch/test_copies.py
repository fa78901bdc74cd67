"""Copies of models that hold more than parameters and buffers."""

import threading

import pytest
import torch
from torch import nn

import normswap
from normswap.errors import UnsupportedError

from ..helpers import exactly
from .models import trained_

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


class Keeping(nn.Module):
    """A network that keeps what it has computed."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.seen = {}

    def forward(self, x):
        """Convolve, normalize and keep."""
        y = self.bn(self.conv(x))
        self.seen["layers"] = [y]
        return y


class Locked(nn.Module):
    """A module with a lock."""

    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()

    def forward(self, x):
        """Return ``x``."""
        return x


def normed(norm):
    return nn.Sequential(norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4))


MODELS = {
    "weight_norm": lambda: normed(nn.utils.weight_norm),
    "spectral_norm": lambda: normed(nn.utils.spectral_norm),
    "parametrized": lambda: normed(nn.utils.parametrizations.weight_norm),
    "keeping": Keeping,
}


@pytest.fixture(params=MODELS)
def used(request, images):
    """A network after a forward with gradients, which leaves tensors with a history in it."""
    model = trained_(MODELS[request.param]())
    model(images)
    return model


def test_a_copy_is_patched_after_a_forward(used, images):
    """The copy computes as the model patched in place, and the model is as it was."""
    before = used(images)
    copied = normswap.patch(used, "brn", inplace=False).model

    torch.testing.assert_close(copied(images), before)
    assert torch.equal(used(images), before)


def test_a_report_has_the_original_after_a_forward(used, images):
    """So it does for a copy of the model as it was."""
    before = used(images)
    report = normswap.patch(used, "gn")
    used(images)

    torch.testing.assert_close(report.original()(images), before)


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm"])
def test_a_file_is_written_and_proved_after_a_forward(name, images, tmp_path):
    """An export works on a copy, in float64 as well."""
    model = trained_(MODELS[name]())
    model(images)

    assert normswap.to_onnx(model, tmp_path / "model.onnx", example=images).verdict


def test_what_cannot_be_copied_is_named():
    """The innermost module is named, with the reason and the way out."""
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(Locked()))
    message = (
        "1.0: expected a module that Python can copy, received a Locked that it cannot (cannot pickle '_thread.lock' "
        "object); take that out, or patch the model itself"
    )
    with pytest.raises(UnsupportedError, match=exactly(message)):
        normswap.patch(model, "gn", inplace=False)
