"""Batch Renormalization for Keras."""

from typing import Any

import keras
from keras import ops

from .norm import MovingNorm, batch_moments, wide


@keras.saving.register_keras_serializable(package="normswap")
class BatchRenormalization(MovingNorm):
    r"""Normalize by the batch in training, corrected towards the moving statistics within limits.

    .. math:: y = \gamma \left(\frac{x - \mu_B}{\sigma_B} r + d\right) + \beta, \quad
              r = \mathrm{clip}\!\left(\frac{\sigma_B}{\sigma}, \frac1{r_{max}}, r_{max}\right), \quad
              d = \mathrm{clip}\!\left(\frac{\mu_B - \mu}{\sigma}, -d_{max}, d_{max}\right)

    with :math:`\sigma = \sqrt{v + \epsilon}` and no gradient through r and d. At inference :math:`y = \gamma
    (x - \mu)/\sigma + \beta`, as `keras.layers.BatchNormalization`. The moving μ and σ keep weight
    ``momentum``; as in the paper the average is of σ, and ``moving_variance`` holds σ² - ε. A mask leaves
    timesteps out of the batch statistics.

    ``r_max`` and ``d_max`` are variables, so a schedule set by `set_limits` acts inside compiled training
    functions and is saved with the weights. The further arguments are those of
    `keras.layers.BatchNormalization`. Statistics are computed in float32 for narrower inputs; output has the
    compute dtype and the input's shape.

    Raises `ValueError` for input of rank below 2, an ``axis`` that is none of its channel axes, and a mask
    that is not the input's shape without its channels.

    Source: Ioffe, "Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models",
    algorithm 1.
    """

    def __init__(
        self,
        axis: int = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        r_max: float = 3.0,
        d_max: float = 5.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(axis, momentum, epsilon, center, scale, **kwargs)
        self.r_max: Any = None
        self.d_max: Any = None
        self.set_limits(r_max, d_max)

    def build(self, input_shape: Any) -> None:
        """Create the variables for input of this shape."""
        channels = self._channels(input_shape)
        self._add_affine(channels)
        self._add_statistics(channels)
        self.r_max = self._add_limit("r_max", self._limits[0])
        self.d_max = self._add_limit("d_max", self._limits[1])

    def _add_limit(self, name: str, value: float) -> Any:
        initializer = keras.initializers.Constant(value)
        return self.add_weight(name=name, shape=(), initializer=initializer, trainable=False, autocast=False)

    def set_limits(self, r_max: float, d_max: float) -> None:
        """Set the limits of the correction; raises `ValueError` unless ``r_max >= 1`` and ``d_max >= 0``."""
        if not r_max >= 1:
            raise ValueError(f"expected `r_max` of at least 1, received r_max={r_max}")
        if not d_max >= 0:
            raise ValueError(f"expected `d_max` of at least 0, received d_max={d_max}")
        self._limits = (float(r_max), float(d_max))
        if self.r_max is not None:
            self.r_max.assign(r_max)
            self.d_max.assign(d_max)

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        """Normalize ``inputs`` along ``axis``."""
        x = wide(inputs)
        gamma = None if self.gamma is None else ops.cast(self.gamma, x.dtype)
        beta = None if self.beta is None else ops.cast(self.beta, x.dtype)
        if training and self.trainable:
            mean, variance = (ops.reshape(m, [-1]) for m in batch_moments(x, self.axis % len(x.shape), mask))
            r, d = self._correct_and_move(mean, variance)
            # The layer's output is batch normalization with scale γr and shift γd + β.
            gamma, shift = (r, d) if gamma is None else (gamma * r, gamma * d)
            beta = shift if beta is None else shift + beta
        else:
            mean, variance = ops.cast(self.moving_mean, x.dtype), ops.cast(self.moving_variance, x.dtype)
        y = ops.batch_normalization(x, mean, variance, axis=self.axis, offset=beta, scale=gamma, epsilon=self.epsilon)
        return ops.cast(y, self.compute_dtype)

    def _correct_and_move(self, mean: Any, variance: Any) -> tuple[Any, Any]:
        """Return r and d, which use the moving statistics of before this batch, then move those."""
        mean, sigma = ops.stop_gradient(mean), ops.sqrt(ops.stop_gradient(variance) + self.epsilon)
        moving_mean = ops.cast(self.moving_mean, mean.dtype)
        moving_sigma = ops.sqrt(ops.cast(self.moving_variance, mean.dtype) + self.epsilon)
        r_max, d_max = ops.cast(self.r_max, mean.dtype), ops.cast(self.d_max, mean.dtype)
        r = ops.minimum(ops.maximum(sigma / moving_sigma, 1 / r_max), r_max)
        d = ops.minimum(ops.maximum((mean - moving_mean) / moving_sigma, -d_max), d_max)

        self._move(self.moving_mean, mean)
        moved_sigma = moving_sigma * self.momentum + sigma * (1.0 - self.momentum)
        moved = ops.maximum(ops.square(moved_sigma) - self.epsilon, 0.0)
        self.moving_variance.assign(ops.cast(moved, self.moving_variance.dtype))
        return r, d

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments as plain data, with the limits last set."""
        return {**super().get_config(), "r_max": self._limits[0], "d_max": self._limits[1]}
