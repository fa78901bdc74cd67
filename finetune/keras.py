"""Fine-tune a Keras model with ``fit``, on any backend."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import keras
import numpy as np
from keras import ops
from numpy.typing import NDArray

from ..errors import UnsupportedError, VerificationError
from ..layers.keras import BatchRenormalization, SwitchNormalization
from ..patchers.keras_walk import distinct_layers
from ..sources.data import Data
from .batches import batch_indices
from .hooks import RenormLimits
from .schedules import learning_rate

Array = NDArray[Any]
OnStep = Callable[[int, float, Callable[[], dict[str, Array]]], None]

NORMS = (
    keras.layers.BatchNormalization,
    keras.layers.GroupNormalization,
    keras.layers.LayerNormalization,
    keras.layers.RMSNormalization,
    BatchRenormalization,
    SwitchNormalization,
)
MAX_GRADIENT_NORM = 1.0

_LEAST_PROBABILITY = 1e-30


def train(
    model: keras.Model,
    data: Data,
    *,
    steps: int,
    batch_size: int,
    lr: float,
    teacher: keras.Model | None = None,
    train: Literal["all", "norm"] = "all",
    temperature: float = 2.0,
    schedule: RenormLimits | None = None,
    seed: int = 0,
    state: Mapping[str, Array] | None = None,
    start: int = 0,
    on_step: OnStep | None = None,
) -> None:
    """Train ``model`` in place from step ``start`` to ``steps``, by SGD with momentum 0.9 and a cosine rate.

    Without ``teacher`` the loss is the cross-entropy with the labels; with one it is
    T²·KL(teacher || student) of the scores softened by ``temperature`` T (Hinton et al., "Distilling the Knowledge
    in a Neural Network", section 2), and no label is used. Models may return logits or probabilities; regularization
    losses of the model take no part. ``train="norm"`` leaves all but the normalization layers' parameters alone.
    After each step ``on_step`` receives the number of steps taken, the loss and a function that returns the
    optimizer's state; with that as ``state`` and the step as ``start``, a run goes on as if it had not stopped: order
    of the data, rates and random numbers depend on ``seed`` and the step alone. How ``model`` is compiled stays as
    it is.

    Raises `VerificationError` if the loss is not finite; the model is then as it was before that step.
    Raises `UnsupportedError` if nothing in the model can be trained.
    """
    if start >= steps:
        return
    images, _ = data.batch(batch_indices(len(data), batch_size, start, seed))
    loss = _Loss(
        _logits_of(model, images),
        teacher,
        None if teacher is None else _logits_of(teacher, images),
        temperature,
    )
    with _trainable(model, train):
        trainer = _Trainer(model, loss)
        if not trainer.trainable_variables:
            raise UnsupportedError(f"expected a model with parameters to train, received none with train={train!r}")
        optimizer = keras.optimizers.SGD(lr, momentum=0.9, global_clipnorm=MAX_GRADIENT_NORM)
        optimizer.build(trainer.trainable_variables)
        if state is not None:
            _load_state(optimizer, state)
        # XLA takes longer to compile such a model than a short run on it lasts; JAX has nothing else.
        trainer.compile(optimizer, jit_compile="auto" if keras.backend.backend() == "jax" else False)
        watch = _Watch(model, steps, lr, schedule, seed, start, on_step)
        try:
            trainer.fit(_Batches(data, batch_size, start, steps, seed), shuffle=False, verbose=0, callbacks=[watch])
        finally:
            _synchronize(trainer)
        watch.require_finite()


def predict(model: keras.Model, x: Array, batch_size: int = 256) -> Array:
    """Return the model's output at inference for inputs (N, ...), computed ``batch_size`` at a time."""
    with _without_gradients():
        parts = [
            ops.convert_to_numpy(model(ops.convert_to_tensor(x[begin : begin + batch_size]), training=False))
            for begin in range(0, len(x), batch_size)
        ]
    return np.concatenate(parts)


def layers(model: keras.Model) -> Iterator[keras.Layer]:
    """Yield ``model`` and every layer below it once."""
    return iter(distinct_layers(model))


class _Loss:
    """Cross-entropy with labels, or the divergence from a teacher."""

    def __init__(
        self,
        logits: Callable[[Any], Any],
        teacher: keras.Model | None,
        teacher_logits: Callable[[Any], Any] | None,
        temperature: float,
    ) -> None:
        self._logits, self._teacher, self._teacher_logits = logits, teacher, teacher_logits
        self._temperature = temperature

    def __call__(self, x: Any, labels: Any, scores: Any) -> Any:
        """Return the mean loss over the batch."""
        student = self._logits(scores)
        if self._teacher is None or self._teacher_logits is None:
            return ops.mean(keras.losses.sparse_categorical_crossentropy(labels, student, from_logits=True))
        wanted = ops.stop_gradient(self._teacher_logits(self._teacher(x, training=False)))
        wanted, student = (ops.log_softmax(each / self._temperature) for each in (wanted, student))
        divergence = ops.sum(ops.exp(wanted) * (wanted - student), axis=-1)
        return ops.mean(divergence) * self._temperature**2


class _Trainer(keras.Model):  # type: ignore[misc]
    """Holds the model while it is trained, so that the model itself need not be compiled.

    The teacher is out of sight within the loss: it is none of the trained layers.
    """

    def __init__(self, model: keras.Model, loss: _Loss) -> None:
        super().__init__(name="trainer")
        self.model, self._training_loss = model, loss
        self.built = True

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Return the model's output."""
        return self.model(inputs, training=training)

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Any:
        """Return the loss of one batch."""
        return self._training_loss(x, y, y_pred)


class _Batches(keras.utils.PyDataset):  # type: ignore[misc]
    """The batches of the steps from ``start`` on."""

    def __init__(self, data: Data, batch_size: int, start: int, steps: int, seed: int) -> None:
        super().__init__()
        self._data, self._batch_size, self._seed = data, batch_size, seed
        self._start, self._steps = start, steps

    def __len__(self) -> int:
        return self._steps - self._start

    def __getitem__(self, index: int) -> tuple[Array, Array]:
        return self._data.batch(batch_indices(len(self._data), self._batch_size, self._start + index, self._seed))


class _Watch(keras.callbacks.Callback):  # type: ignore[misc]
    """Sets rate, limits and random numbers before each step, and looks at its loss after it."""

    def __init__(
        self,
        model: keras.Model,
        steps: int,
        lr: float,
        schedule: RenormLimits | None,
        seed: int,
        start: int,
        on_step: OnStep | None,
    ) -> None:
        super().__init__()
        self._trained, self._steps, self._lr, self._schedule = model, steps, lr, schedule
        self._seed, self._step, self._on_step = seed, start, on_step
        self._loss = 0.0
        self._before: list[Array] = []

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Prepare the step, and keep what it will change."""
        _synchronize(self.model)
        self.model.reset_metrics()  # or the loss reported would be the mean so far
        self.model.optimizer.learning_rate = learning_rate(self._step, self._steps, self._lr)
        if self._schedule is not None:
            self._schedule.on_step(self._step)
        _set_seed(self._trained, self._seed, self._step)
        self._before = [_copied(weight) for weight in self._trained.weights]

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Stop at a loss that is not finite, else tell of the step."""
        _synchronize(self.model)
        self._loss = float(logs["loss"])
        if not np.isfinite(self._loss):
            self._trained.set_weights(self._before)
            self.model.stop_training = True
            return
        self._step += 1
        if self._on_step is not None:
            optimizer = self.model.optimizer
            self._on_step(self._step, self._loss, lambda: _save_state(optimizer))

    def require_finite(self) -> None:
        """Raise `VerificationError` if the last loss was not finite."""
        if not np.isfinite(self._loss):
            raise VerificationError(
                f"expected a finite loss, received loss={self._loss} at step={self._step}; lower --lr"
            )


@contextmanager
def _trainable(model: keras.Model, which: Literal["all", "norm"]) -> Iterator[None]:
    """Let only the chosen variables learn, those that are frozen already never; restore the flags afterwards."""
    flags = [(variable, variable.trainable) for variable in model.trainable_variables]
    if which == "norm":
        norms = {id(v) for layer in layers(model) if isinstance(layer, NORMS) for v in layer.trainable_variables}
        for variable, _ in flags:
            variable.trainable = id(variable) in norms
    try:
        yield
    finally:
        for variable, flag in flags:
            variable.trainable = flag


def _logits_of(model: keras.Model, x: Array) -> Callable[[Any], Any]:
    """Return what makes logits of the model's output, which may be probabilities.

    The logarithm of a softmax is its logits but for a constant, which neither loss nor temperature sees.
    """
    scores = predict(model, x).astype(np.float64)
    if (scores >= 0).all() and np.allclose(scores.sum(axis=-1), 1, atol=1e-3):
        return lambda scores: ops.log(ops.maximum(ops.cast(scores, "float32"), _LEAST_PROBABILITY))
    return lambda scores: ops.cast(scores, "float32")


def _synchronize(trainer: keras.Model) -> None:
    """On JAX, write what ``fit`` holds back to the variables, and let it read them anew."""
    if hasattr(trainer, "jax_state_sync"):
        trainer.jax_state_sync()


def _set_seed(model: keras.Model, seed: int, step: int) -> None:
    """Make the random numbers of ``model``'s layers a function of seed and step alone."""
    for index, layer in enumerate(layers(model)):
        for generator in layer._seed_generators:
            drawn = np.random.default_rng([seed, step, index]).integers(2**32, size=2)
            generator.state.assign(drawn.astype("uint32"))
    if keras.backend.backend() == "torch":  # where dropout draws from the global generator
        import torch

        torch.manual_seed(seed * 1_000_003 + step)


def _without_gradients() -> Any:
    if keras.backend.backend() == "torch":
        import torch

        return torch.no_grad()
    return nullcontext()


def _save_state(optimizer: Any) -> dict[str, Array]:
    return {str(index): _copied(variable) for index, variable in enumerate(optimizer.variables)}


def _load_state(optimizer: Any, state: Mapping[str, Array]) -> None:
    for index, variable in enumerate(optimizer.variables):
        variable.assign(state[str(index)])


def _copied(variable: Any) -> Array:
    """Return the value of a variable, which on the torch backend would go on changing."""
    return np.array(ops.convert_to_numpy(variable))
