"""The hooks in a Keras loop written by hand and in ``fit``: what they do at each step, and what they leave behind."""

import itertools

import keras
import numpy as np
import pytest
from keras import layers, ops

import normswap
from normswap.errors import InputError, UnsupportedError, VerificationError
from normswap.finetune import (
    Blend,
    Distillation,
    Freeze,
    GateSchedule,
    Hook,
    KerasCallback,
    Momentum,
    RenormLimits,
    Statistics,
    StopAtNaN,
    update_statistics,
)

from ..helpers import exactly

pytestmark = [
    pytest.mark.keras,
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`shuffle=True` was passed:UserWarning"),
]

STEPS, SIZE, LR = 4, 8, 0.05


def network(target, end="linear", equalize=False):
    """A patched network, and the original it was."""
    keras.utils.set_random_seed(3)
    x = inputs = keras.Input((6, 6, 3))
    for number in (1, 2):
        x = layers.Conv2D(4, 3, name=f"conv{number}")(x)
        x = layers.ReLU()(layers.BatchNormalization(name=f"bn{number}")(x))
    original = keras.Model(inputs, layers.Dense(3, activation=end, name="scores")(layers.GlobalAveragePooling2D()(x)))
    rng = np.random.default_rng(0)
    for name in ("bn1", "bn2"):
        for variable in original.get_layer(name).weights:
            variable.assign(rng.uniform(0.5, 1.5, variable.shape))
    model = keras.models.clone_model(original)
    model.set_weights(original.get_weights())
    normswap.patch(model, target, equalize=equalize)
    return model, original


def data(count=STEPS, seed=1):
    """Images and labels of so many batches, one after the other."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count * SIZE, 6, 6, 3)).astype(np.float32), rng.integers(0, 3, count * SIZE)


def compiled(model, accumulate=1, **options):
    """The model, ready to be trained by SGD with momentum, which would show what a frozen variable learned."""
    optimizer = keras.optimizers.SGD(LR, 0.9, gradient_accumulation_steps=accumulate if accumulate > 1 else None)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, **{"jit_compile": False, **options})
    return model


RUNS = {
    "sn": lambda model, original: [
        GateSchedule(model, STEPS, freeze=0.5, temperature=(1.0, 0.1), harden=True),
        StopAtNaN(),
        Statistics(model, [data(2)[0]]),
    ],
    "brn": lambda model, original: [RenormLimits(model, STEPS), Statistics(model, [data(2)[0]])],
    "gn": lambda model, original: [Blend(model, original, STEPS - 1), StopAtNaN()],
}
"""Every hook, with those it goes together with, by target."""


def by_hand(target, accumulate=1):
    """The network that a loop over train_on_batch leaves behind, evaluated after two steps and at the end."""
    model, original = network(target)
    hooks, (x, y) = RUNS[target](model, original), data(STEPS * accumulate)
    compiled(model, accumulate, run_eagerly=True)
    for step in range(STEPS):
        for hook in hooks:
            hook.on_step(step)
        for begin in range(step * accumulate * SIZE, (step + 1) * accumulate * SIZE, SIZE):
            model.train_on_batch(x[begin : begin + SIZE], y[begin : begin + SIZE])
        if step in (1, 3):
            for hook in hooks:
                hook.on_evaluate()
    for hook in hooks:
        hook.on_end()
    return model


def fitted(model, hooks, accumulate=1):
    """Fit the model in two epochs, each evaluated at its end."""
    x, y = data(STEPS * accumulate)
    parts = ((x[begin : begin + SIZE], y[begin : begin + SIZE]) for begin in range(0, len(x), SIZE))
    compiled(model, accumulate).fit(
        parts,
        steps_per_epoch=STEPS * accumulate // 2,
        epochs=2,
        verbose=0,
        validation_data=(x[:SIZE], y[:SIZE]),
        callbacks=[KerasCallback(*hooks)],
    )
    return model


def watch(layer, calls):
    """Note the layer's calls, of which a traced function makes one."""
    run = layer.call

    def call(inputs):
        calls.append(layer.name)
        return run(inputs)

    layer.__dict__["call"] = call


def assert_same(model, other):
    """Both have the same weights, in the same order."""
    for one, two in zip(model.weights, other.weights, strict=True):
        np.testing.assert_allclose(one.numpy(), two.numpy(), rtol=1e-5, atol=1e-5, err_msg=one.path)


class TestFreeze:
    @pytest.mark.parametrize(("train", "moving"), [("last:1", {"scores"}), ("norm", {"bn1", "bn2"})])
    def test_the_rest_stays(self, train, moving):
        """In fit only the chosen part moves, statistics included, and afterwards all can learn as before."""
        model, _ = network("sn")
        before = {weight.path: weight.numpy() for weight in model.weights}
        flags = [weight.trainable for weight in model.weights]
        fitted(model, [Freeze(model, train)])
        moved = {w.path.split("/")[0] for w in model.weights if not np.array_equal(w.numpy(), before[w.path])}

        assert moved == moving
        assert [weight.trainable for weight in model.weights] == flags

    def test_refusals(self):
        """More layers than there are."""
        model, _ = network("gn")
        message = "expected last:N with N up to the model's 5 layers with weights, received train='last:9'"
        with pytest.raises(InputError, match=exactly(message)):
            Freeze(model, "last:9")


def test_momentum():
    """Batches of two move the statistics as their share of one of 64, and in the end each layer has its own again."""
    model, _ = network("brn")
    layer = model.get_layer("bn1")
    momentum = layer.momentum
    hook = Momentum(model, 2).open()
    assert layer.momentum == momentum ** (2 / 64)
    hook.on_end()
    assert layer.momentum == momentum


class TestGateSchedule:
    def test_holds_the_gates_and_lets_them_go_without_a_leap(self):
        """Gates stay bit for bit as long as they are held, all else learns; their first step is a gradient's."""
        model, _ = network("sn")
        hook, (x, y) = GateSchedule(model, 3, freeze=2), data(1)
        compiled(model)
        gates, kernel = model.get_layer("bn2").mean_weight, model.get_layer("conv2").kernel
        values = [(gates.numpy(), kernel.numpy())]
        for step in range(4):
            hook.on_step(step)
            model.train_on_batch(x, y)
            values.append((gates.numpy(), kernel.numpy()))
        moved = [np.abs(after[0] - before[0]).max() for before, after in itertools.pairwise(values)]

        assert moved[0] == moved[1] == 0
        assert 0 < moved[2] < moved[3] < 2.5 * moved[2]  # momentum 0.9 begins there
        assert not np.array_equal(values[0][1], values[1][1])

    @pytest.mark.parametrize("before", [0.5, 0])
    def test_begins_with_the_gates_there_are(self, before):
        """A temperature that a layer had before, 0 too, stays in its gates; going on with a step changes no logits."""
        model, _ = network("sn")
        layer = model.get_layer("bn1")
        layer.mean_weight.assign([0.0, 0.1, 0.2])
        layer.set_temperature(before)
        expected = ops.convert_to_numpy(layer.gates()[0])
        hook = GateSchedule(model, 4, temperature=(2.0, 0.5))
        for _ in range(2):
            hook.on_step(0)
            np.testing.assert_allclose(ops.square(layer.gates()[0]) / sum(layer.gates()[0] ** 2), expected, rtol=1e-5)
        kept = layer.mean_weight.numpy()
        GateSchedule(model, 4, temperature=(2.0, 0.5)).on_step(3)

        assert np.array_equal(layer.mean_weight.numpy(), kept)
        assert float(layer.temperature) == 0.5

    @pytest.mark.parametrize("harden", [False, True])
    def test_leaves_a_plain_layer(self, harden):
        """The end keeps the gates, or gives all to the largest, at temperature 1, and holds nothing back."""
        model, _ = network("sn")
        layer = model.get_layer("bn1")
        layer.mean_weight.assign([0.0, 0.1, 0.2])
        contents = set(layer.__dict__)
        hook = GateSchedule(model, 10, freeze=2, temperature=(1.0, 0.1), harden=harden)
        hook.on_step(9)
        gates = ops.convert_to_numpy(layer.gates()[0])
        hook.on_end()

        np.testing.assert_allclose(gates, np.exp([0, 1, 2]) / np.exp([0, 1, 2]).sum(), rtol=1e-5)
        np.testing.assert_allclose(layer.gates()[0], [0, 0, 1] if harden else gates, rtol=1e-5)
        assert float(layer.temperature) == 1
        assert set(layer.__dict__) == contents


class TestBlend:
    @pytest.mark.parametrize("equalize", [True, "scale", False])
    def test_fades_from_the_original_to_the_patched_model(self, equalize):
        """λ = 1 gives what the original computes, 0 what the new layers do, in compiled functions too."""
        model, original = network("gn", equalize=equalize)
        x = data(1)[0]
        patched, weights = model.predict(x, verbose=0), len(model.weights)
        hook = Blend(model, original, 10)
        hook.on_step(0)
        first = model.predict(x, verbose=0)
        hook.on_step(3)
        between = model.predict(x, verbose=0)
        hook.on_evaluate()
        evaluated = model.predict(x, verbose=0)

        np.testing.assert_allclose(first, original.predict(x, verbose=0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(evaluated, patched, rtol=1e-5, atol=1e-6)
        assert not np.allclose(between, first, atol=1e-4)
        assert not np.allclose(between, patched, atol=1e-4)
        assert len(model.weights) == weights

    def test_refusals(self):
        """It needs a patched model and the original's BatchNorms."""
        model, original = network("gn")
        message = "expected a patched model to blend, received one without replaced layers"
        with pytest.raises(UnsupportedError, match=exactly(message)):
            Blend(original, original, 4)
        message = (
            "expected a reference with the BatchNorms and running statistics of the model before the patch, received "
            "one without them at bn1, bn2"
        )
        with pytest.raises(InputError, match=exactly(message)):
            Blend(model, model, 4)


class TestStatistics:
    @pytest.mark.parametrize("target", ["sn", "brn"])
    def test_statistics_are_those_of_all_the_data(self, target):
        """Uneven batches count by their size; all else is as before."""
        model, _ = network(target)
        x = data(2)[0]
        before = {v.path: v.numpy() for v in model.weights if "moving" not in v.path}
        update_statistics(model, [x[:5], (x[5:], None)])
        seen = model.get_layer("conv1")(x).numpy()

        np.testing.assert_allclose(model.get_layer("bn1").moving_mean, seen.mean((0, 1, 2)), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(model.get_layer("bn1").moving_variance, seen.var((0, 1, 2)), rtol=1e-4)
        assert all(np.array_equal(v.numpy(), before[v.path]) for v in model.weights if "moving" not in v.path)

    def test_masked_positions_take_no_part(self):
        """Timesteps that a mask leaves out count neither for the batch nor for the average."""
        from normswap.layers.keras import SwitchNormalization

        x = np.arange(24, dtype=np.float32).reshape(2, 4, 3)
        x[:, 2:] = -1
        model = keras.Sequential([keras.Input((4, 3)), layers.Masking(-1.0), SwitchNormalization(name="norm")])
        update_statistics(model, [x])

        kept = x[:, :2].reshape(-1, 3)
        np.testing.assert_allclose(model.get_layer("norm").moving_mean, kept.mean(0), rtol=1e-6)
        np.testing.assert_allclose(model.get_layer("norm").moving_variance, kept.var(0), rtol=1e-6)

    def test_refusals(self):
        """A model without such layers, and no batches at all, are refused; a hook passes the former over."""
        message = "expected a model with SN, BRN or BatchNorm layers that keep moving statistics, received one without"
        with pytest.raises(UnsupportedError, match=exactly(message)):
            update_statistics(network("gn")[0], [])
        model, _ = network("sn")
        before = model.get_weights()
        with pytest.raises(
            InputError, match=exactly("expected batches that reach every layer, received none for some")
        ):
            update_statistics(model, [])
        Statistics(network("gn")[0], []).on_evaluate()

        assert all(map(np.array_equal, model.get_weights(), before))


class Noting(Hook):
    """A hook that notes what it is told."""

    def __init__(self):
        self.told = []

    def on_step(self, step):
        self.told.append(step)

    def on_evaluate(self):
        self.told.append("evaluate")

    def on_end(self):
        self.told.append("end")


class TestFit:
    @pytest.mark.parametrize(("target", "accumulate"), [("sn", 1), ("brn", 1), ("gn", 2)])
    def test_a_run_is_the_one_by_hand(self, target, accumulate):
        """Hooks do in it what they do in a plain loop, evaluations and accumulated gradients included."""
        model, original = network(target)
        hooks, traced = RUNS[target](model, original), []
        watch(model.get_layer("conv1"), traced)
        fitted(model, hooks, accumulate)

        assert_same(model, by_hand(target, accumulate))
        assert len(traced) <= 8  # training, evaluation and estimates, not every step

    def test_what_hooks_are_told(self):
        """A step is one of the optimizer, also where a run goes on with an optimizer that has taken some."""
        noting, (model, _) = Noting(), network("gn")
        fitted(model, [noting], 2)
        x, y = data(1)
        model.fit(x, y, batch_size=SIZE, epochs=2, verbose=0, callbacks=[KerasCallback(noting)])

        assert noting.told == [0, 1, "evaluate", 2, 3, "evaluate", "end", 4, "end"]

    def test_stops_at_nan(self):
        """The first loss that is NaN ends the run."""
        model, _ = network("gn")
        x, y = data()
        x[2 * SIZE] = np.nan
        message = "expected a finite loss, received loss=nan at step=2; lower the learning rate"
        with pytest.raises(VerificationError, match=exactly(message)):
            compiled(model).fit(x, y, batch_size=SIZE, shuffle=False, verbose=0, callbacks=[KerasCallback(StopAtNaN())])

    def test_distillation(self):
        """The docstring's student comes nearer to the original without labels, here from probabilities."""
        model, original = network("gn", "softmax")
        before = original.get_weights()
        x = data()[0]
        with Distillation(model, original, features=0.1) as distillation:
            distillation.decide(x[:4])

            class Student(keras.Model):
                def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
                    return distillation(x, y_pred)

            student = Student(model.inputs, model.outputs)
            student.compile(keras.optimizers.SGD(LR, momentum=0.9), jit_compile=False)
            losses = student.fit(x, x[:, 0], batch_size=SIZE, epochs=8, verbose=0).history["loss"]

        assert losses[-1] < 0.5 * losses[0]
        assert all(map(np.array_equal, original.get_weights(), before))
        assert all("call" not in layer.__dict__ for layer in original.layers)


class TestDistillation:
    def test_formula(self):
        """T²·KL(teacher || model), the same from logits and from their softmax, and 0 for the teacher itself."""
        rng = np.random.default_rng(0)
        scores, wanted = (rng.normal(size=(4, 5)).astype(np.float32) for _ in range(2))
        p, q = (np.exp(each / 2) / np.exp(each / 2).sum(1, keepdims=True) for each in (wanted, scores))
        expected = (p * np.log(p / q)).sum(1).mean() * 4
        teacher = keras.layers.Identity()
        found = [
            float(Distillation(teacher, teacher)(*(ops.convert_to_tensor(each) for each in pair)))
            for pair in ((wanted, scores), (np.asarray(ops.softmax(wanted)), np.asarray(ops.softmax(scores))))
        ]

        np.testing.assert_allclose(found, expected, rtol=1e-5)
        assert float(Distillation(teacher, teacher)(scores, scores)) == pytest.approx(0, abs=1e-6)

    def test_features(self):
        """The mean squared distance over the teacher's variance, averaged over the layers, is added with its weight."""
        model, original = network("gn")
        x = data(1)[0]
        parts = [
            keras.Model(each.input, [each.get_layer(name).output for name in ("bn1", "bn2")])(x, training=False)
            for each in (model, original)
        ]
        distances = [np.square(a - b).mean() / np.var(b) for a, b in zip(*parts, strict=True)]
        plain = Distillation(model, original)(x, model(x))
        with Distillation(model, original, features=0.7) as distillation:
            loss = distillation(x, model(x))

        assert float(loss) == pytest.approx(float(plain) + 0.7 * np.mean(distances), rel=1e-4)


def test_exports(tmp_path):
    """What a run with hooks leaves is exported and verified like any patched model."""
    model = by_hand("gn")
    normswap.to_onnx(model, tmp_path / "model.onnx", example=data(1)[0])

    assert normswap.verify(model, tmp_path / "model.onnx")
