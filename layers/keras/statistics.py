"""Means and variances that keep their digits however far the mean lies above the deviation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
from keras import ops

Mean = Callable[[Any], Any]


@dataclass(frozen=True)
class Moments:
    """A mean in two parts, ``pivot + rest``, and the biased variance about it, all with the rank of the input.

    The sum is rounded to the spacing of floats near the mean, which may exceed what is to be told apart; so it is
    formed nowhere but in moving averages. No gradient flows through the pivot: a constant that is added to the one
    part and taken from the other changes nothing.
    """

    pivot: Any
    rest: Any
    variance: Any

    @property
    def mean(self) -> Any:
        """Return the rounded mean."""
        return self.pivot + self.rest

    def above(self, other: "Moments") -> Any:
        """Return this mean less ``other``'s."""
        return (self.pivot - other.pivot) + (self.rest - other.rest)


def averaging(axes: Sequence[int], keep: Any = None, synchronized: bool = False) -> Mean:
    """Return the function that averages over ``axes``, which stay with size 1.

    Where ``keep`` is False, values are left out; the average of none is 0. ``synchronized`` averages over all
    replicas of a TensorFlow distribution strategy, each with the weight of its number of values.
    """
    if keep is None and not synchronized:
        return lambda x: ops.mean(x, axes, keepdims=True) if axes else x

    def mean(x: Any) -> Any:
        kept = ops.ones_like(x) if keep is None else ops.cast(keep, x.dtype)
        total = ops.sum(x if keep is None else ops.where(keep, x, 0), axes, keepdims=True)
        count = ops.sum(kept, axes, keepdims=True)
        if synchronized:
            total, count = _sum_over_replicas(total), _sum_over_replicas(count)
        return total / ops.maximum(count, 1)

    return mean


def moments(x: Any, mean: Mean) -> tuple[Any, Moments]:
    """Return ``x`` less its pivot, and its moments."""
    pivot = ops.stop_gradient(mean(x))
    centred = x - pivot
    rest = mean(centred)
    # About the pivot the mean is a rounding error, so that this difference of squares cancels nothing.
    variance = ops.maximum(mean(ops.square(centred)) - ops.square(rest), 0)
    return centred, Moments(pivot, rest, variance)


def pooled(parts: Moments, mean: Mean) -> Moments:
    """Return the moments of the union of equally large parts, which ``mean`` averages over."""
    pivot = ops.stop_gradient(mean(parts.pivot))
    left = (parts.pivot - pivot) + parts.rest
    rest = mean(left)
    return Moments(pivot, rest, mean(parts.variance + ops.square(left - rest)))


def kept(mask: Any, x: Any, channel: int) -> Any:
    """Return where ``mask``, of the shape of ``x`` without its channels, keeps values of ``x``."""
    if len(mask.shape) != len(x.shape) - 1:
        raise ValueError(
            "expected a mask of the input's shape without its channels, "
            f"received mask.shape={tuple(mask.shape)} for input.shape={tuple(x.shape)}"
        )
    return ops.broadcast_to(ops.expand_dims(ops.cast(mask, "bool"), channel), ops.shape(x))


def wide(x: Any) -> Any:
    """Return ``x`` in float32 where it is narrower: statistics are never taken in half precision."""
    return x if keras.backend.standardize_dtype(x.dtype) in ("float32", "float64") else ops.cast(x, "float32")


def per_channel(vector: Any, x: Any, channel: int) -> Any:
    """Return a (C,) vector in the dtype of ``x``, shaped to broadcast along its dimension ``channel``."""
    shape = [1] * len(x.shape)
    shape[channel] = -1
    return ops.reshape(ops.cast(vector, x.dtype), shape)


def _sum_over_replicas(x: Any) -> Any:
    import tensorflow as tf  # the only backend with replicas inside a layer

    context = tf.distribute.get_replica_context()
    return x if context is None else context.all_reduce(tf.distribute.ReduceOp.SUM, x)
