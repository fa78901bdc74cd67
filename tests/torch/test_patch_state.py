"""The patcher on PyTorch models: state, shapes, and what else belongs to a layer.

Test names end in the number of the hard case they settle.
"""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import normswap
from normswap import GroupNorm, SwitchNorm
from normswap.errors import UnsupportedError

from .conftest import TARGETS, trained_


class TestState:
    @pytest.mark.parametrize("target", TARGETS)
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_dtype_24(self, target, dtype):
        """Parameters and statistics keep their dtype."""
        model = nn.Sequential(nn.BatchNorm2d(4)).to(dtype)
        normswap.patch(model, target)
        floating = [t for t in model.state_dict().values() if t.is_floating_point() and t.dim()]

        assert {t.dtype for t in floating} == {dtype}
        assert model.eval()(torch.randn(2, 4, 5, 5, dtype=dtype)).dtype == dtype

    @pytest.mark.parametrize("target", TARGETS)
    def test_meta_device_24(self, target):
        """A model without values is patched to one without values."""
        model = nn.Sequential(nn.BatchNorm2d(4, device="meta"))
        normswap.patch(model, target)

        assert {t.device.type for t in model.state_dict().values()} == {"meta"}

    @pytest.mark.parametrize("target", TARGETS)
    def test_channels_last_24(self, model, images, target):
        """A channels_last input gives the same numbers."""
        normswap.patch(model, target)

        torch.testing.assert_close(
            model(images.to(memory_format=torch.channels_last)), model(images), atol=1e-5, rtol=1e-4
        )

    def test_training_flags_25(self, model):
        """Each layer stays in the mode it was in, also after a dry run."""
        model.train()
        model.bn.eval()
        normswap.patch(model, "sn", example=torch.randn(2, 3, 8, 8))

        assert [m.training for m in (model, model.stem[1], model.bn)] == [True, True, False]

    @pytest.mark.parametrize("target", TARGETS)
    def test_frozen_parameters_stay_frozen_26(self, model, target):
        """requires_grad is each parameter's own."""
        model.stem.requires_grad_(False)
        normswap.patch(model, target)

        assert not model.stem[1].weight.requires_grad
        assert not model.stem[1].bias.requires_grad
        assert model.bn.weight.requires_grad

    @pytest.mark.parametrize("target", TARGETS)
    def test_hooks_fire_once_27(self, model, images, target):
        """A hook on the BatchNorm is a hook on its replacement, and undo does not lose one added since."""
        calls = []
        model.bn.register_forward_hook(lambda *_: calls.append("forward"))
        report = normswap.patch(model, target)
        model.bn.register_forward_pre_hook(lambda *_: calls.append("pre"))
        model(images)
        report.undo()
        model(images)

        assert calls == ["pre", "forward"] * 2

    @pytest.mark.parametrize("target", TARGETS)
    def test_an_optimizer_made_before_still_trains_28(self, model, images, target):
        """The scale and shift are the same Parameter objects, so an optimizer's step moves them."""
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        normswap.patch(model, target)
        before = model.bn.weight.detach().clone()
        model.train()(images).square().sum().backward()
        optimizer.step()

        assert not torch.equal(model.bn.weight, before)

    def test_tied_parameters_29(self):
        """A weight shared by two BatchNorms cannot take two values, so each gets its own; BRN keeps the tie."""
        for target, tied in (("gn", False), ("brn", True)):
            first, second = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
            second.weight = first.weight
            model = trained_(nn.Sequential(first, second))
            original = copy.deepcopy(model)
            report = normswap.patch(model, target)
            assert (model[0].weight is model[1].weight) is tied
            alone = normswap.patch(nn.Sequential(original[1]), target).model
            torch.testing.assert_close(model[1].weight, alone[0].weight)
            report.undo()
            assert model[0].weight is model[1].weight

    @pytest.mark.parametrize("target", TARGETS)
    def test_eps_is_carried_32(self, target):
        """An eps far from the default is the replacement's too; BRN equals the BatchNorm at inference."""
        model = trained_(nn.Sequential(nn.BatchNorm2d(4, eps=0.1)))
        x = torch.randn(2, 4, 5, 5)
        expected = model(x)
        normswap.patch(model, target)

        assert model[0].eps == 0.1
        if target == "brn":
            torch.testing.assert_close(model(x), expected, atol=1e-6, rtol=0)

    @pytest.mark.parametrize("target", TARGETS)
    def test_copies_33(self, model, images, target):
        """deepcopy, pickle and torch.export of the patched model compute the same."""
        normswap.patch(model, target)
        expected = model(images)

        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(images), expected)
            assert len(normswap.plan(other, target).having("done")) == 2
        torch.testing.assert_close(torch.export.export(model, (images,)).module()(images), expected)

    def test_attributes_people_set_are_kept(self, model):
        """An attribute set on a BatchNorm is there after the patch and after undo."""
        model.bn.tag = "backbone"
        report = normswap.patch(model, "gn")
        assert model.bn.tag == "backbone"
        report.undo()

        assert model.bn.tag == "backbone"


class TestShapes:
    def test_vectors_and_1x1_maps_34(self):
        """An example shows single values: one channel per group is refused, few values are noted."""
        model = trained_(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)))
        example = torch.randn(3, 6)
        with pytest.raises(UnsupportedError, match="1 \\(BatchNorm1d\\): a group of one value per sample"):
            normswap.patch(model, "in", example=example)

        report = normswap.patch(model, "gn", example=example)

        assert report.replaced[0].site.spatial == ()
        assert report.replaced[0].note == "only 4 values per group: expect noisy statistics"
        assert model(example).std() > 0.1

    @pytest.mark.parametrize("start", ["warm", "even"])
    def test_switch_norm_on_1x1_maps_34(self, start):
        """On 1x1 maps the carry-over allows for the instance gate; the example says which they are."""
        model = trained_(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(64)))
        generator = torch.Generator().manual_seed(0)
        norm = model[1]
        x = torch.randn(256, 64, 1, 1, generator=generator) * norm.running_var.sqrt().view(-1, 1, 1)
        x = x + norm.running_mean.view(-1, 1, 1)
        expected = model(x)
        normswap.patch(model, SwitchNorm(start), example=x)

        assert (model(x) - expected).abs().mean() < 0.1 * expected.std()

    @pytest.mark.parametrize("channels", [16, 24, 40, 72, 112, 728, 17])
    def test_indivisible_channels_36(self, channels):
        """With indivisible="gcd" real widths are patched, a prime one with a single group."""
        model = trained_(nn.Sequential(nn.BatchNorm2d(channels)))
        normswap.patch(model, GroupNorm(groups=32, indivisible="gcd"))

        assert model[0].num_groups == np.gcd(32, channels)

    def test_zero_gammas_stay_39(self, model):
        """A zero-initialised last norm of a block still closes the branch."""
        nn.init.zeros_(model.bn.weight)
        normswap.patch(model, "gn")

        assert torch.count_nonzero(model.bn.weight) == 0
