"""Runs on Keras bundles: what a run leaves behind, and that stopping and going on changes no bit of it."""

import os
import signal

import numpy as np
import pytest

import normswap
from normswap.bundles import bundle
from normswap.bundles.bundle import unpatched
from normswap.errors import VerificationError
from normswap.finetune import History, update_statistics
from normswap.finetune.run import figures
from normswap.finetune.run.interruption import StoppedError
from normswap.finetune.run.run import finetune
from normswap.finetune.run.settings import Settings

from .fitting import BATCH_SIZE, PREPROCESSING, Spoiled, fitted, small_net, stripes

pytestmark = [
    pytest.mark.keras,
    # Keras's own saving converts variables this way.
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
]


class HaltError(Exception):
    """Ends a run wherever it is, as a kill does."""


def halting(at):
    """What stops a run after a step."""

    def on_step(step, figures):
        if step == at:
            raise HaltError(step)

    return on_step


@pytest.fixture
def make(tmp_path):
    """The function that makes a bundle of a trained network and returns its folder."""

    def make(target, dropout=0.0):
        original = small_net(dropout=dropout)
        fitted(original, steps=4)
        report = normswap.patch(original, target, inplace=False, example=np.zeros((1, 6, 6, 1), np.float32))
        bundle.save(report, tmp_path / "in", original=original, preprocessing=PREPROCESSING)
        return tmp_path / "in"

    return make


def weights(folder):
    return normswap.load(folder).get_weights()


def settings(**options):
    return Settings(**{"batch_size": BATCH_SIZE, "lr": 0.1, "early_stop": False, "checkpoint_every": 2, **options})


@pytest.mark.parametrize(
    ("target", "stops", "options"),
    [
        (
            "sn",
            (3, 5),
            {"stages": "calibrate,norm=4,all=2", "teacher": "original", "ema": 0.9, "harden": True},
        ),
        (
            "sn",
            (3, 5),
            {"optimizer": "amsgrad", "lr": 1.0, "schedule": "plateau", "patience": 1, "stages": "norm=2,all=4"},
        ),
        ("gn", (5,), {"optimizer": "adam", "schedule": "step", "milestones": (0.5,), "accumulate": 2, "batch_size": 8}),
        ("gn", (3,), {"optimizer": "adamw", "schedule": "poly", "power": 0.9, "weight_decay": 0.1}),
        ("brn", (5,), {"stages": "norm=2,all=4", "accumulate": 2, "batch_size": 8, "reestimate": 16}),
    ],
)
def test_going_on_gives_the_uninterrupted_run(make, tmp_path, target, stops, options):
    """Killed in any stage, between checkpoints or after one, and resumed, a run ends in the same bits."""
    chosen = settings(steps=6, **options)
    source, images = make(target, dropout=0.3), stripes()
    whole = finetune(source, tmp_path / "whole", images, chosen, eval_data=images)
    for stop in stops:
        with pytest.raises(HaltError):
            finetune(source, tmp_path / "parts", images, chosen, eval_data=images, resume=True, on_step=halting(stop))
    parts = finetune(source, tmp_path / "parts", images, chosen, eval_data=images, resume=True)

    assert all(map(np.array_equal, weights(tmp_path / "whole"), weights(tmp_path / "parts")))
    assert {**parts.to_dict(), "output": None} == {**whole.to_dict(), "output": None}


@pytest.mark.parametrize("norm", ["bn", "sn"])
def test_a_model_that_no_patch_made(tmp_path, norm):
    """It is trained from its first weights on, goes on bit for bit, and comes out as a bundle like any other."""
    chosen = settings(steps=6, optimizer="adam", lr=0.03)

    def run(name, **options):
        return finetune(unpatched(small_net(norm), None, PREPROCESSING), tmp_path / name, stripes(), chosen, **options)

    run("whole", eval_data=stripes())
    with pytest.raises(HaltError):
        run("parts", eval_data=stripes(), on_step=halting(3))
    run("parts", eval_data=stripes(), resume=True)

    assert all(map(np.array_equal, weights(tmp_path / "whole"), weights(tmp_path / "parts")))
    assert [row["epoch"] for row in History.of(tmp_path / "whole").epochs()] == [1.0, 1.5]
    assert normswap.load(tmp_path / "whole").get_layer("norm").count_params() > 0


def test_a_signal(make, tmp_path):
    """SIGTERM lets the step end and saves it, even between checkpoints; going on gives the uninterrupted run."""
    chosen = settings(steps=6, blend=0.8, weight_decay=0.01, augment="flip", workers=2, checkpoint_every=6)
    source, images = make("gn", dropout=0.3), stripes()
    finetune(source, tmp_path / "whole", images, chosen)
    steps = []

    def terminate(step, figures):
        steps.append(step)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(StoppedError) as raised:
        finetune(source, tmp_path / "parts", images, chosen, on_step=terminate)
    finetune(source, tmp_path / "parts", images, chosen, resume=True, on_step=terminate)

    assert str(raised.value) == "stopped by SIGTERM after step 3, which is saved; go on with resume=True"
    assert raised.value.exit_code == 143
    assert steps == [1, 2, 3, 4, 5, 6]
    assert all(map(np.array_equal, weights(tmp_path / "whole"), weights(tmp_path / "parts")))


def test_a_loss_that_is_not_finite(make, tmp_path):
    """The output is the last checkpoint's model: that of a run which ended there."""
    source, constant = make("gn"), {"schedule": "constant", "warmup": 0.0}
    finetune(source, tmp_path / "short", stripes(), settings(steps=4, **constant))
    with pytest.raises(VerificationError) as raised:
        finetune(source, tmp_path / "out", Spoiled(5), settings(steps=8, **constant))

    assert str(raised.value) == (
        f"expected a finite loss, received loss=nan at step=5; lower lr; the model of step 4 is in {tmp_path / 'out'}"
    )
    assert all(map(np.array_equal, weights(tmp_path / "short"), weights(tmp_path / "out")))


def test_hardened_gates_and_estimated_statistics(make, tmp_path):
    """Gates end one-hot, statistics as those of the images asked for, and the bundle exports."""
    finetune(make("sn"), tmp_path / "out", stripes(), settings(steps=4, harden=True, reestimate=32))
    model, images = normswap.load(tmp_path / "out"), stripes()

    assert [sorted(gates.tolist()) for pair in figures.gates(model).values() for gates in pair] == [[0, 0, 1]] * 2
    before = model.get_weights()
    update_statistics(model, [images.batch(images.sample(32))[0]])
    for one, other in zip(before, model.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    assert normswap.to_onnx(model, tmp_path / "m.onnx", example=images.batch([0])[0]).verdict.passed
