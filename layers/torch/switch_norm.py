"""Switchable Normalization for PyTorch."""

from functools import partial
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .norm import RunningNorm, move
from .statistics import normalize, per_channel, square, wide

BatchStatistics = Literal["moving", "frozen", "none"]

CLOSED = -120.0
"""A logit that beside 0 gives a gate of exactly 0 in float32."""


class _SwitchNorm(RunningNorm):
    r"""Normalize by a learned mix of instance, layer and batch statistics.

    .. math:: y = \gamma \frac{x - \sum_k w_k \mu_k}{\sqrt{\sum_k w'_k \sigma^2_k + \epsilon}} + \beta,
              \qquad k \in \{\mathrm{in}, \mathrm{ln}, \mathrm{bn}\}

    with the gates :math:`w = \mathrm{softmax}(\mathtt{mean\_weight})`,
    :math:`w' = \mathrm{softmax}(\mathtt{var\_weight})`, each of shape (3,) in the order instance, layer, batch,
    and biased variances. Instance statistics are per sample and channel, layer statistics per sample; for (N, C)
    input a channel has one value and the instance statistics are taken to be the layer's.

    ``batch_statistics="moving"`` takes the batch statistics from the batch in training, which also updates
    ``running_mean`` and ``running_var`` with weight ``momentum`` (None: cumulative average), and from those at
    inference. ``"frozen"`` takes the running ones always and never updates them: no sample sees another.
    ``"none"`` has two gates, instance and layer, and no running statistics.

    ``zero_init`` starts γ at 0, for the last norm of a residual branch. The attribute ``temperature`` (1.0) divides the
    logits before the softmax; 0 takes the largest gate alone. `harden` does so for good.

    Statistics are computed in float32 for narrower inputs; output has the input's dtype and shape.

    Raises `ValueError` for a wrong rank or channel count, `TypeError` for a dtype that is not floating-point.

    Source: Luo et al., "Differentiable Learning-to-Normalize via Switchable Normalization", section 3.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        batch_statistics: BatchStatistics = "moving",
        zero_init: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if batch_statistics not in get_args(BatchStatistics):
            raise ValueError(
                f"expected `batch_statistics` out of {', '.join(get_args(BatchStatistics))}, "
                f"received batch_statistics={batch_statistics!r}"
            )
        track = batch_statistics != "none"
        super().__init__(
            num_features,
            eps=eps,
            momentum=momentum,
            affine=affine,
            zero_init=zero_init,
            track=track,
            device=device,
            dtype=dtype,
        )
        self.batch_statistics = batch_statistics
        self.temperature = 1.0
        gates = 3 if track else 2
        self.mean_weight = nn.Parameter(torch.ones(gates, device=device, dtype=dtype))
        self.var_weight = nn.Parameter(torch.ones(gates, device=device, dtype=dtype))

    def gates(self) -> tuple[Tensor, Tensor]:
        """Return the gates of the mean and of the variance, in the order instance, layer, batch."""
        return self._gates(self.mean_weight), self._gates(self.var_weight)

    def _gates(self, logits: Tensor) -> Tensor:
        logits = wide(logits)
        if self.temperature == 0:
            return F.one_hot(logits.argmax(), logits.numel()).to(logits.dtype)
        return (logits / self.temperature).softmax(0)

    def harden(self) -> None:
        """Give each mix to its largest gate for good: that gate becomes 1 and the others 0, which export can fold."""
        with torch.no_grad():
            for logits in (self.mean_weight, self.var_weight):
                taken = F.one_hot(logits.argmax(), logits.numel())
                logits.copy_((1 - taken) * CLOSED)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x`` of shape (N, C, ...)."""
        self._check(x)
        mix = partial(self._mix, x.shape[2:].numel())
        return normalize(x, mix, self.weight, self.bias, self.mean_weight, self.var_weight)

    def _mix(
        self, count: int, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, *gate_logits: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | float]:
        """Return mean, scale and shift from the instance statistics (N, C, 1, ...)."""
        layer_mean = mean.mean(1, keepdim=True)
        # A sum of two non-negative terms, never E[x²] - E[x]².
        layer_var = (var + square(mean - layer_mean)).mean(1, keepdim=True)
        own = (mean, var) if mean.dim() > 2 else (layer_mean, layer_var)
        mean_gates, var_gates = map(self._gates, gate_logits)
        mixed_mean = mean_gates[0] * own[0] + mean_gates[1] * layer_mean
        mixed_var = var_gates[0] * own[1] + var_gates[1] * layer_var
        # What is constant at inference is added up apart from what is not, so that an exporter can fold it.
        if self.batch_statistics == "none":
            mixed_var = mixed_var + self.eps
        else:
            batch_mean, batch_var = self._batch_statistics(count, mean, var)
            mixed_mean = mixed_mean + mean_gates[2] * batch_mean
            mixed_var = mixed_var + (var_gates[2] * batch_var + self.eps)
        gamma = 1.0 if weight is None else per_channel(wide(weight), mean)
        beta = 0.0 if bias is None else per_channel(wide(bias), mean)
        return mixed_mean, gamma / mixed_var.sqrt(), beta

    def _batch_statistics(self, count: int, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        if not self.training or self.batch_statistics == "frozen":
            return per_channel(wide(self.running_mean), mean), per_channel(wide(self.running_var), mean)
        batch_mean, batch_var = self._batch_moments(mean, var, count)
        with torch.no_grad():
            momentum = self._count_batch()
            move(self.running_mean, batch_mean, momentum)
            move(self.running_var, batch_var, momentum)
        return batch_mean, batch_var

    def extra_repr(self) -> str:
        """Return the arguments shown by ``print(module)``."""
        return f"{super().extra_repr()}, batch_statistics={self.batch_statistics!r}"


class SwitchNorm1d(_SwitchNorm):
    """For (N, C) and (N, C, L) input; see `_SwitchNorm`."""

    ranks = (2, 3)


class SwitchNorm2d(_SwitchNorm):
    """For (N, C, H, W) input; see `_SwitchNorm`."""

    ranks = (4,)


class SwitchNorm3d(_SwitchNorm):
    """For (N, C, D, H, W) input; see `_SwitchNorm`."""

    ranks = (5,)
