"""Batch Renormalization for PyTorch."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .norm import RunningNorm, move
from .statistics import normalize, per_channel, square, wide


class _BatchRenorm(RunningNorm):
    r"""Normalize by the batch in training, corrected towards the running statistics within limits.

    .. math:: y = \gamma \left(\frac{x - \mu_B}{\sigma_B} r + d\right) + \beta, \quad
              r = \mathrm{clip}\!\left(\frac{\sigma_B}{\sigma}, \frac1{r_{max}}, r_{max}\right), \quad
              d = \mathrm{clip}\!\left(\frac{\mu_B - \mu}{\sigma}, -d_{max}, d_{max}\right)

    with :math:`\sigma = \sqrt{v + \epsilon}` and no gradient through r and d. At inference
    :math:`y = \gamma (x - \mu)/\sigma + \beta`, as BatchNorm. The running μ and σ move by weight ``momentum``
    (None: cumulative average); as in the paper the average is of σ, and ``running_var`` holds σ² - ε.

    ``r_max`` and ``d_max`` are buffers, so a schedule set by `set_limits` is saved with the weights.

    Raises `ValueError` for a wrong rank or channel count, and in training for a single value per channel, which
    has no variance; `TypeError` for a dtype that is not floating-point.

    Source: Ioffe, "Batch Renormalization: Towards Reducing Minibatch Dependence in Batch-Normalized Models",
    algorithm 1.
    """

    r_max: Tensor
    d_max: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.01,
        affine: bool = True,
        r_max: float = 3.0,
        d_max: float = 5.0,
        zero_init: bool = False,
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
        self.register_buffer("r_max", torch.tensor(1.0, device=device))
        self.register_buffer("d_max", torch.tensor(0.0, device=device))
        self.set_limits(r_max, d_max)

    def set_limits(self, r_max: float, d_max: float) -> None:
        """Set the limits of the correction; raises `ValueError` unless ``r_max >= 1`` and ``d_max >= 0``."""
        if not r_max >= 1:
            raise ValueError(f"expected `r_max` of at least 1, received r_max={r_max}")
        if not d_max >= 0:
            raise ValueError(f"expected `d_max` of at least 0, received d_max={d_max}")
        self.r_max.fill_(r_max)
        self.d_max.fill_(d_max)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x`` of shape (N, C, ...)."""
        self._check(x)
        if not self.training:
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
            )
        count = x.numel() // self.num_features
        if count < 2:
            raise ValueError(
                "expected more than one value per channel in training, "
                f"received shape={tuple(x.shape)}; use a larger batch, or eval()"
            )
        return normalize(x, partial(self._mix, x.shape[2:].numel()), self.weight, self.bias)

    def _mix(
        self, count: int, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | float]:
        """Return mean, scale and shift from the instance statistics (N, C, 1, ...), and update the running ones."""
        batch_mean, batch_var = self._batch_moments(mean, var, count)
        sigma = (batch_var + self.eps).sqrt()
        with torch.no_grad():
            running_mean, running_var = per_channel(self.running_mean, mean), per_channel(self.running_var, mean)
            running_sigma = (running_var.to(sigma.dtype) + self.eps).sqrt()
            r = torch.minimum((sigma / running_sigma).maximum(1 / self.r_max), self.r_max)
            d = torch.minimum(((batch_mean - running_mean) / running_sigma).maximum(-self.d_max), self.d_max)
            momentum = self._count_batch()
            move(self.running_mean, batch_mean, momentum)
            averaged = running_sigma + momentum * (sigma - running_sigma)
            self.running_var.copy_((square(averaged) - self.eps).clamp_(min=0).flatten())
        gamma = 1.0 if weight is None else per_channel(wide(weight), mean)
        beta = 0.0 if bias is None else per_channel(wide(bias), mean)
        return batch_mean, gamma * r / sigma, gamma * d + beta

    def extra_repr(self) -> str:
        """Return the arguments shown by ``print(module)``."""
        if self.r_max.is_meta:
            return super().extra_repr()
        return f"{super().extra_repr()}, r_max={float(self.r_max):g}, d_max={float(self.d_max):g}"


class BatchRenorm1d(_BatchRenorm):
    """For (N, C) and (N, C, L) input; see `_BatchRenorm`."""

    ranks = (2, 3)


class BatchRenorm2d(_BatchRenorm):
    """For (N, C, H, W) input; see `_BatchRenorm`."""

    ranks = (4,)


class BatchRenorm3d(_BatchRenorm):
    """For (N, C, D, H, W) input; see `_BatchRenorm`."""

    ranks = (5,)
