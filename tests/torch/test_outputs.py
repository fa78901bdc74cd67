"""Networks whose output, type or device is not the usual one, in training and evaluation."""

import copy
import weakref

import numpy as np
import pytest
import torch
from torch import nn

import normswap
from normswap.errors import UnsupportedError
from normswap.finetune import Distillation, update_statistics
from normswap.finetune.run.torch import processes
from normswap.finetune.run.torch.train import predict, train
from normswap.finetune.run.training import Training
from normswap.frameworks.torch import call
from normswap.layers.torch import SwitchNorm2d

from ..helpers import exactly
from .runs import coloured


def losses(model, **settings):
    """Train and return what is told of each step's loss and accuracy."""
    found, teacher = [], settings.pop("teacher", None)
    training = Training(**{"steps": 4, "batch_size": 16, **settings})
    train(
        model, coloured(), training, teacher=teacher, on_step=lambda taken: found.append((taken.loss, taken.accuracy))
    )
    return found


class Named(nn.Module):
    """Returns its scores as Hugging Face models do."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return {"hidden": x, "logits": self.inner(x)}


class Auxiliary(Named):
    """Returns scores of a second head as well, in training alone, as torchvision's Inception and GoogLeNet do."""

    def forward(self, x):
        y = self.inner(x)
        return (y, y + 1) if self.training else y


class TestScores:
    @pytest.mark.parametrize("kind", [Named, Auxiliary])
    def test_are_found_in_the_output(self, model, kind):
        """Wherever they are, training, by labels and by a teacher, and evaluation are those of the scores alone."""
        normswap.patch(model, "gn")
        other, original = kind(copy.deepcopy(model)), copy.deepcopy(model)
        x = coloured().batch(range(8))[0]

        assert np.array_equal(predict(other, x), predict(model, x))
        assert losses(other) == losses(model)
        assert losses(other, teacher=kind(original)) == losses(model, teacher=original)

    def test_of_each_place_have_no_labels(self):
        """They are refused for labels of images before the first step, and learn from a teacher as others do."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1)).eval()
        teacher = copy.deepcopy(model)
        normswap.patch(model, "gn")
        message = (
            "expected a model with scores of shape (N, classes) for labels of images, received one with scores of "
            "shape (8, 3, 10, 10); teacher='original' needs no labels"
        )
        with pytest.raises(UnsupportedError, match=exactly(message)):
            losses(model)
        found = losses(model, teacher=teacher, steps=12)

        assert found[-1][0] < found[0][0]
        assert found[0][1] is None

    def test_may_be_probabilities(self, model):
        """A model that ends in a softmax is trained as one that ends in its logits, by labels and by a teacher."""
        normswap.patch(model, "gn")
        teacher = copy.deepcopy(model)
        teacher.head.weight.data.neg_()
        for by, by_other in ((None, None), (teacher, nn.Sequential(teacher, nn.Softmax(1)))):
            one, other = copy.deepcopy(model), nn.Sequential(copy.deepcopy(model), nn.Softmax(1))
            plain, found = losses(one, teacher=by), losses(other, teacher=by_other)
            np.testing.assert_allclose([loss for loss, _ in found], [loss for loss, _ in plain], rtol=1e-4)
            assert [right for _, right in found] == [right for _, right in plain]
            torch.testing.assert_close(other[0].head.weight, one.head.weight, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("teaches", [False, True])
    def test_of_coarse_probabilities(self, model, teaches):
        """Those in bfloat16, whose sums are off, count as probabilities in every batch."""

        class Coarse(nn.Module):
            def __init__(self, inner):
                super().__init__()
                self.inner = inner

            def forward(self, x):
                shares = self.inner(x).softmax(1)
                return shares + (shares.to(torch.bfloat16).to(shares.dtype) - shares).detach()

        teacher = copy.deepcopy(model) if teaches else None
        normswap.patch(model, "gn")
        model.head.weight.data.mul_(4)
        plain = losses(copy.deepcopy(model), teacher=teacher)
        found = losses(Coarse(copy.deepcopy(model)), teacher=None if teacher is None else Coarse(teacher))

        np.testing.assert_allclose([loss for loss, _ in found], [loss for loss, _ in plain], rtol=0.05, atol=0.01)


class TestPredict:
    def test_in_batches(self, model):
        """No more images than asked for are computed at once, and the scores are those of all of them."""
        seen = []
        model.register_forward_pre_hook(lambda m, inputs: seen.append(len(inputs[0])))
        x = coloured().batch(range(10))[0]
        whole = predict(model, x)

        np.testing.assert_allclose(predict(model, x, batch_size=4), whole, rtol=1e-5, atol=1e-6)
        assert seen == [10, 4, 4, 2]

    def test_holds_no_features(self, model, images):
        """A distillation of features keeps nothing of an evaluation of either model, and loses nothing by it."""
        original = copy.deepcopy(model)
        normswap.patch(model, "gn")
        outputs = []
        for network in (model, original):
            network.bn.register_forward_hook(lambda m, inputs, y: outputs.append(weakref.ref(y)))
        with Distillation(model, original, features=1.0) as distillation:
            expected = distillation(images, model(images)).item()
            outputs.clear()
            for network in (model, original):
                predict(network, images.numpy())
            assert [output() for output in outputs] == [None, None]
            assert distillation(images, model(images)).item() == expected


class TestTypes:
    def test_double(self, model):
        """A model in float64 is trained and evaluated in it, and learns what one in float32 does."""
        normswap.patch(model, "sn")
        wide = copy.deepcopy(model).double()
        narrow, found = losses(model, ema=0.5), losses(wide, ema=0.5)

        np.testing.assert_allclose([loss for loss, _ in found], [loss for loss, _ in narrow], rtol=1e-4)
        assert {p.dtype for p in wide.parameters()} == {torch.float64}
        update_statistics(wide, coloured().batches(64, range(64)))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_evaluated_and_not_trained(self, model, dtype):
        """It is refused before the first step."""
        normswap.patch(model.to(dtype), "gn")
        message = (
            f"expected parameters to train in torch.float32 or torch.float64, received some in {dtype}, in which most "
            "steps change nothing; load the model in float32, and let precision='bf16' compute in less"
        )
        assert predict(model, coloured().batch(range(4))[0]).shape == (4, 5)
        with pytest.raises(UnsupportedError, match=exactly(message)):
            losses(model)


class Placed(nn.Module):
    """A network with a layer on another device, which notes where its input comes from."""

    def __init__(self):
        super().__init__()
        self.elsewhere = nn.Parameter(torch.empty(1, device="meta"))
        self.norm = SwitchNorm2d(3)
        self.seen = []

    def forward(self, x):
        self.seen.append(x.device.type)
        return self.norm(torch.ones(2, 3, 4, 4))


class TestDevices:
    @pytest.mark.parametrize("kind", [torch.Tensor, np.asarray])
    def test_inputs_go_to_the_model(self, kind):
        """Tensors and arrays, in a tuple and a mapping, are moved to the device of the model."""
        x, layer = kind(torch.zeros(2, 3)), nn.Linear(3, 4, device="meta")

        assert {call(layer, each).device.type for each in (x, (x,), {"input": x})} == {"meta"}

    def test_statistics(self):
        """Their batches are as well, whatever loader they come from."""
        model = Placed()
        update_statistics(model, [torch.zeros(2, 3, 4, 4), (np.zeros((2, 3, 4, 4), np.float32), 0)])

        assert model.seen == ["meta", "meta"]
        assert torch.equal(model.norm.running_mean, torch.ones(3))

    def test_place(self, model, monkeypatch):
        """A model is put where its training will be."""
        assert processes._state().device.type == "cpu"
        monkeypatch.setattr(processes, "_state", lambda: type("State", (), {"device": torch.device("meta")}))
        processes.place(model)

        assert {state.device.type for state in model.state_dict().values()} == {"meta"}
