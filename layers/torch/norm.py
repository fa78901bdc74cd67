"""What Switchable Normalization and Batch Renormalization share: parameters, checks and running statistics."""

from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .statistics import square


class RunningNorm(nn.Module):
    """A per-channel affine normalization with running statistics; channels are dimension 1.

    It is not a ``torch.nn.modules.batchnorm._BatchNorm``: torch, timm and Lightning convert subclasses of that
    class into SyncBatchNorm or frozen BatchNorm without a word. The buffers carry BatchNorm's names
    ``running_mean``, ``running_var`` (biased) and ``num_batches_tracked``, which distributed tools look for.

    With the attribute ``sync`` the batch statistics in training are those of all processes of ``process_group`` (None:
    the default group) together, each weighted by how many values it has, and gradients flow through them.
    """

    ranks: ClassVar[tuple[int, ...]]
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        eps: float,
        momentum: float | None,
        affine: bool,
        zero_init: bool,
        track: bool,
        device: Any,
        dtype: Any,
    ) -> None:
        super().__init__()
        if num_features < 1:
            raise ValueError(f"expected `num_features` of at least 1, received num_features={num_features}")
        if momentum is not None and not 0 <= momentum <= 1:
            raise ValueError(f"expected `momentum` from 0 to 1 or None, received momentum={momentum}")
        if not eps > 0:
            raise ValueError(f"expected `eps` above 0, received eps={eps}")
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.sync = False
        self.process_group: Any = None
        factory = {"device": device, "dtype": dtype}
        if affine:
            self.weight = nn.Parameter(torch.full((num_features,), 0.0 if zero_init else 1.0, **factory))
            self.bias = nn.Parameter(torch.zeros(num_features, **factory))
        else:
            self.register_parameter("weight", None)
            self.register_parameter("bias", None)
        if track:
            self.register_buffer("running_mean", torch.zeros(num_features, **factory))
            self.register_buffer("running_var", torch.ones(num_features, **factory))
            self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long, device=device))

    def extra_repr(self) -> str:
        """Return the arguments shown by ``print(module)``."""
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.weight is not None}"

    def _check(self, x: Tensor) -> None:
        if x.dim() not in self.ranks:
            ranks = " or ".join(map(str, self.ranks))
            raise ValueError(f"expected input of rank {ranks}, received shape={tuple(x.shape)}")
        if x.shape[1] != self.num_features:
            raise ValueError(f"expected {self.num_features} channels, received shape={tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"expected a floating-point input, received dtype={x.dtype}")
        if x.numel() == 0:
            raise ValueError(f"expected at least one value, received shape={tuple(x.shape)}")

    def _batch_moments(self, mean: Tensor, var: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return mean and biased variance (1, C, 1, ...) of the batch, of all processes' batches if ``sync`` is set.

        ``mean`` and ``var`` are those of each sample and channel, over ``count`` values.
        """
        if not (self.sync and dist.is_available() and dist.is_initialized()):
            batch_mean = mean.mean(0, keepdim=True)
            return batch_mean, (var + square(mean - batch_mean)).mean(0, keepdim=True)
        values = mean.new_tensor([float(mean.shape[0] * count)])
        total = self._over_processes(torch.cat([values, mean.sum(0).flatten() * count]))
        batch_mean = (total[1:] / total[0]).view_as(mean[:1])
        power = (var + square(mean - batch_mean)).sum(0, keepdim=True) * count
        return batch_mean, self._over_processes(power) / total[0]

    def _over_processes(self, x: Tensor) -> Tensor:
        total: Tensor = _SumOverProcesses.apply(x, self.process_group)  # type: ignore[no-untyped-call]
        return total

    def _count_batch(self) -> float | Tensor:
        """Count one batch and return the weight of its statistics: ``momentum``, or 1/n for a cumulative average."""
        self.num_batches_tracked.add_(1)
        return 1 / self.num_batches_tracked if self.momentum is None else self.momentum


class _SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes, whose gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


def move(running: Tensor, value: Tensor, weight: float | Tensor) -> None:
    """Move a running statistic (C,) towards a batch's value in place."""
    running.add_(weight * (value.flatten() - running))
