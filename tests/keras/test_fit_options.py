"""How a training through ``fit`` is told to learn: what, by what rule, from what, in what precision."""

import keras
import numpy as np
import pytest
from keras import layers

import normswap
from normswap.errors import InputError, UnsupportedError
from normswap.finetune import update_statistics
from normswap.finetune.hooks.keras.distillation import learns
from normswap.finetune.run.keras.train import predict
from normswap.frameworks.keras import watching

from .fitting import changed, fitted, losses, small_net, stripes, values

pytestmark = pytest.mark.keras


class TestWhatLearns:
    def test_norms_alone(self):
        """Other weights are the same bits, and what may learn afterwards is what could before."""
        model = small_net()
        model.get_layer("scores").trainable = False
        before, flags = values(model), [variable.trainable for variable in model.variables]
        fitted(model, train="norm")

        assert changed(before, values(model)) == {"gamma", "beta", "moving_mean", "moving_variance"}
        assert [variable.trainable for variable in model.variables] == flags

    def test_the_last_blocks(self):
        """All before them stays, statistics included, and may learn again afterwards."""
        model = small_net("brn")
        before, flags = values(model), [variable.trainable for variable in model.variables]
        fitted(model, train="last:1")

        assert changed(before, values(model)) == {"kernel", "bias"}
        assert np.array_equal(before["conv/kernel"], values(model)["conv/kernel"])
        assert [variable.trainable for variable in model.variables] == flags
        assert model.get_layer("norm").trainable

    def test_more_blocks_than_there_are(self):
        """The message says how many there are."""
        with pytest.raises(InputError) as raised:
            fitted(small_net("brn"), train="last:4")

        assert str(raised.value) == (
            "expected last:N with N up to the model's 3 layers with weights, received train='last:4'"
        )


class TestRule:
    @pytest.mark.backends
    def test_accumulated_batches_are_one_large_one(self):
        """Two batches of 8 to a step are one of 16: losses and weights agree but for rounding."""
        whole, parts = small_net("gn"), small_net("gn")
        found = losses(whole), losses(parts, batch_size=8, accumulate=2)

        np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-7)
        for one, other in zip(whole.get_weights(), parts.get_weights(), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-6)

    @pytest.mark.backends
    def test_weight_decay_spares_norms_biases_and_gates(self):
        """The rest shrinks in the first step by rate times decay, as often as momentum will repeat a gradient."""
        start, plain, decayed = (small_net("sn") for _ in range(3))
        fitted(plain, steps=1)
        fitted(decayed, steps=1, weight_decay=0.01)
        before, one, other = values(start), values(plain), values(decayed)

        assert {name for name in one if not np.array_equal(one[name], other[name])} == {"conv/kernel", "scores/kernel"}
        for name in ("conv/kernel", "scores/kernel"):
            np.testing.assert_allclose(one[name] - other[name], 0.1 * 0.01 / 0.1 * before[name], rtol=1e-3, atol=1e-7)

    @pytest.mark.backends
    def test_the_gates_rate_is_scaled(self):
        """With gate_lr gates take so many times the step, and everything else the same."""
        start, plain, fast = (small_net("sn") for _ in range(3))
        fitted(plain, steps=1)
        fitted(fast, steps=1, gate_lr=5.0)
        before, one, other = values(start), values(plain), values(fast)

        assert changed(one, other) == {"mean_weight", "var_weight"}
        for name in ("norm/mean_weight", "norm/var_weight"):
            np.testing.assert_allclose(other[name] - before[name], 5 * (one[name] - before[name]), rtol=1e-2, atol=1e-6)

    @pytest.mark.backends
    def test_the_length_of_gradients(self):
        """Longer ones are scaled down to it, over all variables together, and shorter ones left; 0 leaves all."""

        def step(norm):
            model = small_net("gn")
            before = [np.array(variable) for variable in model.trainable_variables]
            fitted(model, steps=1, lr=1.0, warmup=0.0, momentum=0.0, max_grad_norm=norm)
            after = zip(model.trainable_variables, before, strict=True)
            return np.concatenate([np.ravel(np.array(variable) - old) for variable, old in after])

        whole = step(0.0)

        np.testing.assert_array_equal(step(1e6), whole)
        np.testing.assert_allclose(step(0.01), 0.01 * whole / np.linalg.norm(whole), atol=1e-6)

    @pytest.mark.backends
    def test_a_rate_without_decay(self):
        """The constant rate rises and stays."""
        rates = [taken.lr for taken in fitted(small_net("gn"), steps=6, schedule="constant", warmup=0.5, lr=0.3)]

        assert rates == pytest.approx([0.1, 0.2, 0.3, 0.3, 0.3, 0.3])

    def test_the_moving_average_of_the_weights(self):
        """Within averaged() the model has it, statistics apart; afterwards it has its own weights again."""
        model, average = small_net("brn"), None
        trained = [weight.path for weight in model.trainable_weights]
        expected = {name: value for name, value in values(model).items() if name in trained}

        def compare(taken):
            own = values(model)
            for name, value in expected.items():
                value += 0.1 * (own[name] - value)
            with taken.averaged():
                nonlocal average
                average = values(model)
                assert changed(own, average) == {name.partition("/")[2] for name in trained}
            assert changed(own, values(model)) == set()

        fitted(model, steps=5, ema=0.9, on_step=compare)

        for name, value in expected.items():
            np.testing.assert_allclose(average[name], value, rtol=1e-5, atol=1e-6)


class TestFrom:
    def test_features_are_distilled(self):
        """They add the replaced layers' distance to the loss, which falls, and leave nothing behind in the layers."""
        teacher = small_net()
        fitted(teacher, steps=20)
        students = []
        for _ in range(2):
            student = keras.models.clone_model(teacher)
            student.set_weights(teacher.get_weights())
            normswap.patch(student, "sn")
            student.get_layer("norm").beta.assign_add(keras.ops.ones(4))
            students.append(student)
        without, found = (
            losses(student, teacher=teacher, features=weight, lr=0.05, steps=20)
            for student, weight in zip(students, (0, 1), strict=True)
        )

        assert found[0] > 1.1 * without[0]
        assert found[-1] < 0.5 * found[0]
        assert all("call" not in layer.__dict__ for layer in [*students[1].layers, *teacher.layers])

    def test_workers_change_nothing(self):
        """Threads that read ahead give the same run, bit for bit, augmented and all."""
        models = [small_net("gn", dropout=0.2) for _ in range(2)]
        for workers, model in zip((0, 2), models, strict=True):
            fitted(model, workers=workers, augment="flip")

        assert changed(*map(values, models)) == set()

    def test_augmented_images_are_others(self):
        """Mirrored, the images of the two classes cannot be told apart."""
        plain, mirrored = (losses(small_net("gn"), steps=30, augment=each) for each in ("none", "flip"))

        assert plain[-1] < 0.1 < 0.3 < mirrored[-1]


class TestOutputs:
    @pytest.mark.parametrize("kind", ["mapping", "list"])
    def test_scores_among_others(self, kind):
        """Training, by labels and by a teacher, and evaluation are those of the scores alone."""
        models = [small_net("gn") for _ in range(2)]
        scores, image = models[1].output, stripes().batch(range(8))[0]
        several = (
            {"hidden": models[1].get_layer("conv").output, "logits": scores} if kind == "mapping" else [scores] * 2
        )
        other = keras.Model(models[1].input, several)

        assert np.array_equal(predict(other, image), predict(models[0], image))
        assert losses(other, steps=2) == pytest.approx(losses(models[0], steps=2), rel=1e-6)
        found, expected = (losses(small_net("gn"), teacher=each, steps=2) for each in (other, models[0]))
        assert found == pytest.approx(expected, rel=1e-5)

    def test_scores_of_each_place_have_no_labels(self):
        """They are refused for labels of images before the first step."""
        image = keras.Input((6, 6, 1))
        model = keras.Model(image, layers.Conv2D(2, 3)(image))
        with pytest.raises(UnsupportedError) as raised:
            fitted(model)

        assert str(raised.value) == (
            "expected a model with scores of shape (N, classes) for labels of images, received one with scores of "
            "shape (8, 4, 4, 2); teacher='original' needs no labels"
        )

    def test_features_of_an_evaluation_are_not_held(self):
        """A distillation of features takes note of what is learned from, not of predictions and new statistics."""
        model, image, noted = small_net("sn"), stripes().batch(range(8))[0], []
        norm = {"norm": model.get_layer("norm")}
        with watching(norm, lambda name, x, output: noted.append((name, learns()))):
            predict(model, image)
            update_statistics(model, [image])
            model(image)

        assert noted == [("norm", False), ("norm", False), ("norm", True)]


@pytest.mark.backends
def test_a_large_seed():
    """A time in nanoseconds will do as a seed."""
    assert losses(small_net("gn", dropout=0.3), seed=1763726400123456789, steps=1) != losses(
        small_net("gn", dropout=0.3), steps=1
    )


class TestPrecision:
    @pytest.mark.backends
    def test_narrow_passes_wide_weights(self):
        """bf16 changes the losses a little; weights, and the model outside of a step, remain float32."""
        image = stripes().batch([0])[0]
        model, policies = small_net("sn", end="softmax"), []

        def note(taken):
            policies.append({layer.compute_dtype for layer in model.layers})
            assert np.array_equal(keras.ops.convert_to_numpy(model(image)), before(model, image))

        def before(model, image):
            twin = small_net("sn", end="softmax")
            twin.set_weights(model.get_weights())
            return keras.ops.convert_to_numpy(twin(image))

        wide, narrow = (
            losses(small_net("sn", end="softmax"), steps=3),
            losses(model, steps=3, precision="bf16", on_step=note),
        )

        assert wide != narrow
        np.testing.assert_allclose(wide, narrow, rtol=0.2)
        assert policies == [{"float32"}] * 3
        assert {weight.dtype for weight in model.weights} == {"float32"}

    def test_half_precision_is_refused(self):
        """The message says what to use instead."""
        with pytest.raises(UnsupportedError) as raised:
            fitted(small_net("gn"), precision="fp16")

        assert str(raised.value) == (
            "expected precision=no or bf16 for a Keras model, received precision=fp16, which needs a scaled loss; "
            "use bf16"
        )
