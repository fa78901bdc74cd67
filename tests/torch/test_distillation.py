"""Distillation from the original: the loss, what it leaves alone, and the loops it is used in."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from normswap.errors import InputError, UnsupportedError
from normswap.finetune import Distillation

from ..helpers import exactly
from .loops import batches, by_hand, network


def softmax(x):
    """Probabilities (N, C, ...) in float64."""
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


class Fixed(nn.Module):
    """A network that returns given scores."""

    def __init__(self, scores):
        super().__init__()
        self.scores = nn.Parameter(scores)

    def forward(self, x):
        return self.scores


class TestScores:
    @pytest.mark.parametrize("shape", [(4, 5), (2, 5, 3, 3)])
    @pytest.mark.parametrize("temperature", [1.0, 2.0])
    def test_divergence(self, shape, temperature):
        """T²·KL(teacher || model) of softened scores, averaged over all but the classes; 0 for equal scores."""
        student, teacher = Fixed(torch.randn(shape)), Fixed(torch.randn(shape))
        loss = Distillation(student, teacher, temperature)(None, student.scores)
        p, q = (softmax(m.scores.detach().double().numpy() / temperature) for m in (teacher, student))

        np.testing.assert_allclose(loss.item(), (p * np.log(p / q)).sum(1).mean() * temperature**2, rtol=1e-5)
        assert Distillation(student, student)(None, student.scores).item() == pytest.approx(0, abs=1e-7)

    def test_named_outputs(self):
        """Scores may be the "logits" of a mapping, as in Hugging Face models."""

        class Named(Fixed):
            def forward(self, x):
                return {"logits": self.scores}

        student, teacher = Named(torch.randn(3, 4)), Named(torch.randn(3, 4))
        plain = Distillation(student, Fixed(teacher.scores.detach()))(None, student.scores)

        assert torch.equal(Distillation(student, teacher)(None, student(None)), plain)


class TestFeatures:
    def test_distance_of_the_replaced_layers(self, images):
        """The mean squared distance over the teacher's variance, averaged over the layers, is added with its weight."""
        model, original = network("gn")
        seen = {}
        for network_, kind in ((model, "own"), (original, "wanted")):
            for name in ("stem.1", "bn"):
                network_.get_submodule(name).register_forward_hook(
                    lambda m, i, y, key=(kind, name): seen.update({key: y.detach().double()})
                )
        with Distillation(model, original, features=0.7) as distillation:
            output = model(images)
            loss = distillation(images, output)
        plain = Distillation(model, original)(images, output)
        shares = [
            (seen["own", name] - seen["wanted", name]).square().mean() / seen["wanted", name].var(unbiased=False)
            for name in ("stem.1", "bn")
        ]

        assert loss.item() == pytest.approx(plain.item() + 0.7 * sum(shares).item() / 2, rel=1e-4)
        loss.backward()
        assert model.stem[1].weight.grad.abs().max() > 0

    def test_a_layer_that_is_constant(self, images):
        """Where the teacher's output does not vary the distance counts as it is."""
        model, original = network("gn")
        for network_ in (model, original):
            network_.bn.weight.data.zero_()
            network_.bn.bias.data.zero_()
        with Distillation(model, original, features=1.0) as distillation:
            assert torch.isfinite(distillation(images, model(images)))

    def test_close_takes_the_hooks_away(self):
        """Afterwards neither network has a hook more than before."""
        model, original = network("gn")
        count = [len(m._forward_hooks) for network_ in (model, original) for m in network_.modules()]
        with Distillation(model, original, features=1.0):
            pass

        assert [len(m._forward_hooks) for network_ in (model, original) for m in network_.modules()] == count

    def test_compiled(self, images):
        """In a compiled model the features are seen as well, where the loss was made before the first call."""
        torch.compiler.reset()
        model, original = network("gn")
        with Distillation(model, original, features=1.0) as distillation:
            expected = distillation(images, model(images))
            compiled = torch.compile(model, backend="eager")
            found = distillation(images, compiled(images))

        torch.testing.assert_close(found, expected)


def test_the_teacher_is_left_alone():
    """It runs at inference without gradients, and neither its weights, statistics nor modes change."""
    model, original = network("gn")
    original.train()
    before = copy.deepcopy(original.state_dict())
    with Distillation(model, original, features=0.1) as distillation:
        by_hand(model, [], loss_of=lambda x, y: distillation(x, model(x)))

    assert all(torch.equal(value, before[key]) for key, value in original.state_dict().items())
    assert all(p.grad is None for p in original.parameters())
    assert original.training
    assert original.bn.training


def test_learns_without_labels():
    """Steps bring the model nearer to the teacher; labels play no part."""
    model, original = network("gn")
    x = batches(1, 32)[0][0]
    distillation = Distillation(model, original)
    before = distillation(x, model(x)).item()
    by_hand(model, [], data=[(x, None)] * 10, loss_of=lambda x, y: distillation(x, model(x)))

    assert distillation(x, model(x)).item() < 0.5 * before


def test_the_teacher_runs_under_the_callers_autocast(images):
    """In bfloat16 where the model does, with a loss in float32."""
    model, original = network("gn")
    seen = []
    original.head.register_forward_hook(lambda m, i, y: seen.append(y.dtype))
    with Distillation(model, original, features=1.0) as distillation, torch.autocast("cpu", torch.bfloat16):
        loss = distillation(images, model(images))

    assert seen == [torch.bfloat16]
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"temperature": 0}, "expected `temperature` above 0, received temperature=0"),
            ({"features": -1.0}, "expected `features` of at least 0, received features=-1.0"),
        ],
    )
    def test_values(self, options, message):
        """Values out of range are refused."""
        with pytest.raises(InputError, match=exactly(message)):
            Distillation(*network("gn"), **options)

    def test_models(self):
        """Features need replaced layers, which the teacher has too."""
        model, original = network("gn")
        message = "expected a patched model for features=, received one without replaced layers"
        with pytest.raises(UnsupportedError, match=exactly(message)):
            Distillation(original, original, features=1.0)
        message = (
            "expected a teacher with the layers of the model, which it is before the patch, received one without "
            "stem.1, bn"
        )
        with pytest.raises(InputError, match=exactly(message)):
            Distillation(model, nn.Linear(2, 2), features=1.0)

    def test_a_loss_without_a_forward_pass(self, images):
        """The features of a forward pass serve one loss."""
        model, original = network("gn")
        with Distillation(model, original, features=1.0) as distillation:
            output = model(images)
            distillation(images, output)
            message = (
                "expected a forward pass of the model before its loss, received none that reached bn, stem.1; open the "
                "distillation before compiling the model"
            )
            with pytest.raises(InputError, match=exactly(message)):
                distillation(images, output)
