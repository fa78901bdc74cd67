"""What Switchable Normalization and Batch Renormalization share: variables, checks and moving statistics."""

from types import ModuleType
from typing import Any, ClassVar

import keras
from keras import ops

_MODULES: dict[str, ModuleType] = {
    "initializer": keras.initializers,
    "regularizer": keras.regularizers,
    "constraint": keras.constraints,
}


class MovingNorm(keras.Layer):  # type: ignore[misc]
    """A per-channel affine normalization with moving statistics, for input of any rank from 2 on.

    As in `keras.layers.BatchNormalization`, ``axis`` holds the channels, ``momentum`` is the weight of the
    old moving value, variances are biased, and ``trainable=False`` means inference mode. Variables have the
    dtype policy's variable dtype.
    """

    settings: ClassVar[tuple[str, ...]] = ("axis", "momentum", "epsilon", "center", "scale")
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
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if isinstance(axis, bool) or not isinstance(axis, int):
            raise ValueError(f"expected `axis` to be one integer, received axis={axis!r}")
        if not 0 <= momentum <= 1:
            raise ValueError(f"expected `momentum` between 0 and 1, received momentum={momentum}")
        if not epsilon > 0:
            raise ValueError(f"expected `epsilon` above 0, received epsilon={epsilon}")
        self.axis = axis
        self.momentum = float(momentum)
        self.epsilon = float(epsilon)
        self.center = center
        self.scale = scale
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
            initializer=getattr(self, f"{name}_initializer"),
            regularizer=getattr(self, f"{name}_regularizer"),
            constraint=getattr(self, f"{name}_constraint"),
            autocast=False,
        )

    def _add_moving(self, name: str, size: int) -> Any:
        initializer = getattr(self, f"{name}_initializer")
        return self.add_weight(name=name, shape=(size,), initializer=initializer, trainable=False, autocast=False)

    def _add_affine(self, channels: int) -> None:
        if self.scale:
            self.gamma = self._add_trainable("gamma", channels)
        if self.center:
            self.beta = self._add_trainable("beta", channels)

    def _add_statistics(self, channels: int) -> None:
        self.moving_mean = self._add_moving("moving_mean", channels)
        self.moving_variance = self._add_moving("moving_variance", channels)

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


def wide(x: Any) -> Any:
    """Return ``x`` in float32 where it is narrower: statistics are never taken in half precision."""
    return x if keras.backend.standardize_dtype(x.dtype) in ("float32", "float64") else ops.cast(x, "float32")


def per_channel(vector: Any, x: Any, channel: int) -> Any:
    """Return a (C,) vector in the dtype of ``x``, shaped to broadcast along its dimension ``channel``."""
    shape = [1] * len(x.shape)
    shape[channel] = -1
    return ops.reshape(ops.cast(vector, x.dtype), shape)


def batch_moments(x: Any, channel: int, mask: Any = None) -> tuple[Any, Any]:
    """Return mean and biased variance over every axis but ``channel``, with the rank of ``x``.

    Where ``mask``, of the shape of ``x`` without its channels, is False, values are left out. With everything
    masked both are 0. Raises `ValueError` for a mask of another rank.
    """
    axes = [axis for axis in range(len(x.shape)) if axis != channel]
    if mask is None:
        mean = ops.mean(x, axes, keepdims=True)
        return mean, ops.mean(ops.square(x - mean), axes, keepdims=True)
    if len(mask.shape) != len(x.shape) - 1:
        raise ValueError(
            "expected a mask of the input's shape without its channels, "
            f"received mask.shape={tuple(mask.shape)} for input.shape={tuple(x.shape)}"
        )
    keep = ops.broadcast_to(ops.expand_dims(ops.cast(mask, "bool"), channel), ops.shape(x))
    count = ops.maximum(ops.sum(ops.cast(keep, x.dtype), axes, keepdims=True), 1)
    mean = ops.sum(ops.where(keep, x, 0), axes, keepdims=True) / count
    return mean, ops.sum(ops.where(keep, ops.square(x - mean), 0), axes, keepdims=True) / count


def _module(name: str) -> ModuleType:
    return _MODULES[name.rpartition("_")[2]]
