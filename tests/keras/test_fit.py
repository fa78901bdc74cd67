"""Fine-tuning through ``fit``: what learns, what stays, and how a run stops and goes on."""

import os
import subprocess
import sys
from importlib.util import find_spec

import keras
import numpy as np
import pytest
from keras import layers

from normswap.errors import UnsupportedError, VerificationError
from normswap.finetune.batches import batch_indices
from normswap.finetune.hooks import RenormLimits
from normswap.finetune.keras import predict, train
from normswap.layers.keras import BatchRenormalization, SwitchNormalization

pytestmark = pytest.mark.keras

BATCH_SIZE = 16
OTHER_BACKENDS = [name for name in ("torch", "jax") if find_spec(name) and keras.backend.backend() == "tensorflow"]


class Stripes:
    """Noisy images, bright on the left for class 0 and on the right for class 1."""

    def __init__(self, count=64):
        rng = np.random.default_rng(0)
        self.y = rng.integers(0, 2, count)
        self.x = rng.normal(0, 0.3, (count, 6, 6, 1)).astype(np.float32)
        self.x[self.y == 0, :, :3] += 1
        self.x[self.y == 1, :, 3:] += 1

    def __len__(self):
        return len(self.y)

    def batch(self, indices):
        return self.x[indices], self.y[indices]


class BrokenAt(Stripes):
    """Images that are NaN in the batch of one step."""

    def __init__(self, step):
        super().__init__()
        self.broken = batch_indices(len(self), BATCH_SIZE, step, seed=0)

    def batch(self, indices):
        x, y = super().batch(indices)
        return (np.full_like(x, np.nan) if np.array_equal(indices, self.broken) else x), y


def small_net(*, norm=layers.BatchNormalization, end="linear", dropout=0.0):
    keras.utils.set_random_seed(3)
    image = keras.Input((6, 6, 1))
    x = layers.ReLU()(norm(name="norm")(layers.Conv2D(4, 3, name="conv")(image)))
    x = layers.Dropout(dropout)(layers.Flatten()(x))
    return keras.Model(image, layers.Dense(2, activation=end, name="scores")(x))


def values(model):
    return {weight.path: np.array(keras.ops.convert_to_numpy(weight)) for weight in model.weights}


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not np.array_equal(one[name], other[name])] == []


def fitted(model, data=None, **settings):
    """Train ``model`` and return its losses."""
    losses = []
    defaults = {
        "steps": 12,
        "batch_size": BATCH_SIZE,
        "lr": 0.1,
        "on_step": lambda step, loss, state: losses.append(loss),
    }
    train(model, data or Stripes(), **{**defaults, **settings})
    return losses


class TestTrain:
    @pytest.mark.parametrize("norm", [layers.GroupNormalization, SwitchNormalization, BatchRenormalization])
    def test_learns_the_labels(self, norm):
        """The loss falls, and the passed model itself has the trained weights."""
        settings = {"groups": 2} if norm is layers.GroupNormalization else {}
        model = small_net(norm=lambda name: norm(name=name, **settings))
        losses = fitted(model, steps=30)
        data = Stripes()

        assert len(losses) == 30
        assert losses[-1] < 0.5 * losses[0]
        assert (predict(model, data.x).argmax(axis=1) == data.y).mean() > 0.9

    def test_takes_probabilities_as_well_as_logits(self):
        """A model that ends in a softmax is trained as one that ends in its logits."""
        logits, probabilities = small_net(), small_net(end="softmax")
        losses = fitted(logits), fitted(probabilities)

        np.testing.assert_allclose(*losses, rtol=1e-3)
        for one, other in zip(logits.get_weights(), probabilities.get_weights(), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-4)

    def test_reports_the_loss_of_each_step(self):
        """Losses are those of the single batches, not their running mean."""
        model, data = small_net(norm=lambda name: layers.GroupNormalization(2, name=name)), Stripes()
        expected = []
        for step in range(3):
            x, y = data.batch(batch_indices(len(data), BATCH_SIZE, step, seed=0))
            scores = predict(model, x)
            log_total = np.log(np.exp(scores).sum(axis=1))
            expected.append((log_total - scores[np.arange(len(y)), y]).mean())

        np.testing.assert_allclose(fitted(model, data, lr=1e-12, steps=3), expected, rtol=1e-5)

    def test_distils_without_labels(self):
        """With a teacher the labels have no part, and the teacher stays as it is."""
        teacher = small_net(end="softmax")
        fitted(teacher, steps=20)
        before = values(teacher)
        data, mislabelled = Stripes(), Stripes()
        mislabelled.y = 1 - mislabelled.y
        students = [small_net(), small_net()]
        losses = [fitted(s, d, teacher=teacher) for s, d in zip(students, (data, mislabelled), strict=True)]

        assert losses[0] == losses[1]
        assert losses[0][-1] < 0.5 * losses[0][0]
        assert_same(values(teacher), before)

    def test_of_norms_leaves_everything_else_alone(self):
        """Other weights are the same bits, and what may learn afterwards is what could before."""
        model = small_net()
        model.get_layer("scores").trainable = False
        before, flags = values(model), [variable.trainable for variable in model.variables]
        fitted(model, train="norm")
        after = values(model)

        changed = {name for name in before if not np.array_equal(before[name], after[name])}
        assert {name.split("/")[-2] for name in changed} == {"norm"}
        assert len(changed) == 4
        assert [variable.trainable for variable in model.variables] == flags

    def test_leaves_how_the_model_is_compiled(self):
        """Optimizer, loss and training function of the model are the user's."""
        model = small_net()
        model.compile("adam", "mse")
        before = model.optimizer, model.loss, model.train_function, model.compiled
        fitted(model, steps=2)

        assert (model.optimizer, model.loss, model.train_function, model.compiled) == before
        assert int(model.optimizer.iterations) == 0

    def test_moves_the_renorm_limits_before_each_step(self):
        """A schedule's limits act within the compiled step and end up in the layer."""
        model = small_net(norm=BatchRenormalization)
        steps = []

        class Noted(RenormLimits):
            def on_step(self, step):
                steps.append(step)
                super().on_step(step)

        fitted(model, steps=4, schedule=Noted([model.get_layer("norm")], 4))

        assert steps == [0, 1, 2, 3]
        assert float(model.get_layer("norm").r_max) == 1 + 0.25 * 3 / 4

    def test_goes_on_as_if_it_had_not_stopped(self):
        """Six steps, and three and three more from a fresh model with the state, give the same weights."""
        whole, first, second = (small_net(dropout=0.3) for _ in range(3))
        fitted(whole, steps=6)
        kept = {}

        def keep(step, loss, state):
            if step == 3:
                kept.update(state=state(), weights=list(values(first).values()))

        fitted(first, steps=6, on_step=keep)
        second.set_weights(kept["weights"])
        fitted(second, steps=6, start=3, state=kept["state"])

        for one, other in zip(whole.get_weights(), second.get_weights(), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)

    def test_stops_at_a_loss_that_is_not_finite(self):
        """The message names the step, and the weights, moving statistics included, are those of before it."""
        model, last = small_net(), {}
        with pytest.raises(VerificationError) as raised:
            fitted(model, BrokenAt(3), on_step=lambda step, loss, state: last.update(values(model), step=step))

        assert str(raised.value) == "expected a finite loss, received loss=nan at step=3; lower --lr"
        assert last.pop("step") == 3
        assert_same(values(model), last)

    def test_refuses_a_model_with_nothing_to_train(self):
        """A network without norms has nothing to learn from train='norm'."""
        model = keras.Sequential([keras.Input((6, 6, 1)), layers.Flatten(), layers.Dense(2)])
        with pytest.raises(UnsupportedError) as raised:
            fitted(model, train="norm")

        assert str(raised.value) == "expected a model with parameters to train, received none with train='norm'"


class TestPredict:
    def test_is_the_output_at_inference_in_batches(self):
        """The batch size does not matter, and no function is left compiled in the model."""
        model, x = small_net(dropout=0.5), Stripes().x
        expected = keras.ops.convert_to_numpy(model(x, training=False))

        np.testing.assert_allclose(predict(model, x, batch_size=10), expected, rtol=1e-5, atol=1e-6)
        assert model.predict_function is None


@pytest.mark.slow
@pytest.mark.parametrize("backend", OTHER_BACKENDS)
def test_holds_on_other_backends(backend):
    """What depends on how a backend keeps its variables during a run holds on every backend."""
    chosen = "distils or leaves or goes_on or not_finite or limits or predict"
    environment = {**os.environ, "KERAS_BACKEND": backend, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "pytest", __file__, "-q", "-x", "-k", chosen, "-p", "no:cacheprovider"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)

    assert done.returncode == 0, done.stdout[-3000:]
