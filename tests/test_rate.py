"""The learning rate of every schedule, by its formula, and what no optimizer or schedule reads."""

from math import cos, pi

import pytest

from normswap.errors import InputError, UsageError
from normswap.finetune.run.rate import Plateau, Rate
from normswap.finetune.run.training import Training, default_rate

from .helpers import exactly


def rates(images=64, reductions=0, **options):
    """Return the rate at each of ten steps, of which the first two are the warm-up."""
    training = Training(**{"steps": 10, "batch_size": 16, "lr": 0.8, "warmup": 0.2, **options})
    rate = Rate(training, images)
    return [rate.at(step, training.lr, reductions) for step in range(training.steps)]


@pytest.mark.parametrize(
    ("options", "shares"),
    [
        ({}, [(1 + cos(pi * done / 8)) / 2 for done in range(8)]),
        ({"schedule": "constant"}, 8 * [1]),
        ({"schedule": "poly"}, [1 - done / 8 for done in range(8)]),
        ({"schedule": "poly", "power": 2.0}, [(1 - done / 8) ** 2 for done in range(8)]),
        ({"schedule": "step"}, [1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01, 0.001]),
        ({"schedule": "step", "milestones": (0.5, 0.75), "factor": 0.5}, [1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25]),
        ({"schedule": "step", "milestones": (1, 2)}, [1, 1, 0.1, 0.1, 0.1, 0.1, 0.01, 0.01]),
        ({"schedule": "step", "milestones": (1,), "accumulate": 2}, 8 * [0.1]),
        ({"schedule": "plateau"}, 8 * [1]),
        ({"schedule": "plateau", "reductions": 2, "factor": 0.5}, 8 * [0.25]),
        ({"schedule": "plateau", "reductions": 2, "factor": 0.5, "min_lr": 0.3}, 8 * [0.375]),
        ({"schedule": "plateau", "reductions": 2, "min_lr": 5.0}, 8 * [1]),
    ],
)
def test_schedules(options, shares):
    """The rate rises to its peak in the warm-up, and then is the peak times what the schedule says."""
    expected = [0.8 * share for share in shares]
    warm = [expected[0] / 2, expected[0]] if options.get("schedule") == "plateau" else [0.4, 0.8]

    assert rates(**options) == pytest.approx([*warm, *expected])


def test_the_default_schedule_is_what_it_was():
    """The cosine is the same to the last bit as ever, so that a run begun before goes on as it began."""
    assert rates(lr=0.05) == [
        0.05 * (step + 1) / 2 if step < 2 else 0.05 * 0.5 * (1 + cos(pi * (step - 2) / 8)) for step in range(10)
    ]


def test_a_milestone_in_epochs_counts_batches_of_all_images():
    """100 images in batches of 16 are 6.25 steps an epoch; a batch is at most all images."""
    training = Training(steps=30, batch_size=16, lr=1.0, warmup=0.0, schedule="step", milestones=(2,))
    assert [Rate(training, 100).at(step, 1.0) for step in (11, 12)] == [1.0, 0.1]
    assert [Rate(training, 8).at(step, 1.0) for step in (1, 2)] == [1.0, 0.1]


class TestPlateau:
    def test_waits_for_a_better_loss(self):
        """The rate is lowered after so many evaluations in a row without one, and then waits as long again."""
        state, seen = Plateau(), []
        for loss in (1.0, 0.5, 0.6, 0.5, 0.4, 0.4, 0.39999, 0.7, 0.8, 0.3):
            state = state.after(loss, patience=2)
            seen.append(state.reductions)

        assert seen == [0, 0, 0, 1, 1, 1, 2, 2, 3, 3]
        assert state == Plateau(3, 0.3, 0)

    @pytest.mark.torch
    @pytest.mark.parametrize("patience", [1, 2, 5])
    def test_is_pytorchs(self, patience):
        """It lowers the rate where `ReduceLROnPlateau` does, which counts one evaluation more."""
        import torch

        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.8)
        peer = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=0.5, patience=patience - 1, threshold=1e-4, threshold_mode="abs", min_lr=0.03
        )
        training = Training(steps=60, lr=0.8, warmup=0.0, schedule="plateau", factor=0.5, min_lr=0.03)
        rate, state = Rate(training, 64), Plateau()
        generator = torch.Generator().manual_seed(0)
        for step, loss in enumerate(torch.rand(60, generator=generator).div(torch.arange(60).add(1).sqrt()).tolist()):
            peer.step(loss)
            state = state.after(loss, patience)
            assert rate.at(step, 0.8, state.reductions) == pytest.approx(optimizer.param_groups[0]["lr"])

    @pytest.mark.keras
    @pytest.mark.parametrize("patience", [1, 2, 5])
    def test_is_kerass(self, patience):
        """It lowers the rate where Keras's callback does."""
        import keras
        import numpy as np

        peer = keras.callbacks.ReduceLROnPlateau(factor=0.5, patience=patience, min_lr=0.03)
        peer.set_model(model := keras.Sequential([keras.layers.Dense(1)]))
        model.compile(keras.optimizers.SGD(0.8))
        peer.on_train_begin()
        training = Training(steps=60, lr=0.8, warmup=0.0, schedule="plateau", factor=0.5, min_lr=0.03)
        rate, state = Rate(training, 64), Plateau()
        for step, loss in enumerate(np.random.default_rng(0).uniform(size=60) / np.sqrt(np.arange(1, 61))):
            peer.on_epoch_end(step, {"val_loss": float(loss)})
            state = state.after(float(loss), patience)
            assert rate.at(step, 0.8, state.reductions) == pytest.approx(float(model.optimizer.learning_rate))


@pytest.mark.torch
@pytest.mark.parametrize(
    ("options", "peer"),
    [
        ({}, lambda lib, it: lib.CosineAnnealingLR(it, 20)),
        ({"schedule": "poly", "power": 0.9}, lambda lib, it: lib.PolynomialLR(it, 20, power=0.9)),
        ({"schedule": "step", "milestones": (0.25, 0.6)}, lambda lib, it: lib.MultiStepLR(it, [5, 12])),
    ],
)
def test_schedules_are_pytorchs(options, peer):
    """Without a warm-up longer than the first step, which has the peak, they are those of PyTorch."""
    import torch

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.8)
    scheduler = peer(torch.optim.lr_scheduler, optimizer)
    shift = 0 if options.get("schedule") == "step" else 1  # the others begin after the warm-up
    training = Training(steps=20 + shift, lr=0.8, warmup=0.0, **options)
    if not shift:
        training = Training(steps=20, lr=0.8, warmup=0.0, **options)
    rate = Rate(training, 64)
    for step in range(20):
        assert rate.at(step + shift, 0.8) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"optimizer": "adam", "momentum": 0.9},
            "expected optimizer='sgd' for momentum, received optimizer='adam'; leave it out",
        ),
        (
            {"milestones": (0.5,)},
            "expected schedule='step' for milestones, received schedule='cosine'; leave it out",
        ),
        (
            {"schedule": "poly", "factor": 0.5},
            "expected schedule='step' or schedule='plateau' for factor, received schedule='poly'; leave it out",
        ),
        ({"power": 2.0}, "expected schedule='poly' for power, received schedule='cosine'; leave it out"),
        (
            {"schedule": "step", "patience": 3},
            "expected schedule='plateau' for patience, received schedule='step'; leave it out",
        ),
        (
            {"schedule": "constant", "min_lr": 0.1},
            "expected schedule='plateau' for min_lr, received schedule='constant'; leave it out",
        ),
    ],
)
def test_what_nobody_reads(options, message):
    """A setting that the optimizer or the schedule does not read is an error, and not passed over."""
    with pytest.raises(UsageError, match=exactly(message)):
        Training(**options)


RISING = (
    "expected `milestones` that rise, all below 1, as shares of the steps, or all from 1 on, as epochs, "
    "received milestones={}"
)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 1.0}, "expected `momentum` from 0 to below 1, received momentum=1.0"),
        ({"schedule": "poly", "power": 0.0}, "expected `power` above 0, received power=0.0"),
        ({"schedule": "plateau", "patience": 0}, "expected `patience` above 0, received patience=0"),
        ({"schedule": "plateau", "min_lr": -1.0}, "expected `min_lr` of at least 0, received min_lr=-1.0"),
        ({"schedule": "step", "factor": 1.0}, "expected `factor` between 0 and 1, received factor=1.0"),
        ({"schedule": "step", "milestones": (0.6, 0.3)}, RISING.format("0.6,0.3")),
        ({"schedule": "step", "milestones": (0.3, 0.3)}, RISING.format("0.3,0.3")),
        ({"schedule": "step", "milestones": (0.5, 30)}, RISING.format("0.5,30")),
        ({"schedule": "step", "milestones": ()}, RISING.format("")),
        ({"schedule": "step", "milestones": (float("nan"),)}, RISING.format("nan")),
    ],
)
def test_values_out_of_range(options, message):
    """A value that cannot be is refused by name."""
    with pytest.raises(InputError, match=exactly(message)):
        Training(**options)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "amsgrad"])
def test_the_default_rate_of_adam_and_its_kin(optimizer):
    """It is 0.001 where that of SGD is 0.05, and the same share of it for few images and for a model that is taught."""
    assert default_rate(64, None, optimizer) == pytest.approx(0.001)
    assert default_rate(16, 0.5, optimizer) == pytest.approx(default_rate(16, 0.5) / 50)
