"""Fine-tune a Keras model with ``fit``, on any backend, under a ``tf.distribute`` strategy where one is active."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import keras
import numpy as np
from keras import ops

from ....data.dataset import Data
from ....errors import InputError, UnsupportedError, VerificationError
from ....frameworks.keras import distinct_layers
from ...hooks.hook import Hook
from ...hooks.keras.inference import inference
from ...hooks.keras.learning import Learning
from ...hooks.scores import scores
from ..loading import StepBatches
from ..rate import Rate
from ..training import DECIDING, SEEDS, Array, OnStep, State, Taken, Training, not_finite
from .average import Average
from .dataset import Batches
from .loss import Criterion, criterion
from .optimizer import optimizer_of
from .precision import Precision
from .processes import synchronized
from .replicas import replicas
from .state import load_state, save_state


def train(
    model: keras.Model,
    data: Data,
    training: Training,
    *,
    teacher: keras.Model | None = None,
    hooks: Sequence[Hook] = (),
    first: int = 0,
    start: int = 0,
    state: State | None = None,
    reductions: Callable[[], int] = int,
    on_step: OnStep | None = None,
) -> None:
    """Train ``model`` in place from step ``start`` to the last of ``training``.

    Without ``teacher`` the loss is the cross-entropy with the labels; with one it is the divergence from it (see
    `Distillation`), no label is used, and the model computes as at inference. Models may return logits or
    probabilities; regularization losses of the model take no part. ``hooks`` are told each step; whoever gives them
    opens and closes them. ``first`` is the step of a longer run that this training's step 0 is, for hooks, the order of
    the data and random numbers. ``reductions`` tells how often the schedule ``"plateau"`` has lowered the rate. After
    each step ``on_step`` is told what was `Taken`; with its state as ``state`` and its step as ``start``, a run goes on
    as if it had not stopped. How ``model`` is compiled stays as it is. SGD's weight decay, which Keras keeps out of the
    momentum, is divided by 1 - momentum to weigh the same.

    In the scope of a ``tf.distribute`` strategy, in which the model has to have been made, each replica takes its share
    of every batch, SN and BRN take their batch statistics over all of them, and gradients are those of the whole batch.

    Raises `VerificationError` if the loss is not finite; the step it came with has changed the model then.
    Raises `InputError` for batches that the replicas cannot share evenly. Raises `UnsupportedError` if nothing in the
    model can be trained, for labels without scores (N, classes), for ``accumulate`` with replicas, and for
    ``precision="fp16"``, which needs a scaled loss.
    """
    if start >= training.steps:
        return
    _check(data, training)
    precision, deciding = Precision(model, training.precision), data.batch(range(min(len(data), DECIDING)))[0]
    batches = StepBatches(data, training, first=first + start, steps=training.steps - start)
    with (
        Learning(model, training.train),
        synchronized(model) if training.sync_statistics else nullcontext(),
        criterion(model, teacher, training, deciding) as loss_of,
    ):
        trainer = _Trainer(model, loss_of, taught=teacher is not None)
        if not trainer.trainable_variables:
            raise UnsupportedError(
                f"expected a model with parameters to train, received none with train={training.train!r}"
            )
        optimizer = optimizer_of(model, training)
        optimizer.build(trainer.trainable_variables)
        average = Average(trainer.trainable_variables, training.ema)
        if state is not None:
            load_state(optimizer, average, state)
        # XLA takes longer to compile such a model than a short run on it lasts; JAX has nothing else.
        trainer.compile(
            optimizer,
            jit_compile="auto" if keras.backend.backend() == "jax" else False,
            metrics=[] if teacher else [_right],
        )
        rate = Rate(training, len(data))
        rate_at = lambda step: rate.at(step, training.lr, reductions())  # noqa: E731
        watch = _Watch(model, training, rate_at, precision, hooks, average, first, start, on_step)
        images = Batches(batches, training.workers)
        try:
            trainer.fit(images, shuffle=False, verbose=0, callbacks=[watch])
        except Exception:
            if images.error is not None:  # which TensorFlow would tell within one of its own
                raise images.error from None
            raise
        finally:
            watch.leave()
            _synchronize(trainer)
        watch.require_finite()


def predict(model: keras.Model, x: Array, batch_size: int = 256) -> Array:
    """Return the model's scores at inference for inputs (N, ...), computed ``batch_size`` at a time."""
    with inference():
        parts = [
            ops.convert_to_numpy(scores(model(ops.convert_to_tensor(x[begin : begin + batch_size]), training=False)))
            for begin in range(0, len(x), batch_size)
        ]
    return np.concatenate(parts)


def _check(data: Data, training: Training) -> None:
    size, count = min(training.batch_size, len(data)), replicas()
    if size % count:
        raise InputError(f"expected batches that {count} replicas share evenly, received one of {size} images")
    if count > 1 and training.accumulate > 1:
        # Keras takes a step in a branch of its own then, in which TensorFlow lets no replica wait for another.
        raise UnsupportedError(
            f"expected accumulate=1 with {count} replicas, received accumulate={training.accumulate}; raise the batch "
            "size instead"
        )


class _Trainer(keras.Model):  # type: ignore[misc]
    """Holds the model while it is trained, so that the model itself need not be compiled.

    The teacher is out of sight within the loss: it is none of the trained layers. A model that is ``taught`` computes
    as at inference, as its teacher does and as it is used later: one that drops units, or sees batches where the other
    sees moving statistics, learns to make up for what it alone is lacking.
    """

    def __init__(self, model: keras.Model, loss: Criterion, *, taught: bool) -> None:
        super().__init__(name="trainer")
        self.model, self._criterion, self._taught = model, loss, taught
        self.built = True

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Return the model's scores."""
        return scores(self.model(inputs, training=training and not self._taught))

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Any:
        """Return the loss of one batch."""
        return self._criterion(x, y, y_pred) / replicas()  # whose gradients are summed


class _Watch(keras.callbacks.Callback):  # type: ignore[misc]
    """Sets rate, limits and random numbers before each step, and looks at its loss after it."""

    def __init__(
        self,
        model: keras.Model,
        training: Training,
        rate_at: Callable[[int], float],
        precision: Precision,
        hooks: Sequence[Hook],
        average: Average,
        first: int,
        start: int,
        on_step: OnStep | None,
    ) -> None:
        super().__init__()
        self._training, self._hooks, self._average = training, hooks, average
        self._first, self._step, self._on_step = first, start, on_step
        self._precision, self._rate_at = precision, rate_at
        self._generators = [
            (i, each) for i, layer in enumerate(distinct_layers(model)) for each in layer._seed_generators
        ]
        self._metrics: list[Any] = []
        self._loss = self._rate = 0.0
        self._parts: list[tuple[float, float]] = []

    def on_train_begin(self, logs: Any = None) -> None:
        """Note what is to be reset, which the model would look for in every layer each time."""
        self._metrics = self.model.metrics

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Prepare the step that this batch is the first of."""
        _synchronize(self.model)
        for metric in self._metrics:
            metric.reset_state()  # or the loss reported would be the mean so far
        training, step = self._training, self._step
        if not self._parts:
            self._rate = self._rate_at(step)
            self.model.optimizer.learning_rate = self._rate
            for hook in self._hooks:
                hook.on_step(self._first + step)
        self._set_seed((self._first + step) * training.accumulate + len(self._parts))
        self._precision.narrow()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Stop at a loss that is not finite; after the last batch of a step, tell of it."""
        self.leave()
        _synchronize(self.model)
        self._parts.append((float(logs["loss"]), 100 * float(logs.get("right", 0.0))))
        if not np.isfinite(self._parts[-1][0]):
            self._loss = self._parts[-1][0]
            self.model.stop_training = True
            return
        if len(self._parts) < self._training.accumulate:
            return
        self._loss, right = (float(mean) for mean in np.mean(self._parts, axis=0))
        self._parts = []
        self._step += 1
        self._average.update()
        if self._on_step is not None:
            optimizer, average = self.model.optimizer, self._average
            taken = Taken(
                self._step,
                self._loss,
                right if "right" in logs else None,
                self._rate,
                lambda: save_state(optimizer, average),
                average.in_place,
            )
            self.model.stop_training = bool(self._on_step(taken))

    def leave(self) -> None:
        """Let the model compute as outside of a training."""
        self._precision.restore()

    def _set_seed(self, batch: int) -> None:
        """Make the random numbers of the model's layers a function of seed and batch alone."""
        seed = self._training.seed
        for index, generator in self._generators:
            drawn = np.random.default_rng([seed, batch, index]).integers(2**32, size=2)
            generator.state.assign(drawn.astype("uint32"))
        if keras.backend.backend() == "torch":  # where dropout draws from the global generator
            import torch

            torch.manual_seed((seed * 1_000_003 + batch) % SEEDS)

    def require_finite(self) -> None:
        """Raise `VerificationError` if the last loss was not finite."""
        if not np.isfinite(self._loss):
            raise VerificationError(not_finite(self._loss, self._first + self._step))


def _synchronize(trainer: keras.Model) -> None:
    """On JAX, write what ``fit`` holds back to the variables, and let it read them anew."""
    if hasattr(trainer, "jax_state_sync"):
        trainer.jax_state_sync()


def _right(labels: Any, scores: Any) -> Any:
    return ops.cast(ops.equal(ops.cast(labels, "int32"), ops.argmax(scores, axis=-1)), "float32")


_right.__name__ = "right"
