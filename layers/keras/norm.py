"""What Switchable Normalization and Batch Renormalization share: variables, checks and moving statistics."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any, ClassVar

import keras
import numpy as np
from keras import ops

from .statistics import Mean, averaging, kept, wide

_MODULES: dict[str, ModuleType] = {
    "initializer": keras.initializers,
    "regularizer": keras.regularizers,
    "constraint": keras.constraints,
}


class MovingNorm(keras.Layer):  # type: ignore[misc]
    """A per-channel affine normalization with moving statistics, for input of any rank from 2 on.

    As in `keras.layers.BatchNormalization`, ``axis`` holds the channels, ``momentum`` is the weight of the
    old moving value, variances are biased, and ``trainable=False`` means inference mode. Variables have the
    dtype policy's variable dtype. With ``synchronized=True`` the batch statistics are those of all replicas of a
    TensorFlow distribution strategy. ``weights`` are initial values of all that a layer has of γ, β, the gates and the
    moving statistics, in this order, in place of initializers, as layers of Keras 1 and 2 took them.
    """

    settings: ClassVar[tuple[str, ...]] = ("axis", "momentum", "epsilon", "center", "scale", "synchronized")
    objects: ClassVar[tuple[str, ...]] = (
        "gamma_initializer",
        "beta_initializer",
        "moving_mean_initializer",
        "moving_variance_initializer",
        "gamma_regularizer",
        "beta_regularizer",
        "gamma_constraint",
        "beta_constraint",
    )

    def __init__(
        self,
        axis: int = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        *,
        gamma_initializer: Any = "ones",
        beta_initializer: Any = "zeros",
        moving_mean_initializer: Any = "zeros",
        moving_variance_initializer: Any = "ones",
        gamma_regularizer: Any = None,
        beta_regularizer: Any = None,
        gamma_constraint: Any = None,
        beta_constraint: Any = None,
        synchronized: bool = False,
        **kwargs: Any,
    ) -> None:
        weights = kwargs.pop("weights", None)  # no argument, since no configuration has it
        super().__init__(**kwargs)
        if isinstance(axis, bool) or not isinstance(axis, int):
            raise ValueError(f"expected `axis` to be one integer, received axis={axis!r}")
        if not 0 <= momentum <= 1:
            raise ValueError(f"expected `momentum` between 0 and 1, received momentum={momentum}")
        if isinstance(epsilon, bool) or not epsilon > 0:
            raise ValueError(f"expected `epsilon` above 0, received epsilon={epsilon}")
        if synchronized and keras.backend.backend() != "tensorflow":
            # As keras.layers.BatchNormalization says it.
            raise ValueError("Argument synchronized=True is only supported with the TensorFlow backend.")
        self.axis = axis
        self.momentum = float(momentum)
        self.epsilon = float(epsilon)
        self.center = center
        self.scale = scale
        self.synchronized = synchronized
        self._set_objects(
            gamma_initializer=gamma_initializer,
            beta_initializer=beta_initializer,
            moving_mean_initializer=moving_mean_initializer,
            moving_variance_initializer=moving_variance_initializer,
            gamma_regularizer=gamma_regularizer,
            beta_regularizer=beta_regularizer,
            gamma_constraint=gamma_constraint,
            beta_constraint=beta_constraint,
        )
        self._initial = None if weights is None else [np.asarray(array) for array in weights]
        self.supports_masking = True
        self.gamma: Any = None
        self.beta: Any = None
        self.moving_mean: Any = None
        self.moving_variance: Any = None

    def _set_objects(self, **objects: Any) -> None:
        for name, value in objects.items():
            setattr(self, name, _module(name).get(value))

    def _add_trainable(self, name: str, size: int) -> Any:
        return self.add_weight(
            name=name,
            shape=(size,),
            initializer=self._initializer(name),
            regularizer=getattr(self, f"{name}_regularizer"),
            constraint=getattr(self, f"{name}_constraint"),
            autocast=False,
        )

    def _add_moving(self, name: str, size: int) -> Any:
        initializer = self._initializer(name)
        return self.add_weight(name=name, shape=(size,), initializer=initializer, trainable=False, autocast=False)

    def _initializer(self, name: str) -> Any:
        """Return what a variable starts with: the array given as one of ``weights``, or its initializer's values."""
        if self._initial is None:
            return getattr(self, f"{name}_initializer")
        without = {"gamma": not self.scale, "beta": not self.center}
        names = [part for part in self._parts() if not without.get(part)]
        if len(self._initial) != len(names):
            raise ValueError(f"expected `weights` as {', '.join(names)}, received {len(self._initial)} arrays")
        array = self._initial[names.index(name)]

        def start(shape: Any, dtype: Any = None) -> Any:
            if array.shape != tuple(shape):
                raise ValueError(
                    f"expected `weights` with {name} of shape={tuple(shape)}, received shape={array.shape}"
                )
            return ops.convert_to_tensor(array, dtype)

        return start

    def _parts(self) -> tuple[str, ...]:
        """Return the names of what is trained or moved."""
        return "gamma", "beta", "moving_mean", "moving_variance"

    def _add_affine(self, channels: int) -> None:
        if self.scale:
            self.gamma = self._add_trainable("gamma", channels)
        if self.center:
            self.beta = self._add_trainable("beta", channels)

    def _add_statistics(self, channels: int) -> None:
        self.moving_mean = self._add_moving("moving_mean", channels)
        self.moving_variance = self._add_moving("moving_variance", channels)

    def _add_constant(self, name: str, value: float, **kwargs: Any) -> Any:
        initializer = keras.initializers.Constant(value)
        return self.add_weight(name=name, shape=(), initializer=initializer, trainable=False, autocast=False, **kwargs)

    def _channels(self, shape: Any) -> int:
        """Return the channel count of an input shape and expect it of every input from here on."""
        rank, shown = len(shape), tuple(shape)
        if rank < 2:
            raise ValueError(f"expected input of rank 2 or more, received shape={shown}")
        if not -rank <= self.axis < rank or self.axis % rank == 0:
            raise ValueError(f"expected `axis` to be a channel axis of shape={shown}, received axis={self.axis}")
        channels = shape[self.axis]
        if channels is None:
            raise ValueError(f"expected a known size along axis={self.axis}, received shape={shown}")
        self.input_spec = keras.InputSpec(ndim=rank, axes={self.axis % rank: channels})
        return int(channels)

    def _checked(self, inputs: Any) -> Any:
        """Return ``inputs`` wide enough for statistics."""
        dtype = keras.backend.standardize_dtype(inputs.dtype)
        if not keras.backend.is_float_dtype(dtype):
            raise TypeError(f"expected floating-point input to {self.name}, received dtype={dtype}; cast it first")
        return wide(inputs)

    def _batch_average(self, x: Any, axes: Sequence[int], channel: int, mask: Any) -> Mean:
        """Return the average over ``axes`` of what ``mask`` keeps of the batch, on all replicas if synchronized."""
        return averaging(axes, None if mask is None else kept(mask, x, channel), self.synchronized)

    def _move(self, variable: Any, value: Any) -> None:
        """Move a moving statistic of shape (C,) towards ``value`` of any shape with C elements."""
        new = ops.cast(ops.reshape(ops.stop_gradient(value), variable.shape), variable.dtype)
        variable.assign(variable * self.momentum + new * (1.0 - self.momentum))

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Return the input's shape."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments as plain data."""
        plain = {name: getattr(self, name) for name in self.settings}
        objects = {name: _module(name).serialize(getattr(self, name)) for name in self.objects}
        return {**super().get_config(), **plain, **objects}


def _module(name: str) -> ModuleType:
    return _MODULES[name.rpartition("_")[2]]
