"""Hooks in Lightning's Trainer."""

from typing import Any

import lightning

from ..hooks.hook import Hook, Hooks
from .callback import HooksCallback


class LightningCallback(HooksCallback, lightning.Callback):
    """Tell ``hooks`` of the steps of a Lightning `Trainer`, in the order given; a step is one of the optimizer.

    Losses are seen before their backward pass, divided by the number of batches that are accumulated, so a step with a
    NaN is not taken. Hooks take the network before it is compiled; they are opened before ``configure_optimizers``, and
    closed when the training ends or fails::

        trainer = lightning.Trainer(max_steps=1000, callbacks=[LightningCallback(Freeze(net, "last:2"), StopAtNaN())])

    Distillation is the step of the module, and with ``features`` one of the hooks::

        def training_step(self, batch, index):  # with self.distillation = Distillation(self.net, original)
            return self.distillation(batch[0], self.net(batch[0]))

    `Distillation` is no module: the original stays out of the saved weights, and has to be moved to the device.
    """

    def __init__(self, *hooks: Hook) -> None:
        self.hooks = Hooks(*hooks)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Open the hooks before a training's optimizers are made."""
        if stage == "fit":
            self.hooks.open()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Prepare the step."""
        self.hooks.on_step(trainer.global_step)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Any) -> None:
        """Look at the loss."""
        self.hooks.on_loss(trainer.global_step, loss)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Prepare the evaluation, but for the one before training that only looks whether it runs."""
        if not trainer.sanity_checking:
            self.hooks.on_evaluate()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Leave a plain model behind."""
        self.hooks.on_end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Close the hooks."""
        self.hooks.close()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Close the hooks where a training ended before its end."""
        if stage == "fit":
            self.hooks.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the hooks' state."""
        return self.hooks.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it."""
        self.hooks.load_state_dict(state_dict)
