"""Hooks in Keras's ``fit``."""

from types import TracebackType
from typing import Any

import keras

from ..hooks.hook import Hook, Hooks
from ..hooks.keras.tracing import retrace
from .callback import HooksCallback


class KerasCallback(HooksCallback, keras.callbacks.Callback):  # type: ignore[misc]
    """Tell ``hooks`` of the steps of ``fit``, in the order given.

    A step is a batch, or as many as the optimizer accumulates. The first number is the optimizer's count, and goes on
    from there whatever ``train_step`` does: with several optimizers, or none, a later ``fit`` goes on from the last.
    With ``steps_per_execution`` hooks are told of the first step of each execution. The loss is the mean since the
    epoch began, which is NaN from the first NaN on. Hooks are opened when ``fit`` begins, which is late for `Freeze` on
    JAX, and closed when it ends; ``fit`` tells of no exception. Entered, the callback opens them first and closes them
    always::

        with KerasCallback(Freeze(model, "last:2"), StopAtNaN()) as callback:
            model.compile("sgd", "mse")
            model.fit(images, labels, callbacks=[callback])

    Distillation is a loss of the model, and needs no labels::

        class Student(keras.Model):
            def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
                return distillation(x, y_pred)

        with Distillation(model, original, features=0.1) as distillation:
            distillation.decide(images[:8])
            student = Student(model.inputs, model.outputs)  # of the same layers
            student.compile("sgd")
            student.fit(images, images[:, 0], callbacks=[KerasCallback(...)])
    """

    def __init__(self, *hooks: Hook) -> None:
        super().__init__()
        self.hooks = Hooks(*hooks)
        self._step = 0
        self._batches = 0  # that were trained on
        self._begin: int | None = None  # the first of those under way
        self._found: tuple[Any, int] = (None, 0)  # the optimizer, and its count when the last fit began
        self._traced: Any = None  # the model that is compiled with the hooks

    def on_train_begin(self, logs: Any = None) -> None:
        """Open the hooks, and have what ``fit`` compiled before compiled with them."""
        self._begin = None
        self.hooks.open()
        if self.model is not self._traced:
            retrace(self.model)
            self._traced = self.model

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Prepare the step."""
        self._synchronize()
        if self._begin is None:  # not before, since a callback may have loaded an optimizer when fit began
            self._look_at_the_optimizer()
        self._begin = batch
        self._step = self._batches // self._accumulated()
        self.hooks.on_step(self._step)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Count the batches, and look at the loss."""
        self._batches += batch - (batch if self._begin is None else self._begin) + 1
        if logs and "loss" in logs:
            self.hooks.on_loss(self._step, logs["loss"])

    def _look_at_the_optimizer(self) -> None:
        """Take over the optimizer's count where that tells anything."""
        optimizer = self.model.optimizer
        count = 0 if optimizer is None else int(optimizer.iterations)
        if self._found != (optimizer, count):  # else it has not counted what was trained since
            self._batches = count * self._accumulated()
        self._found = optimizer, count

    def _accumulated(self) -> int:
        """Return how many batches make a step."""
        optimizer = self.model.optimizer
        optimizer = getattr(optimizer, "inner_optimizer", optimizer)
        return getattr(optimizer, "gradient_accumulation_steps", None) or 1

    def on_test_begin(self, logs: Any = None) -> None:
        """Prepare an evaluation."""
        self._synchronize()
        self.hooks.on_evaluate()

    def on_train_end(self, logs: Any = None) -> None:
        """Leave a plain model behind."""
        self._synchronize()
        self.hooks.on_end()
        self._forget()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            super().__exit__(kind, error, trace)
        finally:
            self._forget()

    def _forget(self) -> None:
        """Have what is compiled with the hooks compiled without."""
        if self._traced is not None:
            retrace(self._traced)
            self._traced = None

    def _synchronize(self) -> None:
        """On JAX, write what ``fit`` holds back to the variables, and let it read them anew."""
        if hasattr(self.model, "jax_state_sync"):
            self.model.jax_state_sync()
