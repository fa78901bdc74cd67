"""The hooks in a loop written with Accelerate."""

import accelerate
import pytest
import torch
import torch.nn.functional as F

from normswap.errors import VerificationError
from normswap.finetune import AccelerateCallback, Distillation, Freeze, StopAtNaN

from .loops import (
    HOOKS,
    RUNS,
    STEPS,
    Noting,
    assert_same,
    assert_the_run_by_hand,
    batches,
    by_hand,
    network,
    optimizer_of,
    run_by_hand,
)


def run(model, hooks, accumulate=1, evaluate_after=(), loss_of=None, save=None, resume=None):
    """Train as the class's docstring shows, and return the model; ``save`` is a step and a folder."""
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    callback = AccelerateCallback(accelerator, *hooks)
    loader = torch.utils.data.DataLoader(batches(STEPS * accumulate), collate_fn=lambda one: one[0])
    prepared, optimizer, loader = accelerator.prepare(model, optimizer_of(model), loader)
    if resume:
        accelerator.load_state(resume)
        loader = accelerator.skip_first_batches(loader, callback.step * accumulate)
    prepared.train()
    for x, y in loader:
        with accelerator.accumulate(prepared):
            callback.on_batch_begin()
            output = prepared(x)
            loss = F.cross_entropy(output, y) if loss_of is None else loss_of(x, output)
            callback.on_loss(loss)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            callback.on_batch_end()
        if callback.step in evaluate_after and accelerator.sync_gradients:
            callback.on_evaluate()
        if save and callback.step == save[0]:
            accelerator.save_state(save[1])
            return model
    callback.on_end()
    return model


@pytest.mark.parametrize("target", RUNS)
def test_a_run_is_the_one_by_hand(target):
    """Each hook does in it what it does in a plain loop, evaluations and accumulated gradients included."""
    model, original = network(target)
    run(model, RUNS[target](model, original), 2, evaluate_after=[2])

    assert_the_run_by_hand(model, target, accumulate=2, evaluate_after=[2])


def test_what_hooks_are_told():
    """A step is one of the optimizer, prepared before the first of its batches, and again after an evaluation."""
    noting = Noting()
    run(network("gn")[0], [noting], accumulate=2, evaluate_after=[2])

    losses = [[step, ("loss", step), ("loss", step)] for step in range(STEPS)]
    assert noting.told == [*losses[0], *losses[1], "evaluate", *losses[2], *losses[3], "end"]


def test_a_resumed_run_goes_on(tmp_path):
    """save_state holds the step and the hooks' state."""
    target, make = HOOKS["gates"]
    model, original = network(target)
    run(model, [make(model, original), Noting()], save=(2, tmp_path))
    model, original = network(target)
    noting = Noting()
    run(model, [make(model, original), noting], resume=tmp_path)

    assert noting.told == [("resumed after", 4), 2, ("loss", 2), 3, ("loss", 3), "end"]
    assert_same(model, run_by_hand("gates"))


def test_stops_before_a_step_with_nan():
    """The loss is looked at before its backward pass, so the model stays what it was."""
    model, _ = network("gn")
    with pytest.raises(VerificationError, match="received loss=nan at step=0; lower the learning rate$"):
        run(model, [StopAtNaN()], loss_of=lambda x, output: output.mean() * float("nan"))

    assert_same(model, network("gn")[0])


def test_entered_it_opens_and_closes_the_hooks():
    """An exception leaves no hook in the model, which had them before anything was prepared."""
    model, _ = network("gn")
    callback = AccelerateCallback(accelerate.Accelerator(cpu=True), Freeze(model, "last:1"))
    with pytest.raises(ZeroDivisionError), callback:
        assert [name for name, p in model.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]
        _ = 1 / 0

    assert all(parameter.requires_grad for parameter in model.parameters())


def test_distillation():
    """The loss of the docstring's loop gives the weights it gives by hand."""
    model, original = network("gn")
    with Distillation(model, original, features=0.5) as distillation:
        run(model, [], loss_of=distillation)
    expected, original = network("gn")
    with Distillation(expected, original, features=0.5) as distillation:
        by_hand(expected, [], loss_of=lambda x, y: distillation(x, expected(x)))

    assert_same(model, expected)
