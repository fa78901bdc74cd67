"""Hooks in Keras's ``fit``."""

from typing import Any

import keras

from ..hooks.hook import Hook, Hooks


class NormswapCallback(keras.callbacks.Callback):  # type: ignore[misc]
    """Tell ``hooks`` of the steps of ``fit``, in the order given; a step is one of the optimizer, whose count it is.

    With ``steps_per_execution`` hooks are told of the first step of each execution. The loss is the mean since the
    epoch began, which is NaN from the first NaN on. Make the hooks before ``fit``. Distillation is a loss of the model,
    and needs no labels::

        class Student(keras.Model):  # with distillation = Distillation(model, original)
            def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
                return distillation(x, y_pred)

        student = Student(model.inputs, model.outputs)  # of the same layers
        student.compile("sgd")
        student.fit(images, images[:, 0], callbacks=[NormswapCallback(...)])
    """

    def __init__(self, *hooks: Hook) -> None:
        super().__init__()
        self.hooks = Hooks(*hooks)
        self._step = 0

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Prepare the step."""
        self._synchronize()
        self._step = int(self.model.optimizer.iterations)
        self.hooks.on_step(self._step)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Look at the loss."""
        if logs and "loss" in logs:
            self.hooks.on_loss(self._step, logs["loss"])

    def on_test_begin(self, logs: Any = None) -> None:
        """Prepare an evaluation."""
        self._synchronize()
        self.hooks.on_evaluate()

    def on_train_end(self, logs: Any = None) -> None:
        """Leave a plain model behind."""
        self._synchronize()
        self.hooks.on_end()

    def _synchronize(self) -> None:
        """On JAX, write what ``fit`` holds back to the variables, and let it read them anew."""
        if hasattr(self.model, "jax_state_sync"):
            self.model.jax_state_sync()
