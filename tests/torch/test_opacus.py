"""The layers in Opacus: what its validator takes, per-sample gradients, and a private training step."""

import copy
import re

import pytest
import torch
from opacus import GradSampleModule, PrivacyEngine
from opacus.validators import ModuleValidator
from opacus.validators.errors import ShouldReplaceModuleError
from torch import nn

import normswap
from normswap import BatchRenorm, GroupNorm, SwitchNorm
from normswap.interop.opacus import register_opacus
from normswap.layers import torch as layers

from .models import filled

ANCHORED = SwitchNorm(batch_statistics="frozen")
PRIVATE = [GroupNorm(1), GroupNorm(4), ANCHORED, SwitchNorm(batch_statistics="none")]


@pytest.fixture(autouse=True)
def _registered():
    register_opacus()


def losses(model, images):
    """One loss per sample."""
    return model(images).square().sum(1)


@pytest.mark.parametrize("target", PRIVATE, ids=str)
class TestPrivate:
    def test_the_validator_takes_it(self, model, target):
        """What patches to layers that keep samples apart needs no fix, and the fix leaves it alone."""
        normswap.patch(model, target).model.train()

        assert ModuleValidator.validate(model, strict=True) == []
        fixed = ModuleValidator.fix(model)
        assert {k: v.tolist() for k, v in fixed.state_dict().items()} == {
            k: v.tolist() for k, v in model.state_dict().items()
        }

    @pytest.mark.parametrize("functorch", [False, True])
    def test_gradients_are_those_of_each_sample_alone(self, model, images, target, functorch):
        """Every parameter's gradient per sample is, to 1e-6 of its largest, what that sample gives by itself."""
        functorch &= isinstance(target, GroupNorm)  # that mode of Opacus takes no layer with buffers
        normswap.patch(model, target)
        model, images = model.double().train(), images.double()
        alone = [torch.autograd.grad(losses(model, image[None]).sum(), list(model.parameters())) for image in images]
        wrapped = GradSampleModule(copy.deepcopy(model), loss_reduction="sum", force_functorch=functorch)
        losses(wrapped, images).sum().backward()

        for index, (name, parameter) in enumerate(wrapped._module.named_parameters()):
            expected = torch.stack([gradients[index] for gradients in alone])
            torch.testing.assert_close(
                parameter.grad_sample, expected, atol=1e-6 * float(expected.abs().max()), rtol=0, msg=name
            )

    @pytest.mark.parametrize("mode", ["hooks", "ghost"])
    def test_a_private_step(self, model, images, target, mode):
        """PrivacyEngine takes the model as it is; a step moves every parameter and no running statistic."""
        normswap.patch(model, target).model.train()
        before = copy.deepcopy(model.state_dict())
        data = torch.utils.data.TensorDataset(images, torch.tensor([0, 1, 2, 3]))
        model, optimizer, *criterion, loader = PrivacyEngine().make_private(
            module=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            criterion=nn.CrossEntropyLoss(),
            data_loader=torch.utils.data.DataLoader(data, batch_size=4),
            noise_multiplier=1.0,
            max_grad_norm=1.0,
            poisson_sampling=False,
            grad_sample_mode=mode,
        )
        ((x, labels),) = loader
        optimizer.zero_grad()
        (criterion[0] if criterion else nn.CrossEntropyLoss())(model(x), labels).backward()
        optimizer.step()

        trained = {name for name, _ in model._module.named_parameters()}
        for name, value in model._module.state_dict().items():
            assert torch.equal(value, before[name]) == (name not in trained), name


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 7), (4, 5, 3, 4), (4, 5, 2, 3, 4), (4, 5, 1, 1)])
@pytest.mark.parametrize("options", [{}, {"affine": False}], ids=["affine", "gates alone"])
@pytest.mark.parametrize("batch_statistics", ["frozen", "none"])
def test_per_sample_gradients_of_every_shape(shape, options, batch_statistics):
    """Weight, bias and both gates, in every rank: the gradients of each sample alone to 1e-6."""
    cls = {2: layers.SwitchNorm1d, 3: layers.SwitchNorm1d, 4: layers.SwitchNorm2d, 5: layers.SwitchNorm3d}[len(shape)]
    norm = filled(cls, 5, batch_statistics=batch_statistics, **options).double().train()
    x, weights = torch.randn(shape).double() * 2 + 1, torch.randn(shape).double()
    wrapped = GradSampleModule(copy.deepcopy(norm), loss_reduction="sum")
    (wrapped(x) * weights).sum().backward()

    for sample in range(len(x)):
        part = slice(sample, sample + 1)
        alone = torch.autograd.grad((norm(x[part]) * weights[part]).sum(), list(norm.parameters()))
        for parameter, expected in zip(wrapped._module.parameters(), alone, strict=True):
            torch.testing.assert_close(parameter.grad_sample[sample], expected, atol=1e-6, rtol=1e-6)


class TestRefused:
    def test_moving_batch_statistics(self, model):
        """SN that mixes samples is refused with the reason and the way out."""
        normswap.patch(model, SwitchNorm()).model.train()
        errors = ModuleValidator.validate(model)

        assert {type(error) for error in errors} == {ShouldReplaceModuleError}
        assert [str(error) for error in errors] == [
            "expected layers in which no sample sees another, received SwitchNorm2d(batch_statistics='moving'), which "
            "in training normalizes each sample by its whole batch; set batch_statistics='frozen', which "
            "ModuleValidator.fix does and which is the same at inference, or patch to batch_statistics='none' or "
            "GroupNorm"
        ] * 2

    def test_batch_renormalization(self, model):
        """BRN is refused likewise, by PrivacyEngine's own check too, and nothing pretends to fix it."""
        normswap.patch(model, BatchRenorm()).model.train()
        message = (
            "expected layers in which no sample sees another, received BatchRenorm2d, which in training normalizes "
            "each sample by its whole batch; patch to SwitchNorm with batch_statistics='frozen' or 'none', or to "
            "GroupNorm"
        )

        assert [str(error) for error in ModuleValidator.validate(ModuleValidator.fix(model))] == [message] * 2
        with pytest.raises(ValueError, match=re.escape(message)):
            PrivacyEngine().validate(module=model, optimizer=None, data_loader=None)

    def test_other_layers_with_buffers(self, model):
        """Where anchored statistics pass, those of a BatchNorm still do not."""
        model = nn.Sequential(filled(layers.SwitchNorm2d, 3, batch_statistics="frozen"), nn.BatchNorm2d(3))
        message = r"Model contains a trainable layer with buffers.*\(1:BatchNorm2d"
        with pytest.raises(NotImplementedError, match=message) as raised:
            GradSampleModule(model)
        assert "SwitchNorm" not in str(raised.value)


def test_the_fix_is_the_same_function(model, images):
    """ModuleValidator.fix anchors the statistics of a copy: private, and bit for bit the same at inference."""
    normswap.patch(model, SwitchNorm())
    model.train()
    fixed = PrivacyEngine.get_compatible_module(model)

    assert ModuleValidator.validate(fixed, strict=True) == []
    assert model.bn.batch_statistics == "moving"
    assert torch.equal(fixed.eval()(images), model.eval()(images))
