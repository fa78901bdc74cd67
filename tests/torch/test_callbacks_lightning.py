"""The hooks in Lightning's Trainer."""

import copy
import warnings

import lightning
import pytest
import torch
import torch.nn.functional as F

from normswap.errors import VerificationError
from normswap.finetune import Distillation, Freeze, LightningCallback, StopAtNaN

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


class Module(lightning.LightningModule):
    """A classifier trained on labels, or as the class's docstring shows."""

    def __init__(self, net, distillation=None):
        super().__init__()
        self.net, self.distillation = net, distillation

    def training_step(self, batch, index):
        x, y = batch
        output = self.net(x)
        return F.cross_entropy(output, y) if self.distillation is None else self.distillation(x, output)

    def validation_step(self, batch, index):
        self.net(batch[0])

    def configure_optimizers(self):
        return optimizer_of(self.net)


def run(model, hooks, accumulate=1, evaluate=False, module=None, resume=None, steps=STEPS, data=None, **options):
    """Train and return the trainer."""
    model.train()  # Lightning leaves the mode as it is
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, **options}
    trainer = lightning.Trainer(
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        callbacks=[LightningCallback(*hooks)],
        enable_progress_bar=False,
        enable_model_summary=False,
        val_check_interval=2 * accumulate if evaluate else None,
        **options,
    )
    loader = torch.utils.data.DataLoader(data or batches(STEPS * accumulate), batch_size=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of workers and cores
        trainer.fit(module or Module(model), loader, loader if evaluate else None, ckpt_path=resume)
    return trainer


@pytest.mark.parametrize("target", RUNS)
def test_a_run_is_the_one_by_hand(target):
    """Each hook does in it what it does in a plain loop, evaluations and accumulated gradients included."""
    model, original = network(target)
    run(model, RUNS[target](model, original), 2, evaluate=True)

    assert_the_run_by_hand(model, target, accumulate=2, evaluate_after=[2, 4])


def test_what_hooks_are_told():
    """A step is one of the optimizer, and prepared again after an evaluation; the trial before training is none."""
    noting = Noting()
    run(network("gn")[0], [noting], accumulate=2, evaluate=True)

    losses = [[step, ("loss", step), ("loss", step)] for step in range(STEPS)]
    assert noting.told == [*losses[0], *losses[1], "evaluate", *losses[2], *losses[3], "evaluate", "end"]


def test_a_resumed_run_goes_on(tmp_path):
    """A checkpoint holds the hooks' state, and the step is the trainer's."""
    data = batches(1) * STEPS  # all the same, since Lightning begins the data anew
    target, make = HOOKS["gates"]
    model, original = network(target)
    hook = make(model, original)
    # The first part ends without an end of the hooks, as one that is killed does.
    hook.on_end = lambda: None
    trainer = run(model, [hook, Noting()], steps=2, data=data, enable_checkpointing=True, default_root_dir=tmp_path)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    model, original = network(target)
    noting = Noting()
    run(model, [make(model, original), noting], resume=tmp_path / "half.ckpt", data=data, default_root_dir=tmp_path)

    assert noting.told == [("resumed after", 5), 2, ("loss", 2), 3, ("loss", 3), "end"]
    assert_same(model, run_by_hand("gates", data=data))


def test_stops_before_a_step_with_nan():
    """The loss is looked at before its backward pass, so the model stays what it was."""
    model, _ = network("gn")
    module = Module(model, lambda x, output: output.mean() * float("nan"))
    with pytest.raises(VerificationError, match="received loss=nan at step=0; lower the learning rate$"):
        run(model, [StopAtNaN()], module=module)

    assert_same(model, network("gn")[0])


def test_opens_before_the_optimizer_and_closes_at_an_exception():
    """What learns is settled when the optimizer is made, and a training that fails leaves no hook in the model."""
    model, _ = network("gn")
    learning = []

    class Failing(Module):
        def configure_optimizers(self):
            learning.append([name for name, p in self.net.named_parameters() if p.requires_grad])
            return super().configure_optimizers()

        def training_step(self, batch, index):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(model, [Freeze(model, "last:1")], module=Failing(model))

    assert learning == [["head.weight", "head.bias"]]
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_distillation():
    """The loss of the docstring's module gives the weights it gives by hand, and no saved weight is the teacher's."""
    model, original = network("gn")
    with Distillation(model, original, features=0.5) as distillation:
        module = Module(model, distillation)
        run(model, [], module=module)
    expected, teacher = network("gn")
    with Distillation(expected, teacher, features=0.5) as distillation:
        by_hand(expected, [], loss_of=lambda x, y: distillation(x, expected(x)))

    assert_same(model, expected)
    assert {name.partition(".")[0] for name in module.state_dict()} == {"net"}
    assert copy.deepcopy(original).state_dict().keys() == teacher.state_dict().keys()
