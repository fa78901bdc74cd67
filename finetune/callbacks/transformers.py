"""Hooks in the Hugging Face Trainer."""

from typing import Any

from transformers import TrainerCallback

from ..hooks.hook import Hook, Hooks
from .callback import HooksCallback

STATE = "normswap"


class TransformersCallback(HooksCallback, TrainerCallback):
    """Tell ``hooks`` of the steps of a Hugging Face `Trainer`, in the order given; a step is one of the optimizer.

    Evaluations that the Trainer makes while it trains are prepared; before one of your own call
    ``callback.hooks.on_evaluate()``. A callback is shown no losses but the logged ones, of which the Trainer leaves
    NaNs out: `StopAtNaN` needs ``logging_steps=1, logging_nan_inf_filter=False``. Hooks take the model before it is
    compiled. They are opened when a Trainer is made with the callback, or else when a training begins, and closed when
    it ends; the Trainer tells of no exception, which needs the callback entered::

        callback = TransformersCallback(GateSchedule(model, 1000, freeze=100))
        with callback:
            Trainer(model, arguments, train_dataset=dataset, callbacks=[callback]).train()

    Their state is in ``trainer_state.json``, not as an `ExportableState`, which a resumed Trainer would make
    anew without its hooks. Distillation is the Trainer's loss, needs no labels, and with ``features`` is one of the
    hooks::

        class Distilled(Trainer):  # with distillation = Distillation(model, original)
            def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
                output = model(**inputs)
                loss = distillation({"pixel_values": inputs["pixel_values"]}, output)
                return (loss, output) if return_outputs else loss
    """

    def __init__(self, *hooks: Hook) -> None:
        self.hooks = Hooks(*hooks)

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the hooks before the optimizer is made."""
        self.hooks.open()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the hooks, and restore the state of a run that goes on."""
        self.hooks.open()
        if STATE in state.stateful_callbacks:
            self.hooks.load_state_dict(state.stateful_callbacks[STATE])

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Prepare the step."""
        self.hooks.on_step(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Prepare an evaluation that is due, and leave the state where the Trainer saves it."""
        state.stateful_callbacks[STATE] = self.hooks.state_dict()
        if control.should_evaluate:
            self.hooks.on_evaluate()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Prepare an evaluation that is due."""
        if control.should_evaluate:
            self.hooks.on_evaluate()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Look at the loss."""
        if logs is not None and "loss" in logs:
            self.hooks.on_loss(state.global_step - 1, logs["loss"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave a plain model behind."""
        self.hooks.on_end()
