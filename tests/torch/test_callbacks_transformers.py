"""The hooks in the Hugging Face Trainer."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Trainer, TrainingArguments

from normswap.errors import VerificationError
from normswap.finetune import Distillation, Freeze, StopAtNaN, TransformersCallback

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

SIZE = 4


class Classifier(nn.Module):
    """A network that takes and returns what the Trainer's models do."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, pixel_values, labels=None):
        logits = self.net(pixel_values)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits} if labels is not None else {"logits": logits}


class InOrder(Trainer):
    """A Trainer that leaves the samples in their order, for a run to be compared with."""

    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def run(folder, model, hooks, accumulate=1, evaluate=False, trainer=InOrder, resume=None, **options):
    """Train a network and return its trainer."""
    data = [
        {"pixel_values": image, "labels": label}
        for x, y in batches(STEPS * accumulate, SIZE)
        for image, label in zip(x, y, strict=True)
    ]
    options = {"save_strategy": "no", "max_steps": STEPS, **options}
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=SIZE,
        gradient_accumulation_steps=accumulate,
        eval_strategy="steps" if evaluate else "no",
        eval_steps=2,
        max_grad_norm=0,
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    wrapped = model if isinstance(model, Classifier) else Classifier(model)
    made = trainer(
        wrapped,
        arguments,
        train_dataset=data,
        eval_dataset=data[:2],
        optimizers=(optimizer_of(wrapped), None),
        callbacks=[TransformersCallback(*hooks) if isinstance(hooks, list) else hooks],
    )
    made.train(resume_from_checkpoint=resume)
    return made


@pytest.mark.parametrize("target", RUNS)
def test_a_run_is_the_one_by_hand(target, tmp_path):
    """Each hook does in it what it does in a plain loop, evaluations and accumulated gradients included."""
    model, original = network(target)
    run(tmp_path, model, RUNS[target](model, original), 2, evaluate=True)

    assert_the_run_by_hand(model, target, accumulate=2, evaluate_after=[2, 4])


def test_what_hooks_are_told(tmp_path):
    """A step is one of the optimizer; evaluations are prepared before they begin; losses are those that are logged."""
    noting, evaluated = Noting(), []

    class Watched(InOrder):
        def evaluate(self, *args, **kwargs):
            evaluated.append(list(noting.told))
            return super().evaluate(*args, **kwargs)

    run(tmp_path, network("gn")[0], [noting], 2, evaluate=True, trainer=Watched, logging_steps=1)

    expected = [0, ("loss", 0), 1, "evaluate", ("loss", 1), 2, ("loss", 2), 3, "evaluate", ("loss", 3), "end"]
    assert noting.told == expected
    assert ["evaluate" in told for told in evaluated] == [True, True]


@pytest.mark.parametrize("restore", [False, True])
def test_a_resumed_run_goes_on(restore, tmp_path):
    """A checkpoint holds the hooks' state, whether or not the Trainer makes the callbacks it knows anew."""
    target, make = HOOKS["blend"]
    model, original = network(target)
    run(tmp_path, model, [make(model, original), Noting()], save_strategy="steps", save_steps=2)
    model, original = network(target)
    noting, checkpoint = Noting(), str(tmp_path / "checkpoint-2")
    resumed = [make(model, original), noting]
    run(tmp_path / "2", model, resumed, resume=checkpoint, restore_callback_states_from_checkpoint=restore)

    assert noting.told == [("resumed after", 2), 2, 3, "end"]
    assert_same(model, run_by_hand("blend"))


def test_stops_at_nan(tmp_path):
    """With every loss logged as it is, a NaN ends the run."""

    class NaN(InOrder):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return model(inputs["pixel_values"])["logits"].mean() * float("nan")

    with pytest.raises(VerificationError, match="received loss=nan at step=0; lower the learning rate$"):
        run(tmp_path, network("gn")[0], [StopAtNaN()], trainer=NaN, logging_steps=1, logging_nan_inf_filter=False)


def test_opens_before_the_optimizer_and_closes_with_it(tmp_path):
    """A Trainer made with the callback makes an optimizer of what learns; `with` closes the hooks when it fails."""
    model, _ = network("gn")
    learning = []

    class Failing(InOrder):
        def __init__(self, *args, optimizers, **kwargs):
            super().__init__(*args, **kwargs)

        def compute_loss(self, *args, **kwargs):
            learning.append(sum(len(group["params"]) for group in self.optimizer.param_groups))
            raise ZeroDivisionError

    callback = TransformersCallback(Freeze(model, "last:1"))
    with pytest.raises(ZeroDivisionError), callback:
        run(tmp_path, model, callback, trainer=Failing)

    assert learning == [2]
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_distillation(tmp_path):
    """The loss of the docstring's Trainer gives the weights it gives by hand."""
    net, teacher = network("gn")
    model, original = Classifier(net), Classifier(teacher)
    with Distillation(model, original, features=0.5) as distillation:

        class Distilled(InOrder):
            def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
                output = model(**inputs)
                loss = distillation({"pixel_values": inputs["pixel_values"]}, output)
                return (loss, output) if return_outputs else loss

        run(tmp_path, model, [], trainer=Distilled)
    expected, teacher = network("gn")
    with Distillation(expected, teacher, features=0.5) as distillation:
        by_hand(expected, [], loss_of=lambda x, y: distillation(x, expected(x)))

    assert_same(net, expected)
