"""Hooks in a loop written with Accelerate."""

from typing import Any

from ..hooks.hook import Hook, Hooks
from .callback import HooksCallback


class AccelerateCallback(HooksCallback):
    """Count the optimizer's steps of a loop written with Accelerate and tell ``hooks`` of them, in the order given.

    The accelerator's ``save_state`` and ``load_state`` hold the count and the hooks' state. Hooks take the model before
    ``prepare`` wraps it, and are opened where the callback is entered, or else by the first batch. Distillation is the
    loop's loss, and one of the hooks::

        distillation = Distillation(model, original.to(accelerator.device), features=0.1)
        with AccelerateCallback(accelerator, GateSchedule(model, 1000, freeze=100), StopAtNaN(), distillation) as hooks:
            optimizer = torch.optim.SGD(model.parameters(), 0.01)
            model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
            for x, _ in loader:
                with accelerator.accumulate(model):
                    hooks.on_batch_begin()
                    loss = distillation(x, model(x))
                    hooks.on_loss(loss)
                    accelerator.backward(loss)
                    optimizer.step()
                    optimizer.zero_grad()
                    hooks.on_batch_end()

    Call ``on_evaluate()`` before an evaluation, and without ``with`` ``on_end()`` in the end.
    """

    def __init__(self, accelerator: Any, *hooks: Hook) -> None:
        self.accelerator, self.hooks = accelerator, Hooks(*hooks)
        self.step = 0
        accelerator.register_for_checkpointing(self)

    def on_batch_begin(self) -> None:
        """Prepare the step, before the first of the batches that are accumulated for it."""
        self.hooks.on_step(self.step)

    def on_loss(self, loss: Any) -> None:
        """Look at the loss; before the backward pass, a step with a NaN is not taken."""
        self.hooks.on_loss(self.step, loss)

    def on_batch_end(self) -> None:
        """Count a step that has been taken."""
        self.step += bool(self.accelerator.sync_gradients)

    def on_evaluate(self) -> None:
        """Prepare an evaluation."""
        self.hooks.on_evaluate()

    def on_end(self) -> None:
        """Leave a plain model behind."""
        self.hooks.on_end()

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps taken, and the hooks' state."""
        return {"step": self.step, **self.hooks.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.step = state["step"]
        self.hooks.load_state_dict(state)
