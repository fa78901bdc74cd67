"""Every way out of a PyTorch model's hooks leaves the model without a trace of them."""

import os
import signal

import pytest
import torch

from normswap.bundles import bundle
from normswap.errors import InputError, VerificationError
from normswap.finetune import (
    Blend,
    Distillation,
    Freeze,
    GateSchedule,
    Hook,
    Hooks,
    Momentum,
    RenormLimits,
    Settings,
    Statistics,
    StopAtNaN,
)
from normswap.finetune.run.interruption import StoppedError

from ..helpers import exactly
from ..ways_out import WAYS_OUT, an_exception, by_hand, the_end, the_end_of_with
from .loops import batches, network
from .runs import HaltError, coloured
from .runs import quick as finetune

HOOKS = {
    "limits": ("brn", lambda model, original: RenormLimits(model, 10)),
    "gates": ("sn", lambda model, original: GateSchedule(model, 10, freeze=0.5, temperature=(2.0, 0.1))),
    "harden": ("sn", lambda model, original: GateSchedule(model, 10, temperature=(1.0, 0.1), harden=True)),
    "norms alone": ("sn", lambda model, original: Freeze(model, "norm")),
    "the last block": ("sn", lambda model, original: Freeze(model, "last:1")),
    "momentum": ("brn", lambda model, original: Momentum(model, 2)),
    "blend": ("gn", lambda model, original: Blend(model, original, 10)),
    "statistics": ("sn", lambda model, original: Statistics(model, [x for x, _ in batches(1)])),
    "nan": ("gn", lambda model, original: StopAtNaN()),
    "distillation": ("gn", lambda model, original: Distillation(model, original, features=1.0)),
    "several": ("sn", lambda model, original: Hooks(
        GateSchedule(model, 10, freeze=0.5, temperature=(2.0, 0.1)), Freeze(model, "norm"), Momentum(model, 2),
        Blend(model, original, 10), Distillation(model, original, features=1.0),
    )),
}  # fmt: skip


def anatomy(model):
    """What a model is made of beside its numbers: classes, attributes, hooks, overridden methods, what learns."""
    found = {}
    for name, module in model.named_modules():
        plain = {k: v for k, v in module.__dict__.items() if isinstance(v, int | float | str | bool | type(None))}
        counts = {k: len(v) for k, v in module.__dict__.items() if k.endswith("_hooks")}
        found[name] = type(module), sorted(module.__dict__), plain, counts
    for name, parameter in model.named_parameters():
        hooks = parameter._backward_hooks, parameter._post_accumulate_grad_hooks
        found[f"{name}'s"] = parameter.requires_grad, [len(each or ()) for each in hooks]
    return found


@pytest.mark.parametrize("leave", WAYS_OUT)
@pytest.mark.parametrize("name", HOOKS)
def test_every_way_out_leaves_a_plain_model(name, leave, images):
    """Making a hook changes nothing; whichever way it is left, the models are made of what they were made of.

    But at the end, where a hook finishes, the model then computes what it did. The hook can be opened again.
    """
    target, make = HOOKS[name]
    model, original = network(target)
    before = [anatomy(each) for each in (model, original)]
    hook, outputs = make(model, original), []
    assert [anatomy(each) for each in (model, original)] == before
    assert not hook.is_open

    def use():
        for step in range(9):
            hook.on_step(step)
            model(images)
        hook.on_evaluate()
        outputs.append(model(images).detach())
        assert hook.is_open

    for _ in range(2):
        leave(hook, use)

        assert not hook.is_open
        assert [anatomy(each) for each in (model, original)] == before
        if name != "harden" or not leave.__name__.startswith("the_end"):
            torch.testing.assert_close(model(images), outputs[-1], rtol=1e-4, atol=1e-5)


def test_what_the_end_finishes():
    """It hardens gates where it is reached, inside `with` and after it once, and not where an exception came before."""
    for leave, hard in ((the_end, True), (the_end_of_with, True), (an_exception, False), (by_hand, False)):
        model, original = network("sn")
        hook = HOOKS["harden"][1](model, original)
        leave(hook, lambda hook=hook: hook.on_step(0))

        assert bool(model.bn.gates()[0].max() == 1) is hard


class Watched(Hook):
    """A hook that notes what happens to it, and may fail at something."""

    def __init__(self, told, name, fails=""):
        self.told, self.name, self.fails = told, name, fails

    def _note(self, what):
        self.told.append((self.name, what))
        if self.fails == what:
            raise RuntimeError(self.name)

    def change(self, undo):
        """Note the opening, and the closing."""
        undo.callback(self._note, "closed")
        self._note("opened")

    def on_end(self):
        """Note the end."""
        self._note("end")
        super().on_end()


class TestSeveral:
    def test_are_closed_in_reverse(self):
        """The last one opened is closed first."""
        told = []
        with pytest.raises(ZeroDivisionError), Hooks(Watched(told, 1), Watched(told, 2)):
            _ = 1 / 0

        assert told == [(1, "opened"), (2, "opened"), (2, "closed"), (1, "closed")]

    @pytest.mark.parametrize("given", [[StopAtNaN()], None])
    def test_are_given_one_by_one(self, given):
        """A list of them is none."""
        message = f"expected hooks, one by one, received {type(given).__name__}; give several as Hooks(*hooks)"
        with pytest.raises(InputError, match=exactly(message)):
            Hooks(given)

    @pytest.mark.parametrize("fails", ["opened", "end", "closed"])
    def test_are_all_closed_whatever_one_raises(self, fails):
        """Whether it fails to open, to finish or to close."""
        told = []
        hooks = Hooks(Watched(told, 1), Watched(told, 2, fails), Watched(told, 3))
        with pytest.raises(RuntimeError, match="^2$"), hooks:
            pass

        opened = {name for name, what in told if what == "opened"}
        assert {name for name, what in told if what == "closed"} == opened
        assert not any(hook.is_open for hook in (hooks, *hooks.hooks))

    def test_those_opened_one_by_one(self):
        """They are closed with the others."""
        told = []
        hooks = Hooks(Watched(told, 1).open(), Watched(told, 2))
        hooks.close()

        assert told == [(1, "opened"), (1, "closed")]


def test_a_distillation_that_is_not_open(images):
    """Asked for the distance of features it has not listened for, it says how to make it listen."""
    model, original = network("gn")
    distillation = Distillation(model, original, features=1.0)
    message = (
        "expected a distillation with features that was opened before the forward pass, received one that is not open; "
        "make it `with Distillation(...) as distillation:`, or call its open()"
    )
    with pytest.raises(InputError, match=exactly(message)):
        distillation(images, model(images))
    assert torch.isfinite(distillation.open()(images, model(images)))


RUN = {"blend": 1.0, "batch_size": 4, "steps": 6, "checkpoint_every": 3, "stages": "norm=2,all", "teacher": "original"}


class TestRuns:
    @pytest.mark.parametrize(
        ("target", "error"),
        [("gn", StoppedError), ("sn", KeyboardInterrupt), ("brn", HaltError), ("sn", VerificationError)],
    )
    def test_leave_no_hook(self, source, tmp_path, target, error):
        """One that a signal, an exception or a NaN ends leaves the model in memory as it found it, but for numbers."""
        found = bundle.read(source(target))
        before = anatomy(found.model)

        def end(step, figures):
            if step == 4 and error is StoppedError:
                os.kill(os.getpid(), signal.SIGTERM)
            elif step == 4 and error is VerificationError:
                found.model[0].weight.data.fill_(float("nan"))
            elif step == 4:
                raise error

        settings = Settings(**RUN, harden=target == "sn", features=0.1)
        with pytest.raises(error):
            finetune(found, tmp_path / "out", coloured(), settings, on_step=end)

        assert anatomy(found.model) == before

    def test_what_cannot_begin_leaves_none_either(self, source, tmp_path):
        """A stage that the model has not the blocks for is refused before anything changes."""
        found = bundle.read(source("sn"))
        before = anatomy(found.model)
        message = "expected last:N with N up to the model's 3 blocks, received train='last:9'"
        with pytest.raises(InputError, match=exactly(message)):
            finetune(found, tmp_path / "out", coloured(), Settings(steps=2, train="last:9"))

        assert anatomy(found.model) == before

    def test_begin_with_the_new_layers(self, source, tmp_path):
        """Before the first step a blend has no share: the drift of the start is the patched model's."""
        from normswap.finetune.run.journal import read

        finetune(source("gn"), tmp_path / "out", coloured(), Settings(**RUN, early_stop=False))

        assert read(tmp_path / "out/run/metrics.csv")[0]["drift"] > 0
