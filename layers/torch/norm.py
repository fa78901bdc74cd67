"""What Switchable Normalization and Batch Renormalization share: parameters, checks and running statistics."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class RunningNorm(nn.Module):
    """A per-channel affine normalization with running statistics; channels are dimension 1.

    It is not a ``torch.nn.modules.batchnorm._BatchNorm``: torch, timm and Lightning convert subclasses of that
    class into SyncBatchNorm or frozen BatchNorm without a word. The buffers carry BatchNorm's names
    ``running_mean``, ``running_var`` (biased) and ``num_batches_tracked``, which distributed tools look for.
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

    def _count_batch(self) -> float | Tensor:
        """Count one batch and return the weight of its statistics: ``momentum``, or 1/n for a cumulative average."""
        self.num_batches_tracked.add_(1)
        return 1 / self.num_batches_tracked if self.momentum is None else self.momentum


def move(running: Tensor, value: Tensor, weight: float | Tensor) -> None:
    """Move a running statistic (C,) towards a batch's value in place."""
    running.add_(weight * (value.flatten() - running))
