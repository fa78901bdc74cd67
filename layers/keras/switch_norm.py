"""Switchable Normalization for Keras."""

from typing import Any, ClassVar, Literal, get_args

import keras
from keras import ops

from .norm import MovingNorm, batch_moments, per_channel, wide

BatchStatistics = Literal["moving", "frozen", "none"]


@keras.saving.register_keras_serializable(package="normswap")
class SwitchNormalization(MovingNorm):
    r"""Normalize by a learned mix of instance, layer and batch statistics.

    .. math:: y = \gamma \frac{x - \sum_k w_k \mu_k}{\sqrt{\sum_k w'_k \sigma^2_k + \epsilon}} + \beta,
              \qquad k \in \{\mathrm{in}, \mathrm{ln}, \mathrm{bn}\}

    with the gates :math:`w = \mathrm{softmax}(\mathtt{mean\_weight})`, :math:`w' =
    \mathrm{softmax}(\mathtt{var\_weight})`, each of shape (3,) in the order instance, layer, batch, and
    biased variances. Instance statistics are per sample and channel, layer statistics per sample; for (N, C)
    input a channel has one value and the instance statistics are taken to be the layer's.

    ``batch_statistics="moving"`` takes the batch statistics from the batch in training, which also moves
    ``moving_mean`` and ``moving_variance``, and from those at inference. ``"frozen"`` takes the moving ones
    always and never updates them: no sample sees another. ``"none"`` has two gates, instance and layer, and
    no moving statistics. A mask leaves timesteps out of the batch statistics, as in
    `keras.layers.BatchNormalization`.

    The further arguments are those of `keras.layers.BatchNormalization`, and for each vector of gates an
    initializer, a regularizer and a constraint. Statistics are computed in float32 for narrower inputs;
    output has the compute dtype and the input's shape.

    Raises `ValueError` for input of rank below 2, an ``axis`` that is none of its channel axes, and a mask
    that is not the input's shape without its channels.

    Source: Luo et al., "Differentiable Learning-to-Normalize via Switchable Normalization", section 3.
    """

    settings: ClassVar[tuple[str, ...]] = (*MovingNorm.settings, "batch_statistics")
    objects: ClassVar[tuple[str, ...]] = (
        *MovingNorm.objects,
        "mean_weight_initializer",
        "var_weight_initializer",
        "mean_weight_regularizer",
        "var_weight_regularizer",
        "mean_weight_constraint",
        "var_weight_constraint",
    )

    def __init__(
        self,
        axis: int = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        batch_statistics: BatchStatistics = "moving",
        *,
        mean_weight_initializer: Any = "ones",
        var_weight_initializer: Any = "ones",
        mean_weight_regularizer: Any = None,
        var_weight_regularizer: Any = None,
        mean_weight_constraint: Any = None,
        var_weight_constraint: Any = None,
        **kwargs: Any,
    ) -> None:
        if batch_statistics not in get_args(BatchStatistics):
            raise ValueError(
                f"expected `batch_statistics` out of {', '.join(get_args(BatchStatistics))}, "
                f"received batch_statistics={batch_statistics!r}"
            )
        super().__init__(axis, momentum, epsilon, center, scale, **kwargs)
        self.batch_statistics = batch_statistics
        self._set_objects(
            mean_weight_initializer=mean_weight_initializer,
            var_weight_initializer=var_weight_initializer,
            mean_weight_regularizer=mean_weight_regularizer,
            var_weight_regularizer=var_weight_regularizer,
            mean_weight_constraint=mean_weight_constraint,
            var_weight_constraint=var_weight_constraint,
        )
        self.mean_weight: Any = None
        self.var_weight: Any = None

    def build(self, input_shape: Any) -> None:
        """Create the variables for input of this shape."""
        channels = self._channels(input_shape)
        self._add_affine(channels)
        gates = 2 if self.batch_statistics == "none" else 3
        self.mean_weight = self._add_trainable("mean_weight", gates)
        self.var_weight = self._add_trainable("var_weight", gates)
        if self.batch_statistics != "none":
            self._add_statistics(channels)

    def gates(self) -> tuple[Any, Any]:
        """Return the softmaxed gates of the mean and of the variance, in the order instance, layer, batch."""
        return ops.softmax(wide(self.mean_weight)), ops.softmax(wide(self.var_weight))

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        """Normalize ``inputs`` along ``axis``."""
        x = wide(inputs)
        channel = self.axis % len(x.shape)
        spatial = [axis for axis in range(1, len(x.shape)) if axis != channel]
        if spatial:
            mean = ops.mean(x, spatial, keepdims=True)
            centred = x - mean
            var = ops.mean(ops.square(centred), spatial, keepdims=True)
        else:
            mean, centred, var = x, x, ops.zeros_like(x)

        # From here on everything but the last line has the size of (N, C). The variances of layer and batch
        # are sums of two non-negative terms, never E[x²] - E[x]².
        layer_mean = ops.mean(mean, channel, keepdims=True)
        layer_var = ops.mean(var + ops.square(mean - layer_mean), channel, keepdims=True)
        own = (mean, var) if spatial else (layer_mean, layer_var)
        mean_gates, var_gates = (ops.cast(gates, x.dtype) for gates in self.gates())
        mixed_mean = mean_gates[0] * own[0] + mean_gates[1] * layer_mean
        mixed_var = var_gates[0] * own[1] + var_gates[1] * layer_var
        if self.batch_statistics != "none":
            if training and self.trainable and self.batch_statistics == "moving":
                batch_mean, batch_var = self._batch_statistics(x, mean, var, channel, mask)
            else:
                batch_mean = per_channel(self.moving_mean, x, channel)
                batch_var = per_channel(self.moving_variance, x, channel)
            mixed_mean = mixed_mean + mean_gates[2] * batch_mean
            mixed_var = mixed_var + var_gates[2] * batch_var

        scale = ops.rsqrt(mixed_var + self.epsilon)
        shift = (mean - mixed_mean) * scale if spatial else -mixed_mean * scale
        if self.gamma is not None:
            gamma = per_channel(self.gamma, x, channel)
            scale, shift = scale * gamma, shift * gamma
        if self.beta is not None:
            shift = shift + per_channel(self.beta, x, channel)
        return ops.cast(centred * scale + shift, self.compute_dtype)

    def _batch_statistics(self, x: Any, mean: Any, var: Any, channel: int, mask: Any) -> tuple[Any, Any]:
        if mask is None:
            batch_mean = ops.mean(mean, 0, keepdims=True)
            batch_var = ops.mean(var + ops.square(mean - batch_mean), 0, keepdims=True)
        else:
            batch_mean, batch_var = batch_moments(x, channel, mask)
        self._move(self.moving_mean, batch_mean)
        self._move(self.moving_variance, batch_var)
        return batch_mean, batch_var
