"""What each layer promises beside conformance: special cases, options, and its own refusals."""

import copy
import re

import pytest
import torch
from torch import nn

import normswap
from normswap.layers import torch as layers

from ..helpers import exactly
from .models import filled


class TestSwitchNorm:
    def test_temperature(self):
        """A low temperature sharpens the gates, and 0 takes the largest alone."""
        layer = layers.SwitchNorm2d(5)
        layer.mean_weight.data = torch.tensor([0.0, 1.0, 0.5])
        layer.temperature = 0.5
        torch.testing.assert_close(layer.gates()[0], torch.tensor([0.0, 2.0, 1.0]).softmax(0))
        layer.temperature = 0

        assert layer.gates()[0].tolist() == [0, 1, 0]

    def test_harden(self):
        """harden() makes the largest gate 1 for good, ties broken towards the first."""
        layer = layers.SwitchNorm2d(5)
        layer.mean_weight.data = torch.tensor([0.0, 1.0, 0.5])
        layer.harden()

        assert [gates.tolist() for gates in layer.gates()] == [[0, 1, 0], [1, 0, 0]]

    def test_frozen_statistics_keep_samples_apart(self):
        """With batch_statistics="frozen" a sample's output and every gradient are its own, in training too."""
        layer = filled(layers.SwitchNorm2d, 5, batch_statistics="frozen").train()
        before = layer.running_mean.clone()
        x = torch.randn(4, 5, 3, 3)

        together, alone = layer(x), torch.cat([layer(sample[None]) for sample in x])

        torch.testing.assert_close(together, alone)
        assert torch.equal(layer.running_mean, before)

    def test_no_batch_statistics(self):
        """With batch_statistics="none" there are two gates and no running statistics."""
        layer = layers.SwitchNorm2d(5, batch_statistics="none")

        assert [gate.tolist() for gate in layer.gates()] == [[0.5, 0.5]] * 2
        assert [name for name, _ in layer.named_buffers()] == ["temperature"]
        assert torch.isfinite(layer(torch.randn(1, 5, 1, 1))).all()

    @pytest.mark.parametrize("strict", [True, False])
    @pytest.mark.parametrize(("own", "saved"), [("moving", "none"), ("none", "frozen")])
    def test_another_number_of_gates(self, own, saved, strict):
        """A state dict with two gates for three, or three for two, is refused as such, however lax the loading."""
        model = nn.Sequential(nn.Conv2d(3, 5, 1), layers.SwitchNorm2d(5, batch_statistics=own))
        before = {name: value.clone() for name, value in model[1].state_dict().items()}
        state = nn.Sequential(nn.Conv2d(3, 5, 1), layers.SwitchNorm2d(5, batch_statistics=saved)).state_dict()
        shapes = {"moving": (3,), "frozen": (3,), "none": (2,)}
        message = (
            f"expected saved 1.mean_weight of shape={shapes[own]} for batch_statistics={own!r}, received "
            f"shape={shapes[saved]}; give the layer the batch_statistics it was saved with"
        )
        with pytest.raises(ValueError, match=exactly(message)):
            model.load_state_dict(state, strict=strict)

        assert all(torch.equal(value, before[name]) for name, value in model[1].state_dict().items())

    def test_wrong_arguments(self):
        """Constructor arguments are checked by name."""
        with pytest.raises(ValueError, match=r"^expected `num_features` of at least 1, received num_features=0$"):
            layers.SwitchNorm2d(0)
        with pytest.raises(ValueError, match=r"^expected `eps` of at least 0, received eps=-1$"):
            layers.SwitchNorm2d(3, eps=-1)
        message = "expected `batch_statistics` out of moving, frozen, none, received batch_statistics='off'"
        with pytest.raises(ValueError, match=f"^{message}$"):
            layers.SwitchNorm2d(3, batch_statistics="off")


def test_errors_name_the_site_of_a_patched_model(model, images):
    """In a patched model an error begins with the layer's name there; undone and saved, nothing of it is left."""
    keys = list(model.state_dict())
    report = normswap.patch(model, "brn")
    model.train()
    message = "bn: expected more than one value per channel in training, received shape=(1, 8, 1, 1); "
    with pytest.raises(ValueError, match=f"^{re.escape(message)}use a larger batch, or eval\\(\\)$"):
        model.bn(torch.zeros(1, 8, 1, 1))

    assert [copy.deepcopy(model).stem[1].site, model.bn.site] == ["stem.1", "bn"]
    assert set(model.state_dict()) == {
        *keys,
        *(f"{n}.{limit}" for n in ("stem.1", "bn") for limit in ("r_max", "d_max")),
    }
    report.undo()
    assert not hasattr(model.bn, "site")


class TestBatchRenorm:
    def test_closed_limits_are_batch_norm(self):
        """r_max=1, d_max=0 is BatchNorm, output and input gradient."""
        layer, native = filled(layers.BatchRenorm2d, 5, r_max=1, d_max=0), nn.BatchNorm2d(5)
        native.load_state_dict({k: v for k, v in layer.state_dict().items() if k not in ("r_max", "d_max")})
        x, y = (torch.linspace(-1, 2, 180).view(4, 5, 3, 3).sin().requires_grad_() for _ in range(2))
        weights = torch.randn(4, 5, 3, 3)
        (layer(x) * weights).sum().backward()
        (native(y) * weights).sum().backward()

        torch.testing.assert_close(x.grad, y.grad)

    def test_limits_are_saved(self):
        """Limits come back with the weights."""
        layer = layers.BatchRenorm2d(3)
        layer.set_limits(1.5, 0.25)
        other = layers.BatchRenorm2d(3)
        other.load_state_dict(layer.state_dict())

        assert (float(other.r_max), float(other.d_max)) == (1.5, 0.25)

    def test_a_single_value_has_no_variance(self):
        """Training on one value per channel, batch 1 on a 1x1 map, is refused with the way out."""
        message = (
            "BatchRenorm2d: expected more than one value per channel in training, received shape=(1, 3, 1, 1); "
            "use a larger batch, or eval()"
        )
        with pytest.raises(ValueError, match=exactly(message)):
            layers.BatchRenorm2d(3)(torch.zeros(1, 3, 1, 1))

    @pytest.mark.parametrize(
        ("limits", "message"),
        [
            ((0.5, 0), "expected `r_max` of at least 1, received r_max=0.5"),
            ((1, -1), "expected `d_max` of at least 0, received d_max=-1"),
        ],
    )
    def test_wrong_limits(self, limits, message):
        """Limits that would turn the correction round are refused."""
        with pytest.raises(ValueError, match=f"^{message}$"):
            layers.BatchRenorm2d(3).set_limits(*limits)


@pytest.mark.parametrize("include", [5, True])
def test_patterns_are_texts(model, include):
    """What is no pattern and no list of them is refused as such."""
    message = f"expected a pattern or several, each a text, received {include}"
    with pytest.raises(normswap.errors.InputError, match=exactly(message)):
        normswap.plan(model, "gn", include=include)
