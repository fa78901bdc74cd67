"""Batch Renormalization for Keras."""

from typing import Any, ClassVar, Literal, get_args

import keras
from keras import ops

from ..limits import Schedule, check_schedule, checked_limits, default_limits, limits_at
from ..published import BATCH_RENORMALIZATION, renamed, takes
from .norm import MovingNorm
from .statistics import Moments, moments

Compat = Literal["titu1994"]


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

    ``r_max`` and ``d_max`` are variables, so limits given to `set_limits` act inside compiled training functions
    and are saved with the weights. With a ``schedule`` the layer sets them itself, by its count of training calls,
    the variable ``step``, from 1 and 0 up to ``r_max`` and ``d_max``: ``"paper"`` at the steps of the paper, or
    within the first third of ``schedule_steps`` calls, ``"pretrained"`` linearly over all of them, ``"sigmoid"``
    logistically with ``t_delta`` per call (see `limits_at`). The limits default to 3 and 5, with ``"pretrained"`` to
    1.25 and 0.5.

    ``compat="titu1994"`` computes what titu1994/BatchRenormalization does in training: the sigmoid schedule, and a
    moving average of the variance with ε in it, to which inference adds ε once more. Its arguments are taken then:
    ``r_max_value``, ``d_max_value``, ``gamma_init`` and ``beta_init``, which are ``r_max``, ``d_max``,
    ``gamma_initializer`` and ``beta_initializer`` here, and ``mode=0``. The further arguments are those of
    `keras.layers.BatchNormalization`. Statistics are computed in float32 for narrower inputs; output has the
    compute dtype and the input's shape.

    Raises `ValueError` for input of rank below 2, an ``axis`` that is none of its channel axes, and a mask
    that is not the input's shape without its channels; `TypeError` for input that is not floating-point, and for an
    argument that another system's layer has, with what it is here.

    Source: Ioffe, "Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models",
    algorithm 1.
    """

    settings: ClassVar[tuple[str, ...]] = (
        *MovingNorm.settings,
        "schedule",
        "schedule_steps",
        "t_delta",
        "compat",
    )

    @takes("titu1994", BATCH_RENORMALIZATION, {"eps": renamed("epsilon")}, last="momentum")
    def __init__(
        self,
        axis: int = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-3,
        center: bool = True,
        scale: bool = True,
        r_max: float | None = None,
        d_max: float | None = None,
        *,
        schedule: Schedule | None = None,
        schedule_steps: int | None = None,
        t_delta: float = 1e-3,
        compat: Compat | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(axis, momentum, epsilon, center, scale, **kwargs)
        if compat not in (None, *get_args(Compat)):
            raise ValueError(f"expected `compat` to be None or 'titu1994', received compat={compat!r}")
        if schedule is None and compat is not None:
            schedule = "sigmoid"
        check_schedule(schedule, schedule_steps, t_delta)
        r_default, d_default = default_limits(schedule)
        self.schedule = schedule
        self.schedule_steps = schedule_steps
        self.t_delta = float(t_delta)
        self.compat = compat
        self.r_max: Any = None
        self.d_max: Any = None
        self.step: Any = None
        self._limits = checked_limits(r_default if r_max is None else r_max, d_default if d_max is None else d_max)

    def build(self, input_shape: Any) -> None:
        """Create the variables for input of this shape."""
        channels = self._channels(input_shape)
        self._add_affine(channels)
        self._add_statistics(channels)
        r_max, d_max = self._limits if self.schedule is None else (1.0, 0.0)
        self.r_max = self._add_constant("r_max", r_max)
        self.d_max = self._add_constant("d_max", d_max)
        if self.schedule is not None:
            # A float, which every device and compiler takes; exact for 16 million calls, past every schedule.
            self.step = self._add_constant("step", 0.0, dtype="float32")

    def set_limits(self, r_max: float, d_max: float) -> None:
        """Set the limits of the correction.

        Raises `ValueError` unless ``r_max >= 1`` and ``d_max >= 0``, and for a layer with a schedule.
        """
        limits = checked_limits(r_max, d_max)
        if self.schedule is not None:
            raise ValueError(
                f"expected schedule=None for limits set from outside, received schedule={self.schedule!r} in layer "
                f"{self.name}; drop the one or the other"
            )
        self._take_limits(limits, limits)

    def _take_limits(self, limits: tuple[float, float], values: tuple[Any, Any]) -> None:
        """Set checked limits; tensors of theirs as ``values`` are assigned in less time, which counts each step."""
        self._limits = limits
        for variable, value in zip((self.r_max, self.d_max), values, strict=True):
            if variable is None:
                continue
            if keras.backend.backend() == "tensorflow":
                variable.value.assign(ops.convert_to_tensor(value, variable.dtype), read_value=False)
            else:
                variable.assign(value)

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        """Normalize ``inputs`` along ``axis``."""
        x = self._checked(inputs)
        gamma = None if self.gamma is None else ops.cast(self.gamma, x.dtype)
        beta = None if self.beta is None else ops.cast(self.beta, x.dtype)
        if training and self.trainable:
            channel = self.axis % len(x.shape)
            others = [axis for axis in range(len(x.shape)) if axis != channel]
            x, batch = moments(x, self._batch_average(x, others, channel, mask))
            batch = Moments(*(ops.reshape(part, [-1]) for part in (batch.pivot, batch.rest, batch.variance)))
            r, d = self._correct_and_move(batch)
            # The layer's output is batch normalization with scale γr and shift γd + β, here of x less its pivot.
            gamma, shift = (r, d) if gamma is None else (gamma * r, gamma * d)
            beta = shift if beta is None else shift + beta
            mean, variance = batch.rest, batch.variance
        else:
            mean, variance = ops.cast(self.moving_mean, x.dtype), ops.cast(self.moving_variance, x.dtype)
        y = ops.batch_normalization(x, mean, variance, axis=self.axis, offset=beta, scale=gamma, epsilon=self.epsilon)
        return ops.cast(y, self.compute_dtype)

    def _correct_and_move(self, batch: Moments) -> tuple[Any, Any]:
        """Return r and d, which use the moving statistics of before this batch, then move those."""
        batch = Moments(batch.pivot, ops.stop_gradient(batch.rest), ops.stop_gradient(batch.variance))
        dtype = batch.rest.dtype
        sigma = ops.sqrt(batch.variance + self.epsilon)
        moving = Moments(ops.cast(self.moving_mean, dtype), 0.0, ops.cast(self.moving_variance, dtype))
        moving_sigma = ops.sqrt(moving.variance + self.epsilon)
        r_max, d_max = (ops.cast(limit, dtype) for limit in self._limits_now())
        r = ops.minimum(ops.maximum(sigma / moving_sigma, 1 / r_max), r_max)
        d = ops.minimum(ops.maximum(batch.above(moving) / moving_sigma, -d_max), d_max)

        self._move(self.moving_mean, batch.mean)
        if self.compat is None:
            moved_sigma = moving_sigma * self.momentum + sigma * (1.0 - self.momentum)
            moved = ops.maximum(ops.square(moved_sigma) - self.epsilon, 0.0)
            self.moving_variance.assign(ops.cast(moved, self.moving_variance.dtype))
        else:
            self._move(self.moving_variance, ops.square(sigma))
        return r, d

    def _limits_now(self) -> tuple[Any, Any]:
        """Return the limits of this training call; a schedule also counts it."""
        if self.schedule is not None:
            r_max, d_max = limits_at(ops, self.step, self.schedule, *self._limits, self.schedule_steps, self.t_delta)
            self.r_max.assign(ops.cast(r_max, self.r_max.dtype))
            self.d_max.assign(ops.cast(d_max, self.d_max.dtype))
            self.step.assign(self.step + 1)
        return self.r_max, self.d_max

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments as plain data, with the limits last set."""
        return {**super().get_config(), "r_max": self._limits[0], "d_max": self._limits[1]}
