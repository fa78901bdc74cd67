"""Switchable Normalization for Keras."""

from math import prod
from typing import Any, ClassVar, Literal, get_args

import keras
from keras import ops

from ..published import KERAS_SWITCHNORM, SWITCHABLENORMS, renamed, takes
from .norm import MovingNorm
from .statistics import Moments, averaging, moments, per_channel, pooled, wide

BatchStatistics = Literal["moving", "frozen", "none"]
Compat = Literal["keras-switchnorm"]

CLOSED = -120.0
"""A logit that beside 0 gives a gate of exactly 0 in float32."""


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

    ``temperature`` divides the gates' logits: towards 0 the largest gate takes all, and at 0 (hard gates) it is
    1, the first of equals, and the logits learn nothing. It is a variable, so `set_temperature` acts inside
    compiled functions and the value is saved with the weights; `harden` takes the largest gate for good.
    ``zero_init=True`` starts gamma at 0, for the last normalization of a residual branch (``final_gamma`` elsewhere).

    ``compat="keras-switchnorm"`` computes what titu1994/keras-switchnorm does: moving statistics start at mean 1
    and variance 0, and the moving variance takes in the batch's times m/(m - 1 - ε), with m the number of values
    per sample and channel. Its arguments are taken then: ``final_gamma``, which is ``zero_init`` here, and
    ``mean_weights_*`` and ``variance_weights_*``, which are ``mean_weight_*`` and ``var_weight_*``.

    The further arguments are those of `keras.layers.BatchNormalization`, and for each vector of gates an
    initializer, a regularizer and a constraint. Statistics are computed in float32 for narrower inputs;
    output has the compute dtype and the input's shape.

    Raises `ValueError` for input of rank below 2, an ``axis`` that is none of its channel axes, a mask that is
    not the input's shape without its channels, and, with compat, one value per sample and channel; `TypeError`
    for input that is not floating-point, and for an argument that another system's layer has, with what it is here.

    Source: Luo et al., "Differentiable Learning-to-Normalize via Switchable Normalization", section 3.
    """

    settings: ClassVar[tuple[str, ...]] = (*MovingNorm.settings, "batch_statistics", "zero_init", "compat")
    objects: ClassVar[tuple[str, ...]] = (
        *MovingNorm.objects,
        "mean_weight_initializer",
        "var_weight_initializer",
        "mean_weight_regularizer",
        "var_weight_regularizer",
        "mean_weight_constraint",
        "var_weight_constraint",
    )

    @takes("keras-switchnorm", KERAS_SWITCHNORM, {**SWITCHABLENORMS, "eps": renamed("epsilon")}, last="epsilon")
    def __init__(
        self,
        axis: int = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        batch_statistics: BatchStatistics = "moving",
        *,
        temperature: float = 1.0,
        zero_init: bool = False,
        compat: Compat | None = None,
        mean_weight_initializer: Any = "ones",
        var_weight_initializer: Any = "ones",
        mean_weight_regularizer: Any = None,
        var_weight_regularizer: Any = None,
        mean_weight_constraint: Any = None,
        var_weight_constraint: Any = None,
        **kwargs: Any,
    ) -> None:
        _check(batch_statistics, compat, zero_init, scale)
        if zero_init:
            kwargs["gamma_initializer"] = "zeros"
        if compat is not None:
            kwargs = {"moving_mean_initializer": "ones", "moving_variance_initializer": "zeros", **kwargs}
        super().__init__(axis, momentum, epsilon, center, scale, **kwargs)
        self.batch_statistics = batch_statistics
        self.zero_init = zero_init
        self.compat = compat
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
        self.temperature: Any = None
        self.set_temperature(temperature)

    def build(self, input_shape: Any) -> None:
        """Create the variables for input of this shape."""
        channels = self._channels(input_shape)
        self._values(input_shape)  # the check alone
        self._add_affine(channels)
        gates = 2 if self.batch_statistics == "none" else 3
        self.mean_weight = self._add_trainable("mean_weight", gates)
        self.var_weight = self._add_trainable("var_weight", gates)
        if self.batch_statistics != "none":
            self._add_statistics(channels)
        self.temperature = self._add_constant("temperature", self._temperature)

    def set_temperature(self, temperature: float) -> None:
        """Set what divides the gates' logits; raises `ValueError` below 0."""
        if not temperature >= 0:
            raise ValueError(f"expected `temperature` of at least 0, received temperature={temperature}")
        self._temperature = float(temperature)
        if self.temperature is not None:
            self.temperature.assign(temperature)

    def harden(self) -> None:
        """Give each mix to its largest gate for good: that gate becomes 1 and the others 0, which export can fold."""
        for logits in (self.mean_weight, self.var_weight):
            taken = ops.one_hot(ops.argmax(logits), logits.shape[0], dtype=logits.dtype)
            logits.assign((1 - taken) * CLOSED)
        self.set_temperature(1.0)

    def gates(self) -> tuple[Any, Any]:
        """Return the gates of the mean and of the variance as weights, in the order instance, layer, batch."""
        return self._weights(wide(self.mean_weight)), self._weights(wide(self.var_weight))

    def _weights(self, logits: Any) -> Any:
        temperature = ops.cast(self.temperature, logits.dtype)
        hard = ops.equal(temperature, 0)
        soft = ops.softmax(logits / ops.where(hard, ops.ones_like(temperature), temperature))
        return ops.where(hard, ops.one_hot(ops.argmax(logits), logits.shape[0], dtype=logits.dtype), soft)

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        """Normalize ``inputs`` along ``axis``."""
        x = self._checked(inputs)
        channel = self.axis % len(x.shape)
        spatial = [axis for axis in range(1, len(x.shape)) if axis != channel]
        centred, own = moments(x, averaging(spatial))

        # From here on everything but the last line has the size of (N, C). Weights sum to 1, so that the mixed
        # mean lies below the instance's by the sum of weighted distances; variances are sums of non-negatives.
        layer = pooled(own, averaging([channel]))
        to_layer = own.above(layer)
        (m_in, m_ln, *m_bn), (v_in, v_ln, *v_bn) = (ops.unstack(ops.cast(g, x.dtype)) for g in self.gates())
        distance = m_ln * to_layer if spatial else (m_in + m_ln) * to_layer
        variance = v_in * own.variance + v_ln * layer.variance if spatial else (v_in + v_ln) * layer.variance
        if self.batch_statistics != "none":
            batch = self._batch(x, own, channel, mask, moving=not (training and self.trainable))
            distance = distance + m_bn[0] * own.above(batch)
            variance = variance + v_bn[0] * batch.variance

        scale = ops.rsqrt(variance + self.epsilon)
        if self.gamma is not None:
            scale = scale * per_channel(self.gamma, x, channel)
        shift = (distance - own.rest) * scale
        if self.beta is not None:
            shift = shift + per_channel(self.beta, x, channel)
        return ops.cast(centred * scale + shift, self.compute_dtype)

    def _batch(self, x: Any, own: Moments, channel: int, mask: Any, moving: bool) -> Moments:
        """Return the batch component's moments; those of a batch move the moving ones."""
        if moving or self.batch_statistics == "frozen":
            mean, variance = (per_channel(v, x, channel) for v in (self.moving_mean, self.moving_variance))
            return Moments(mean, ops.zeros_like(mean), variance)
        if mask is None:
            batch = pooled(own, self._batch_average(x, [0], channel, None))
        else:
            others = [axis for axis in range(len(x.shape)) if axis != channel]
            batch = moments(x, self._batch_average(x, others, channel, mask))[1]
        self._move(self.moving_mean, batch.mean)
        if self.compat is None:
            self._move(self.moving_variance, batch.variance)
        else:
            values = ops.cast(self._values(ops.shape(x)), x.dtype)
            self._move(self.moving_variance, batch.variance * values / (values - 1 - self.epsilon))
        return batch

    def _values(self, shape: Any) -> Any:
        """Return how many values a channel of a sample has, None if unknown; with compat, raise for one."""
        sizes = [size for axis, size in enumerate(shape) if axis not in (0, self.axis % len(shape))]
        values = None if None in sizes else prod(sizes)
        if self.compat is not None and isinstance(values, int) and values < 2:
            raise ValueError(
                f"expected two or more values per sample and channel with compat={self.compat!r}, which divides by "
                f"their number - 1 - epsilon, received shape={tuple(shape)}; use compat=None"
            )
        return values

    def load_own_variables(self, store: Any) -> None:
        """Load the saved variables; raises `ValueError` for gates of another number."""
        gates = {id(self.mean_weight), id(self.var_weight)}
        for index, variable in enumerate(self._trainable_variables):
            if id(variable) not in gates or str(index) not in store:
                continue
            shape = tuple(store[str(index)].shape)
            if shape != tuple(variable.shape):
                raise ValueError(
                    f"expected saved {variable.name} of shape={tuple(variable.shape)} for layer {self.name}, received "
                    f"shape={shape}; give the layer the batch_statistics it was saved with"
                )
        super().load_own_variables(store)

    def _parts(self) -> tuple[str, ...]:
        statistics = () if self.batch_statistics == "none" else ("moving_mean", "moving_variance")
        return "gamma", "beta", "mean_weight", "var_weight", *statistics

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments as plain data, with the temperature last set."""
        return {**super().get_config(), "temperature": self._temperature}


def _check(batch_statistics: Any, compat: Any, zero_init: bool, scale: bool) -> None:
    if batch_statistics not in get_args(BatchStatistics):
        raise ValueError(
            f"expected `batch_statistics` out of {', '.join(get_args(BatchStatistics))}, "
            f"received batch_statistics={batch_statistics!r}"
        )
    if compat not in (None, *get_args(Compat)):
        raise ValueError(f"expected `compat` to be None or 'keras-switchnorm', received compat={compat!r}")
    if zero_init and not scale:
        raise ValueError(
            "expected scale=True with zero_init=True, which starts gamma at 0, received scale=False; drop one"
        )
