"""Fine-tuning through ``fit``: what is learned from, what is told of each step, and how a training goes on."""

import keras
import numpy as np
import pytest
from keras import layers

import normswap
from normswap.errors import InputError, UnsupportedError, VerificationError
from normswap.finetune import Hook, RenormLimits
from normswap.finetune.run.batches import batch_indices
from normswap.finetune.run.keras.train import predict
from normswap.finetune.run.training import default_rate

from .fitting import BATCH_SIZE, Spoiled, changed, fitted, losses, small_net, stripes, values

pytestmark = pytest.mark.keras


class Noted(Hook):
    """Notes the steps it is told of."""

    def __init__(self):
        self.steps = []

    def on_step(self, step):
        self.steps.append(step)


class TestLearning:
    def test_a_model_that_is_taught_computes_as_its_teacher(self):
        """Its own copy has nothing to teach it: neither what it would drop nor batch statistics make a difference."""
        parts = [layers.Flatten(), layers.BatchNormalization(), layers.Dropout(0.9), layers.Dense(2)]
        model = keras.Sequential([layers.Input((6, 6, 1)), *parts])
        teacher = keras.models.clone_model(model)
        teacher.set_weights(model.get_weights())

        assert max(losses(model, stripes(), teacher=teacher, steps=3)) < 1e-6
        for weights, same in zip(model.get_weights(), teacher.get_weights(), strict=True):
            np.testing.assert_allclose(weights, same, rtol=1e-5, atol=1e-6)

    def test_a_model_that_is_taught_only_goes_down(self):
        """At the default rate every epoch's loss is below the one before."""
        teacher, data = small_net("bn"), stripes()
        losses(teacher, data, steps=30)
        model = small_net("bn")
        model.set_weights(teacher.get_weights())
        model = normswap.patch(model, "gn", equalize=False).model
        steps = len(data) // BATCH_SIZE
        before = losses(model, data, teacher=teacher, steps=1, lr=1e-12)[0]
        found = losses(model, data, teacher=teacher, steps=4 * steps, lr=default_rate(BATCH_SIZE, before))
        epochs = list(np.mean(np.reshape(found, (4, steps)), axis=1))

        assert epochs == sorted(epochs, reverse=True)
        assert epochs[-1] < epochs[0]

    @pytest.mark.parametrize("norm", ["gn", "sn", "brn"])
    def test_learns_the_labels(self, norm):
        """The loss falls, and the passed model itself has the trained weights."""
        model, data = small_net(norm), stripes()
        found = losses(model, data, steps=30)

        assert len(found) == 30
        assert found[-1] < 0.5 * found[0]
        images, labels = data.batch(range(len(data)))
        assert (predict(model, images).argmax(axis=1) == labels).mean() > 0.9

    def test_takes_probabilities_as_well_as_logits(self):
        """A model that ends in a softmax is trained as one that ends in its logits."""
        logits, probabilities = small_net(), small_net(end="softmax")

        np.testing.assert_allclose(losses(logits), losses(probabilities), rtol=1e-3)
        for one, other in zip(logits.get_weights(), probabilities.get_weights(), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-4)

    @pytest.mark.backends
    def test_distils_without_labels(self):
        """With a teacher the labels have no part, and the teacher stays as it is."""
        teacher = small_net(end="softmax")
        fitted(teacher, steps=20)
        before = values(teacher)
        one, other = (fitted(small_net(), stripes(flipped=each), teacher=teacher) for each in (False, True))

        assert [taken.loss for taken in one] == [taken.loss for taken in other]
        assert one[-1].loss < 0.5 * one[0].loss
        assert one[0].accuracy is None
        assert changed(before, values(teacher)) == set()

    @pytest.mark.backends
    def test_leaves_how_the_model_is_compiled(self):
        """Optimizer, loss and training function of the model are the user's."""
        model = small_net()
        model.compile("adam", "mse")
        before = model.optimizer, model.loss, model.train_function, model.compiled
        fitted(model, steps=2)

        assert (model.optimizer, model.loss, model.train_function, model.compiled) == before
        assert int(model.optimizer.iterations) == 0

    def test_refuses_a_model_with_nothing_to_train(self):
        """A network without norms has nothing to learn from train='norm'."""
        model = keras.Sequential([keras.Input((6, 6, 1)), layers.Flatten(), layers.Dense(2)])
        with pytest.raises(UnsupportedError) as raised:
            fitted(model, train="norm")

        assert str(raised.value) == "expected a model with parameters to train, received none with train='norm'"


class TestSteps:
    def test_reports_the_loss_and_accuracy_of_each_step(self):
        """They are those of the step's own images, not their running mean."""
        model, data, expected = small_net("gn"), stripes(), []
        for step in range(3):
            images, labels = data.batch(batch_indices(len(data), BATCH_SIZE, step, seed=0))
            scores = predict(model, images)
            log_total = np.log(np.exp(scores).sum(axis=1))
            loss = (log_total - scores[np.arange(len(labels)), labels]).mean()
            expected.append((loss, 100 * (scores.argmax(axis=1) == labels).mean()))
        found = [(taken.loss, taken.accuracy) for taken in fitted(model, data, lr=1e-12, steps=3)]

        np.testing.assert_allclose(found, expected, rtol=1e-5)

    def test_tells_the_hooks_the_step_of_the_run(self):
        """Each hook is told once a step, however many batches that takes, what step of the whole run it is."""
        hook = Noted()
        found = fitted(small_net("gn"), hooks=[hook], first=5, start=1, steps=3, accumulate=2)

        assert hook.steps == [6, 7]
        assert [taken.step for taken in found] == [2, 3]

    @pytest.mark.backends
    def test_moves_the_renorm_limits_before_each_step(self):
        """A schedule's limits act within the compiled step and end up in the layer."""
        model, seen = small_net("brn"), []
        fitted(model, steps=4, hooks=[RenormLimits(model, 4)], on_step=lambda taken: seen.append(r_max(model)))

        assert seen == [1 + 0.25 * step / 4 for step in range(4)]

    def test_ends_when_told_to(self):
        """A true answer to a step is the end, whatever was to follow."""
        assert len(fitted(small_net("gn"), on_step=lambda taken: taken.step == 2)) == 2

    @pytest.mark.backends
    def test_goes_on_as_if_it_had_not_stopped(self):
        """Six steps, and three and three more from a fresh model with the state, give the same bits."""
        whole, first, second = (small_net("brn", dropout=0.3) for _ in range(3))
        common = {"steps": 6, "accumulate": 2, "batch_size": 8, "ema": 0.9}
        averages = []
        fitted(whole, **common, on_step=lambda taken: averages.append(averaged(whole, taken)))
        kept = {}

        def keep(taken):
            kept.update(state=taken.state(), weights=first.get_weights())
            return taken.step == 3

        fitted(first, **common, on_step=keep)
        second.set_weights(kept["weights"])
        fitted(second, **common, start=3, state=kept["state"], on_step=lambda t: averages.append(averaged(second, t)))

        assert all(map(np.array_equal, whole.get_weights(), second.get_weights()))
        assert all(map(np.array_equal, averages[5], averages[-1]))

    @pytest.mark.backends
    def test_stops_at_a_loss_that_is_not_finite(self):
        """The message names the step, of which nobody is told."""
        steps = []
        with pytest.raises(VerificationError) as raised:
            fitted(small_net(), Spoiled(3), first=0, on_step=lambda taken: steps.append(taken.step))

        assert str(raised.value) == "expected a finite loss, received loss=nan at step=3; lower lr"
        assert steps == [1, 2, 3]

    @pytest.mark.parametrize("workers", [0, 2])
    def test_an_error_of_the_data_is_raised_as_it_is(self, workers):
        """Whoever reads the images, the framework's own wrapping of the error is taken off."""
        error = InputError("expected an image in cat.png, received none")
        with pytest.raises(InputError) as raised:
            fitted(small_net("gn"), Spoiled(5, error), workers=workers)

        assert raised.value is error


@pytest.mark.backends
class TestPredict:
    def test_is_the_output_at_inference_in_batches(self):
        """The batch size does not matter, and no function is left compiled in the model."""
        model, images = small_net(dropout=0.5), stripes().batch(range(64))[0]
        expected = keras.ops.convert_to_numpy(model(images, training=False))

        np.testing.assert_allclose(predict(model, images, batch_size=10), expected, rtol=1e-5, atol=1e-6)
        assert model.predict_function is None


def r_max(model):
    return float(model.get_layer("norm").r_max)


def averaged(model, taken):
    """The weights of the average after a step."""
    with taken.averaged():
        return model.get_weights()
