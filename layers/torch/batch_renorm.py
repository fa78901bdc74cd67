"""Batch Renormalization for PyTorch."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..limits import Schedule, check_schedule, checked_limits, default_limits, limits_at
from ..published import BATCH_RENORMALIZATION, only, renamed, takes
from . import cpu, gpu, rerun
from .norm import RunningNorm, as_tensor, constant, kept, move
from .normalize import Backward, Small, normalize, square
from .passes import Array

_IN_KERAS = {
    **BATCH_RENORMALIZATION,
    "gamma_init": only(None, "γ to be given to the layer, as `weight`"),
    "beta_init": only(None, "β to be given to the layer, as `bias`"),
    "weights": only(None, "arrays to be given to the layer, by load_state_dict"),
    "mode": only(0, "the batch's statistics at inference to come of a layer in training mode"),
    "epsilon": renamed("eps"),
}
"""What titu1994/BatchRenormalization calls its layer's arguments, none of which are taken."""


class _BatchRenorm(RunningNorm):
    r"""Normalize by the batch in training, corrected towards the running statistics within limits.

    .. math:: y = \gamma \left(\frac{x - \mu_B}{\sigma_B} r + d\right) + \beta, \quad
              r = \mathrm{clip}\!\left(\frac{\sigma_B}{\sigma}, \frac1{r_{max}}, r_{max}\right), \quad
              d = \mathrm{clip}\!\left(\frac{\mu_B - \mu}{\sigma}, -d_{max}, d_{max}\right)

    with :math:`\sigma = \sqrt{v + \epsilon}` and no gradient through r and d. At inference
    :math:`y = \gamma (x - \mu)/\sigma + \beta`, as BatchNorm. The running μ and σ move by weight ``momentum``
    (None: cumulative average); as in the paper the average is of σ, and ``running_var`` holds σ² - ε.

    ``r_max`` and ``d_max`` are buffers, so limits given to `set_limits` are saved with the weights. With a
    ``schedule`` the layer sets them itself, by its count of training calls, the buffer ``step``, from 1 and 0 up to the
    arguments ``r_max`` and ``d_max``: ``"paper"`` at the steps of the paper, or within the first third of
    ``schedule_steps`` calls, ``"pretrained"`` linearly over all of them, ``"sigmoid"`` logistically with ``t_delta``
    per call (see `limits_at`). The limits default to 3 and 5, with ``"pretrained"`` to 1.25 and 0.5.

    Raises `ValueError` for a wrong rank or channel count, and in training for a single value per channel, which
    has no variance, in all processes together if they synchronize; `TypeError` for a dtype that is not floating-point,
    and for an argument that another system's layer has, with what it is here.

    Source: Ioffe, "Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models",
    algorithm 1.
    """

    r_max: Tensor
    d_max: Tensor
    step: Tensor
    place: Tensor  # nothing but where it is: compiled code tells layers apart by it

    @takes(None, {}, _IN_KERAS)
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.01,
        affine: bool = True,
        r_max: float | None = None,
        d_max: float | None = None,
        zero_init: bool = False,
        schedule: Schedule | None = None,
        schedule_steps: int | None = None,
        t_delta: float = 1e-3,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            num_features,
            eps=eps,
            momentum=momentum,
            affine=affine,
            zero_init=zero_init,
            track=True,
            device=device,
            dtype=dtype,
        )
        check_schedule(schedule, schedule_steps, t_delta)
        r_default, d_default = default_limits(schedule)
        limits = checked_limits(r_default if r_max is None else r_max, d_default if d_max is None else d_max)
        self.schedule: Schedule | None = schedule
        self.schedule_steps = schedule_steps
        self.t_delta = t_delta
        self._limits = limits
        r_now, d_now = limits if schedule is None else (1.0, 0.0)
        self.register_buffer("r_max", torch.tensor(r_now, device=device))
        self.register_buffer("d_max", torch.tensor(d_now, device=device))
        self.register_buffer("place", torch.zeros(1, device=device), persistent=False)
        if schedule is not None:
            self.register_buffer("step", torch.tensor(0, dtype=torch.long, device=device))

    def set_limits(self, r_max: float, d_max: float) -> None:
        """Set the limits of the correction.

        Raises `ValueError` unless ``r_max >= 1`` and ``d_max >= 0``, and for a layer with a schedule.
        """
        r_max, d_max = checked_limits(r_max, d_max)
        if self.schedule is not None:
            raise ValueError(
                f"{self._label}: expected schedule=None for limits set from outside, "
                f"received schedule={self.schedule!r}; drop the one or the other"
            )
        self.r_max.fill_(r_max)
        self.d_max.fill_(d_max)

    def _normalized(self, x: Tensor) -> Tensor:
        if not self.training:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
            )
        if (
            x.numel() and x.numel() // self.num_features * self._processes() < 2
        ):  # none: the batch is in other processes
            raise ValueError(
                f"{self._label}: expected more than one value per channel in training, "
                f"received shape={tuple(x.shape)}; use a larger batch, or eval()"
            )
        reruns, count = rerun.expected(), x.shape[2:].numel()
        if gpu.takes(x, self):
            return gpu.batch_renorm(self, x, reruns)
        self._follow()
        state = self.running_mean, self.running_var, self.r_max, self.d_max
        alone = not reruns and not rerun.again() and self._processes() == 1
        if alone and cpu.takes(x, *state, self.weight, self.bias):
            return self._on_cpu(x, count)
        return normalize(x, partial(self._mix, count, reruns), self.weight, self.bias)

    def _on_cpu(self, x: Tensor, count: int) -> Tensor:
        """Normalize maps on a CPU that nobody watches, in a call that is not run again."""
        running, arrays = (
            tuple(map(cpu.array, tensors))
            for tensors in ((self.running_mean, self.running_var), (self.weight, self.bias))
        )
        momentum = float(self._count_batch()) if self._moves() else 0.0
        limits = float(self.r_max), float(self.d_max)
        formula = cpu.formulas().Renorm(count, arrays, running, limits, self.eps, momentum=momentum)
        result: Tensor = cpu.Normalize.apply(x, formula, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return result

    def _follow(self) -> None:
        """Where there is a schedule, set the limits of this training call and count it, unless it is run again."""
        if self.schedule is None or rerun.again():
            return
        r_max, d_max = limits_at(torch, self.step, self.schedule, *self._limits, self.schedule_steps, self.t_delta)
        self.r_max.copy_(r_max)
        self.d_max.copy_(d_max)
        self.step.add_(1)

    def _mix(
        self,
        count: int,
        rerun_expected: bool,
        small: Small,
        mean: Array,
        var: Array,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> tuple[tuple[Array, Array, Array], Backward]:
        """Return how far the batch's mean lies below each own, scale and shift, and update the running statistics."""
        batch_mean, batch_var, through_batch = self._batch_moments(mean, var, count)
        sigma = small.library.sqrt(batch_var + self.eps)
        with torch.no_grad():
            state = self._state(batch_mean, rerun_expected and not small.watched)
            running_mean, running_var, r_max, d_max = (kept(each, small) for each in state)
            running_mean = small.per_channel(running_mean, mean)
            running_sigma = small.library.sqrt(small.per_channel(running_var, mean) + self.eps)
            r_max, d_max = small.array(r_max), small.array(d_max)
            r = (sigma / running_sigma).clip(1 / r_max, r_max)
            d = ((batch_mean - running_mean) / running_sigma).clip(-d_max, d_max)
            if self._moves():
                self._move(batch_mean, sigma)
        r, d = constant(r), constant(d)
        gamma = 1.0 if weight is None else small.per_channel(weight, mean)
        beta = 0.0 if bias is None else small.per_channel(bias, mean)
        scale = gamma * r / sigma

        def backward(d_away: Array, d_scale: Array, d_shift: Array) -> tuple[Array, ...]:
            d_scale, d_shift = d_scale.sum(0, keepdims=True), d_shift.sum(0, keepdims=True)
            d_batch_var = d_scale * scale * (-0.5 / square(sigma))
            d_mean, d_var = through_batch(-d_away.sum(0, keepdims=True), d_batch_var)
            return d_away + d_mean, d_var, d_scale * r / sigma + d_shift * d, d_shift

        return (mean - batch_mean, scale, gamma * d + beta), backward

    def _state(self, batch_mean: Array, rerun_expected: bool) -> tuple[Tensor, ...]:
        """Return the running mean and variance and the limits: those of the first run where this is another."""
        state = self.running_mean, self.running_var, self.r_max, self.d_max
        if torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting():
            return tuple(rerun.seen(self.place, self._label, as_tensor(batch_mean).flatten(), list(state)))
        if rerun_expected:
            rerun.remember(self, as_tensor(batch_mean).flatten(), state)
        return (rerun.recall(self, as_tensor(batch_mean).flatten()) or state) if rerun.again() else state

    def _move(self, mean: Array, sigma: Array) -> None:
        momentum = self._count_batch()
        if self.momentum == 0:
            return  # σ and back would round
        move(self.running_mean, mean, momentum)
        sigma = as_tensor(constant(sigma)).flatten()
        averaged = (self.running_var.to(sigma.dtype) + self.eps).sqrt_()
        move(averaged, sigma, momentum)
        self.running_var.copy_(square(averaged).sub_(self.eps).clamp_(min=0))

    def extra_repr(self) -> str:
        """Return the arguments shown by ``print(module)``."""
        shown = super().extra_repr()
        if not self.r_max.is_meta:
            shown += f", r_max={float(self.r_max):g}, d_max={float(self.d_max):g}"
        if self.schedule is not None:
            shown += f", schedule={self.schedule!r}, schedule_steps={self.schedule_steps}, t_delta={self.t_delta}"
        return shown


class BatchRenorm1d(_BatchRenorm):
    """For (N, C) and (N, C, L) input; see `_BatchRenorm`."""

    ranks = (2, 3)


class BatchRenorm2d(_BatchRenorm):
    """For (N, C, H, W) input; see `_BatchRenorm`."""

    ranks = (4,)


class BatchRenorm3d(_BatchRenorm):
    """For (N, C, D, H, W) input; see `_BatchRenorm`."""

    ranks = (5,)
