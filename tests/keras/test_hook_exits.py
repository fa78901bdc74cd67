"""Every way out of a Keras model's hooks leaves the model without a trace of them."""

import keras
import numpy as np
import pytest

from normswap.errors import InputError
from normswap.finetune import (
    Blend,
    Distillation,
    Freeze,
    GateSchedule,
    Hooks,
    KerasCallback,
    Momentum,
    RenormLimits,
    Statistics,
    StopAtNaN,
)
from normswap.frameworks.keras import override

from ..ways_out import WAYS_OUT
from .test_hooks import SIZE, compiled, data, exactly, network

pytestmark = pytest.mark.keras

HOOKS = {
    "limits": ("brn", lambda model, original: RenormLimits(model, 10)),
    "gates": ("sn", lambda model, original: GateSchedule(model, 10, freeze=0.5, temperature=(2.0, 0.1))),
    "harden": ("sn", lambda model, original: GateSchedule(model, 10, temperature=(1.0, 0.1), harden=True)),
    "norms alone": ("sn", lambda model, original: Freeze(model, "norm")),
    "the last block": ("sn", lambda model, original: Freeze(model, "last:1")),
    "momentum": ("brn", lambda model, original: Momentum(model, 2)),
    "blend": ("gn", lambda model, original: Blend(model, original, 10)),
    "statistics": ("sn", lambda model, original: Statistics(model, [data(1)[0]])),
    "nan": ("gn", lambda model, original: StopAtNaN()),
    "distillation": ("gn", lambda model, original: Distillation(model, original, features=1.0)),
    "several": ("sn", lambda model, original: Hooks(
        GateSchedule(model, 10, freeze=0.5, temperature=(2.0, 0.1)), Freeze(model, "norm"), Momentum(model, 2),
        Blend(model, original, 10), Distillation(model, original, features=1.0),
    )),
}  # fmt: skip


def anatomy(model):
    """What a model is made of beside its numbers: classes, attributes, overridden methods, what learns."""
    found = {}
    for layer in model._flatten_layers():
        temperature = getattr(layer, "_temperature", None)
        flags = layer.trainable, getattr(layer, "momentum", None), temperature
        found[layer.name] = type(layer), sorted(layer.__dict__), flags
    return found | {weight.path: weight.trainable for weight in model.weights}


@pytest.mark.parametrize("leave", WAYS_OUT)
@pytest.mark.parametrize("name", HOOKS)
def test_every_way_out_leaves_a_plain_model(name, leave):
    """Making a hook changes nothing; whichever way it is left, the models are made of what they were made of.

    But at the end, where a hook finishes, the model then computes what it did. The hook can be opened again.
    """
    target, make = HOOKS[name]
    (model, original), x = network(target), data(1)[0]
    model(x), original(x)
    before = [anatomy(each) for each in (model, original)]
    hook, outputs = make(model, original), []
    assert [anatomy(each) for each in (model, original)] == before
    assert not hook.is_open

    def use():
        for step in (0, 4, 8):
            hook.on_step(step)
            model(x)
        hook.on_evaluate()
        outputs.append(np.array(model(x)))
        assert hook.is_open

    for _ in range(2):
        leave(hook, use)

        assert not hook.is_open
        assert [anatomy(each) for each in (model, original)] == before
        if name != "harden" or not leave.__name__.startswith("the_end"):
            np.testing.assert_allclose(model(x), outputs[-1], rtol=1e-4, atol=1e-5)


def test_overrides_go_in_any_order():
    """What is left around a method goes on, and the last one to go leaves the layer its own."""
    layer = keras.layers.Identity()
    contents, x = set(layer.__dict__), np.ones((1, 2), np.float32)

    def adding(value):
        return override(layer, "call", lambda run: lambda inputs: run(inputs) + value)

    first, second = adding(1), adding(10)
    assert float(layer.call(x)[0, 0]) == 12
    first()
    first()
    assert float(layer.call(x)[0, 0]) == 11
    second()

    assert set(layer.__dict__) == contents


class TestCompiledFunctions:
    def test_see_a_hook_that_opens_after_them(self):
        """Momentum is a constant of the code that ``fit`` compiles: it is compiled again, and once more in the end."""
        (model, _), (x, y) = network("brn"), data(1)
        compiled(model)
        statistics = model.get_layer("bn1").moving_mean

        def moved():
            before = statistics.numpy()
            model.fit(x, y, batch_size=SIZE, verbose=0)
            return np.abs(statistics.numpy() - before).sum()

        model.optimizer.learning_rate = 0.0
        plain = moved()
        with Momentum(model, 1, images=1024):
            held = moved()

        assert held < 0.05 * plain
        assert moved() > 0.5 * plain

    def test_see_what_is_frozen_after_them(self):
        """An optimizer built for all leaves alone what is frozen since."""
        (model, _), (x, y) = network("gn"), data(1)
        compiled(model).fit(x, y, batch_size=SIZE, verbose=0)
        kernels = [model.get_layer(name).kernel for name in ("conv1", "scores")]
        before = [kernel.numpy() for kernel in kernels]
        with Freeze(model, "last:1"):
            model.fit(x, y, batch_size=SIZE, verbose=0)

        moved = [not np.array_equal(kernel.numpy(), old) for kernel, old in zip(kernels, before, strict=True)]
        assert moved == [False, True]

    def test_of_jax_cannot(self, monkeypatch):
        """There the optimizer has to be that of what learns: a hook that comes too late says so and changes nothing."""
        (model, _), (x, y) = network("gn"), data(1)
        compiled(model).fit(x, y, batch_size=SIZE, verbose=0)
        before, hook = anatomy(model), Freeze(model, "last:1")
        monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
        message = (
            "expected a model whose optimizer is not built yet, received one built for 10 variables where "
            "train='last:1' leaves 2; open the hook before compile and fit, as `with Freeze(...):` around both does"
        )
        with pytest.raises(InputError, match=exactly(message)):
            hook.open()

        assert anatomy(model) == before


class TestCallback:
    def test_entered_it_closes_at_an_exception(self):
        """``fit`` tells of none; the callback's ``with`` leaves the model without its hooks."""
        (model, original), (x, y) = network("gn"), data()
        before = anatomy(model)

        class Failing(keras.callbacks.Callback):
            def on_train_batch_end(self, batch, logs=None):
                assert anatomy(model) != before
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt), KerasCallback(Blend(model, original, 4), Freeze(model, "norm")) as hooks:
            compiled(model).fit(x, y, batch_size=SIZE, verbose=0, callbacks=[hooks, Failing()])

        after = anatomy(model)
        assert {name: after[name] for name in before if name != model.name} == {
            name: before[name] for name in before if name != model.name
        }

    def test_entered_it_opens_before_the_optimizer(self):
        """The optimizer holds what learns alone, and ends with the training, not once more with ``with``."""
        (model, _), (x, y) = network("gn"), data(1)
        with KerasCallback(Freeze(model, "last:1")) as callback:
            compiled(model).fit(x, y, batch_size=SIZE, verbose=0, callbacks=[callback])
            assert len(model.optimizer._trainable_variables) == 2
            assert not callback.hooks.is_open


def test_a_distillation_that_is_not_open():
    """Asked for the distance of features it has not listened for, it says how to make it listen."""
    (model, original), x = network("gn"), data(1)[0]
    distillation = Distillation(model, original, features=1.0)
    message = (
        "expected a distillation with features that was opened before the forward pass, received one that is not open; "
        "make it `with Distillation(...) as distillation:`, or call its open()"
    )
    with pytest.raises(InputError, match=exactly(message)):
        distillation(x, model(x))


def test_batch_norms_left_in_a_mixed_model():
    """A BatchNorm that was not replaced is re-estimated too, and all of it can be undone."""
    from normswap.finetune import update_statistics

    _, original = network("gn")
    x, before = data(1)[0] + 1, original.get_weights()
    undo = update_statistics(original, [x])
    seen = original.get_layer("conv1")(x).numpy()

    np.testing.assert_allclose(original.get_layer("bn1").moving_mean, seen.mean((0, 1, 2)), rtol=1e-4, atol=1e-5)
    undo()
    assert all(map(np.array_equal, original.get_weights(), before))
