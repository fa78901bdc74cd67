"""Training a PyTorch model: losses, what learns, hooks, precision, and what a step tells."""

import copy
import re

import numpy as np
import pytest
import torch
from torch import nn

import normswap
from normswap import GroupNorm
from normswap.data.dataset import from_arrays
from normswap.data.preprocessing import Preprocessing
from normswap.errors import InputError, UnsupportedError, VerificationError
from normswap.finetune import Distillation, Hook, RenormLimits
from normswap.finetune.hooks.torch.learning import blocks
from normswap.finetune.run.accuracy import Accuracy, accuracy
from normswap.finetune.run.torch import train as engine
from normswap.finetune.run.torch.train import predict, train
from normswap.finetune.run.training import Training, default_rate

PREPROCESSING = Preprocessing((3, 12, 12), "channels_first", mean=(0.5,), std=(0.3,))


@pytest.fixture
def data():
    """Images whose class is the colour that is brightest, which a few steps can learn."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 96)
    images = rng.uniform(0, 0.6, (96, 12, 12, 3)).astype(np.float32)
    images[np.arange(96), :, :, labels] += 0.4
    return from_arrays(images, labels, PREPROCESSING)


def steps_taken(model, data, *, teacher=None, hooks=(), **settings):
    """Train and return what is told of each step."""
    found = []
    training = Training(**{"steps": 12, "batch_size": 16, **settings})
    train(model, data, training, teacher=teacher, hooks=hooks, on_step=found.append)
    return found


def losses(model, data, **settings):
    """Train and return the loss of each step."""
    return [taken.loss for taken in steps_taken(model, data, **settings)]


def deep(x):
    """A network of six BatchNorms with the statistics of ``x``, and scores that tell its images apart."""
    torch.manual_seed(0)
    layers = []
    for inputs in (3, *[16] * 5):
        layers += [nn.Conv2d(inputs, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16, momentum=None), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)).train()
    with torch.no_grad():
        for norm in model[1::3][:6]:
            norm.weight.uniform_(0.5, 2)
        model(x)
        model[-1].weight.mul_(3 / model.eval()(x).std(0).mean())
    return model


class TestTrain:
    @pytest.mark.parametrize("target", ["sn", "brn", "gn"])
    def test_labels(self, model, data, target):
        """Cross-entropy with the labels goes down, and accuracy up."""
        normswap.patch(model, target)
        before = accuracy(lambda x: predict(model, x), data).top1
        found = losses(model, data, steps=40)

        assert np.mean(found[-5:]) < 0.5 * np.mean(found[:5])
        assert accuracy(lambda x: predict(model, x), data).top1 > before
        assert not model.training

    def test_distillation(self, model, data):
        """The model comes closer to its teacher, which does not change; labels play no part."""
        teacher = copy.deepcopy(model)
        normswap.patch(model, GroupNorm(groups=4))
        state = copy.deepcopy(teacher.state_dict())
        other = from_arrays(data._images.images, np.zeros(96, np.int64), PREPROCESSING)
        twin = copy.deepcopy(model)
        found = losses(model, data, teacher=teacher, steps=30)

        assert np.mean(found[-5:]) < 0.5 * np.mean(found[:5])
        assert all(torch.equal(state[k], v) for k, v in teacher.state_dict().items())
        assert losses(twin, other, teacher=teacher, steps=30) == found

    @pytest.mark.parametrize("target", [None, "sn", "brn"])
    def test_a_model_that_is_taught_computes_as_its_teacher(self, data, target):
        """Its own copy has nothing to teach it: neither what it would drop nor batch statistics make a difference."""
        layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.9), nn.Flatten(), nn.Linear(800, 3)]
        model = nn.Sequential(*layers).eval()
        if target is not None:
            normswap.patch(model, target)
        twin = copy.deepcopy(model)

        assert max(losses(model, data, teacher=copy.deepcopy(model), steps=3)) < 1e-6
        torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=1e-5, atol=1e-6)
        assert not model[2].training

    @pytest.mark.parametrize("target", ["gn", GroupNorm(groups=4), "sn"])
    def test_a_calibrated_model_only_goes_down(self, target):
        """At the default rate every epoch's loss is below the one before, the first below what calibration left."""
        rng = np.random.default_rng(0)
        contrasts = rng.uniform(0.3, 1.6, (96, 1, 1, 3))
        images = (rng.uniform(0, 0.6, (96, 12, 12, 3)) * contrasts).astype(np.float32)
        data = from_arrays(images, np.zeros(96, np.int64), PREPROCESSING)
        x = torch.from_numpy(data.batch(range(96))[0])
        original = deep(x)
        model = copy.deepcopy(original)
        normswap.calibrate(normswap.patch(model, target, example=x[:2]), [x])
        with torch.no_grad():
            before = Distillation(model, original)(x, model(x)).item()
        found = losses(model, data, teacher=original, steps=24, lr=default_rate(16, before))
        epochs = [before, *np.mean(np.reshape(found, (4, 6)), axis=1)]

        assert epochs == sorted(epochs, reverse=True)
        assert epochs[-1] < 0.9 * before

    def test_norms_alone(self, model, data):
        """train="norm" moves the normalization layers' parameters and nothing else; flags are put back."""
        normswap.patch(model, "sn")
        before = copy.deepcopy(model.state_dict())
        losses(model, data, train="norm")
        moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}

        assert {k.rsplit(".", 1)[0] for k in moved} == {"stem.1", "bn"}
        assert {"bn.weight", "bn.bias", "bn.mean_weight", "bn.var_weight"} <= moved
        assert all(p.requires_grad for p in model.parameters())

    def test_frozen_parameters_stay(self, model, data):
        """A parameter the user froze does not learn."""
        model.stem.requires_grad_(False)
        normswap.patch(model, "gn")
        before = model.stem[1].weight.clone()
        losses(model, data)

        assert torch.equal(model.stem[1].weight, before)

    def test_a_frozen_stem_before_group_norm_does_not_crash(self, model, data):
        """A GroupNorm of the model's own is guarded too, for as long as it trains (see `guard`)."""
        model.stem[1] = nn.GroupNorm(2, 8)
        normswap.patch(model, "gn")
        model.to(memory_format=torch.channels_last)

        assert np.isfinite(losses(model, data, train="norm")).all()
        assert not model.stem[1]._forward_pre_hooks

    def test_the_same_seed_gives_the_same_run(self, model, data):
        """A run is a function of its seed; another seed sees the data in another order."""
        normswap.patch(model, "sn")
        twin, other = copy.deepcopy(model), copy.deepcopy(model)

        assert losses(model, data) == losses(twin, data)
        assert losses(other, data, seed=1) != losses(twin, data)

    def test_a_loss_that_is_not_finite(self, model, data):
        """NaN stops the run with the step, and the weights are those before it."""
        normswap.patch(model, "gn")
        with torch.no_grad():
            model.head.weight[0, 0] = torch.nan
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(VerificationError, match="^expected a finite loss, received loss=nan at step=0; lower lr$"):
            losses(model, data)

        assert all(
            torch.equal(
                before[k],
                v,
            )
            or before[k].isnan().any()
            for k, v in model.state_dict().items()
        )

    @pytest.mark.parametrize("train", ["all", "last:1"])
    def test_modes_are_as_before(self, model, data, train):
        """Each module is in the mode it was in, after a training and after one that was broken off."""
        model.train()
        model.bn.eval()
        modes = [module.training for module in model.modules()]
        losses(model, data, steps=1, train=train)
        assert [module.training for module in model.modules()] == modes

        with pytest.raises(ZeroDivisionError):
            train_ = Training(steps=1, batch_size=16, train=train)
            engine.train(model, data, train_, on_step=lambda taken: 1 / 0)
        assert [module.training for module in model.modules()] == modes

    def test_random_numbers_of_any_seed(self, model, data):
        """Seed and step choose them, for a time in nanoseconds as well as for a small number."""
        seeds = []
        for seed in (1, 1763726400123456789):
            training = Training(steps=2, batch_size=16, seed=seed)
            engine.train(model, data, training, first=5, on_step=lambda _: seeds.append(torch.initial_seed()))

        assert seeds[:2] == [(1_000_003 + 5) * 1_009, (1_000_003 + 6) * 1_009]
        assert 0 <= seeds[2] < 2**63
        assert seeds[3] == (seeds[2] + 1_009) % 2**63


class TestOptions:
    def test_accumulation_is_a_larger_batch(self, data):
        """Two batches of eight to a step are one of sixteen: gradients are those of all their images."""
        one = nn.Sequential(nn.Flatten(), nn.Linear(432, 3))
        other = copy.deepcopy(one)
        whole = steps_taken(one, data, steps=6, batch_size=16)
        parts = steps_taken(other, data, steps=6, batch_size=8, accumulate=2)

        np.testing.assert_allclose([t.loss for t in parts], [t.loss for t in whole], rtol=1e-5)
        assert [t.accuracy for t in parts] == [t.accuracy for t in whole]
        torch.testing.assert_close(one[1].weight, other[1].weight)

    def test_decay_and_gate_rate(self, model, data):
        """Weight decay pulls weights alone, and gates learn at their multiple of the rate, here not at all."""
        normswap.patch(model, "sn")
        twin = copy.deepcopy(model)
        gates = model.bn.mean_weight.detach().clone()
        steps_taken(model, data, steps=3, weight_decay=0.5, gate_lr=0.0)
        steps_taken(twin, data, steps=3)

        assert torch.equal(model.bn.mean_weight, gates)
        assert not torch.equal(twin.bn.mean_weight, gates)
        assert model.head.weight.norm() < twin.head.weight.norm()

    def test_the_length_of_gradients(self, data):
        """Longer ones are scaled down to it and shorter ones left; 0 leaves all."""
        start = nn.Sequential(nn.Flatten(), nn.Linear(432, 3))

        def step(norm):
            model = copy.deepcopy(start)
            steps_taken(model, data, steps=1, lr=1.0, warmup=0.0, momentum=0.0, max_grad_norm=norm)
            changes = [(new - old).flatten() for new, old in zip(model.parameters(), start.parameters(), strict=True)]
            return torch.cat(changes)

        whole = step(0)

        assert torch.equal(step(1e6), whole)
        torch.testing.assert_close(step(0.01), 0.01 * whole / whole.norm())

    @pytest.mark.parametrize("schedule", ["cosine", "constant"])
    def test_the_rate(self, model, data, schedule):
        """It is told with each step: up in the warm-up, then falling to nothing or staying."""
        normswap.patch(model, "gn")
        rates = [t.lr for t in steps_taken(model, data, steps=10, lr=0.1, warmup=0.2, schedule=schedule)]

        assert rates[:2] == pytest.approx([0.05, 0.1])
        assert rates[2:] == (sorted(rates[2:], reverse=True) if schedule == "cosine" else [0.1] * 8)
        assert rates[-1] < 0.01 or schedule == "constant"

    def test_the_last_blocks(self, model, data):
        """last:N trains the last blocks; those before stay as they are, running statistics and all."""
        normswap.patch(model, "sn")
        before = copy.deepcopy(model.state_dict())
        losses(model, data, train="last:1")
        moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}

        assert moved == {"head.weight", "head.bias"}
        assert blocks(model)[-1] is model.head
        with pytest.raises(
            InputError,
            match=f"^expected last:N with N up to the model's {len(blocks(model))} blocks, received train='last:99'$",
        ):
            losses(model, data, train="last:99")

    def test_nothing_to_train(self, model, data):
        """A model that is frozen altogether is refused."""
        model.requires_grad_(False)
        with pytest.raises(
            UnsupportedError, match="^expected a model with parameters to train, received none with train='all'$"
        ):
            losses(model, data)

    def test_the_moving_average(self, model, data):
        """Within averaged() the weights are w' = 0.5 w' + 0.5 w over the steps, and afterwards the trained ones."""
        normswap.patch(model, "gn")
        expected, found = model.head.weight.detach().clone(), []

        def look(taken):
            nonlocal expected
            weight = model.head.weight.detach().clone()
            expected = 0.5 * expected + 0.5 * weight
            with taken.averaged():
                found.append((model.head.weight.detach().clone(), expected))
            assert torch.equal(model.head.weight, weight)

        train(model, data, Training(steps=4, batch_size=16, ema=0.5), on_step=look)

        for average, wanted in found:
            torch.testing.assert_close(average, wanted)

    def test_bf16(self, model, data):
        """Mixed precision learns as float32 does, to its own digits, and leaves float32 weights and evaluations."""
        normswap.patch(model, "sn")
        twin = copy.deepcopy(model)
        narrow, wide = losses(model, data, precision="bf16"), losses(twin, data)

        assert narrow != wide
        np.testing.assert_allclose(narrow, wide, rtol=0.05)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        x = data.batch(range(4))[0]
        np.testing.assert_allclose(predict(model, x), model(torch.from_numpy(x)).detach(), rtol=1e-4, atol=1e-6)

    def test_features(self, model, data):
        """The distance of the replaced layers' outputs adds to the loss, and is learned down."""
        teacher = copy.deepcopy(model)
        normswap.patch(model, GroupNorm(groups=4))
        twin = copy.deepcopy(model)
        plain, both = losses(twin, data, teacher=teacher), losses(model, data, teacher=teacher, features=1.0, steps=30)

        assert both[0] > plain[0]
        assert np.mean(both[-5:]) < np.mean(both[:5])
        assert not teacher.bn._forward_hooks

    def test_workers_change_nothing(self, model, data):
        """A run whose images are read ahead, and changed at random, is the run that reads them in time."""
        normswap.patch(model, "gn")
        twin = copy.deepcopy(model)

        assert losses(model, data, augment="crop,flip", workers=2, steps=4) == losses(
            twin, data, augment="crop,flip", steps=4
        )

    def test_hooks_and_the_end(self, model, data):
        """Hooks are told every step of the longer run this is part of, and a true answer ends the training."""
        seen = []

        class Seen(Hook):
            def on_step(self, step):
                seen.append(step)

        training = Training(steps=12, batch_size=16)
        train(model, data, training, hooks=[Seen()], first=100, start=2, on_step=lambda taken: taken.step == 5)

        assert seen == [102, 103, 104]

    def test_limits(self, model, data):
        """BatchRenorm's limits follow the preset to its end."""
        normswap.patch(model, "brn")
        seen = []
        hook = RenormLimits(model, 10)
        train(
            model,
            data,
            Training(steps=10, batch_size=16),
            hooks=[hook],
            on_step=lambda _: seen.append(model.bn.r_max.item()),
        )

        assert seen[0] == 1
        assert seen[5] == pytest.approx(1.125)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"steps": 0}, "expected `steps` above 0, received steps=0"),
            ({"batch_size": 0}, "expected `batch_size` above 0, received batch_size=0"),
            ({"lr": 1e308}, "expected `lr` of up to 1e+30, received lr=1e+308"),
            ({"steps": 10**30}, f"expected `steps` of up to 2147483647, received steps={10**30}"),
            ({"lr": float("nan")}, "expected `lr` above 0, received lr=nan"),
            ({"ema": 1.0}, "expected `ema` from 0 to below 1, received ema=1.0"),
            ({"warmup": 2.0}, "expected `warmup` from 0 to 1, received warmup=2.0"),
            (
                {"max_grad_norm": float("nan")},
                "expected `max_grad_norm` of at least 0, received max_grad_norm=nan",
            ),
            ({"workers": -1}, "expected `workers` of at least 0, received workers=-1"),
            ({"precision": "int8"}, "expected `precision` out of no, fp16, bf16, received 'int8'"),
            ({"optimizer": "rmsprop"}, "expected `optimizer` out of sgd, adam, adamw, amsgrad, received 'rmsprop'"),
            (
                {"schedule": "linear"},
                "expected `schedule` out of cosine, constant, step, poly, plateau, received 'linear'",
            ),
            ({"train": "last:0"}, "expected `train` to be all, norm or last:N, received train='last:0'"),
        ],
    )
    def test_values_out_of_range(self, changes, message):
        """A setting that cannot be is refused by name."""
        with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
            Training(**changes)


def test_accuracy_counts_ties_as_wrong(data):
    """A constant output scores no better than a wrong one, and NaN is an error."""
    assert accuracy(lambda x: np.zeros((len(x), 10)), data).top1 == 0
    perfect = accuracy(lambda x: np.eye(10)[data.labels[: len(x)]], data)
    assert (perfect.top1, perfect.top5, perfect.n) == (100, 100, 96)
    with pytest.raises(VerificationError, match="^expected finite scores, received NaN or infinity$"):
        accuracy(lambda x: np.full((len(x), 10), np.nan), data)
    parts = [accuracy(lambda x: np.zeros((len(x), 10)), data, batch_size=10, share=(rank, 3)) for rank in range(3)]
    assert [part.n for part in parts] == [36, 30, 30]
    assert Accuracy.merged(parts).n == 96
    with pytest.raises(InputError, match=r"^expected scores of shape \(96, classes\) for labels up to 2, received"):
        accuracy(lambda x: np.zeros((len(x), 2)), data)
    with pytest.raises(InputError, match=r"^expected scores of shape \(96, .* received \(1, 10\)$"):
        accuracy(lambda x: np.zeros((1, 10)), data)
