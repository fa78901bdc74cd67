"""What Switchable Normalization and Batch Renormalization share: parameters, checks and running statistics."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.fx import Proxy

from ...errors import UnsupportedError
from . import rerun
from .normalize import Small, square
from .passes import Array


class RunningNorm(nn.Module):
    """A per-channel affine normalization with running statistics; channels are dimension 1.

    It is not a ``torch.nn.modules.batchnorm._BatchNorm``: torch, timm and Lightning convert subclasses of that
    class into SyncBatchNorm or frozen BatchNorm without a word. The buffers carry BatchNorm's names
    ``running_mean``, ``running_var`` (biased) and ``num_batches_tracked``, which distributed tools look for.

    The attribute ``site`` is the layer's name in a patched model. Error messages begin with it, or without one with the
    class.

    A forward that a backward pass runs again, as activation checkpointing does, computes what the first run did and
    moves nothing. With the attribute ``track_running_stats`` set to False nothing moves either, as in a BatchNorm.

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
        if not eps >= 0:
            raise ValueError(f"expected `eps` of at least 0, received eps={eps}")
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.track_running_stats = track
        self.site = ""
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

    def forward(self, x: Tensor) -> Tensor:
        """Normalize ``x`` of shape (N, C, ...); be one node of a symbolic trace, as torch's layers are."""
        tracer: Any = x.tracer if isinstance(x, Proxy) else None
        if tracer is not None and tracer.root is not self:
            node: Tensor = tracer.create_proxy("call_module", tracer.path_of_module(self), (x,), {})
            return node
        self._check(x)
        return self._normalized(x) if x.numel() else self._of_nothing(x)

    def _of_nothing(self, x: Tensor) -> Tensor:
        """Return what is normalized of no value at all, as BatchNorm does: nothing, and no statistic moves.

        The other processes wait for this one's share of the batch, which is none, and for a gradient of each parameter.
        """
        if self._takes_batch() and self._processes() > 1:
            x = x + self._normalized(x.reshape(0, self.num_features, *[1] * (x.dim() - 2))).sum()
        elif self._takes_batch() and self._moves():
            self._count_batch()
        return x + sum(parameter.sum() for parameter in self.parameters(recurse=False))

    def __prepare_scriptable__(self) -> nn.Module:
        """Refuse `torch.jit.script`, which asks this of every module before it reads any code."""
        raise UnsupportedError(
            f"{self._label}: expected a model to trace, received torch.jit.script, which does not take "
            f"{type(self).__name__}; use torch.jit.trace, torch.export or torch.compile"
        )

    def _normalized(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _takes_batch(self) -> bool:
        """Whether a call takes the statistics of its batch."""
        return self.training

    def _moves(self) -> bool:
        """Whether a call that takes its batch's statistics moves the running ones, and is counted."""
        return self.track_running_stats and not rerun.again()

    def extra_repr(self) -> str:
        """Return the arguments shown by ``print(module)``."""
        eps = self.__dict__.get("epsilon", self.__dict__.get("eps"))
        return f"{self.num_features}, eps={eps}, momentum={self.momentum}, affine={self.weight is not None}"

    def _check(self, x: Tensor) -> None:
        if x.dim() not in self.ranks:
            ranks = " or ".join(map(str, self.ranks))
            raise ValueError(f"{self._label}: expected input of rank {ranks}, received shape={tuple(x.shape)}")
        if x.shape[1] != self.num_features:
            raise ValueError(f"{self._label}: expected {self.num_features} channels, received shape={tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"{self._label}: expected a floating-point input, received dtype={x.dtype}; cast it first")

    @property
    def _label(self) -> str:
        return self.site or type(self).__name__

    def _batch_moments(
        self, mean: Array, var: Array, count: int, correction: int = 0
    ) -> tuple[Array, Array, Callable[[Array, Array], tuple[Array, Array]]]:
        """Return mean and variance (1, C, 1, ...) of the batch, of all processes' batches if ``sync`` is set.

        ``mean`` and ``var`` are those of each sample and channel, over ``count`` values. The squares are divided by
        their number less ``correction``. The function returned last gives the gradients of ``mean`` and ``var`` for
        those of the batch's.
        """
        over_processes, total = _as_it_is, mean.shape[0] * count
        if self._processes() > 1:
            over_processes = self._over_processes
            total = over_processes(mean.sum(0, keepdims=True)[:, :1] * 0 + total)
        batch_mean = over_processes(mean.sum(0, keepdims=True) * count) / total
        difference = mean - batch_mean
        weight = count / (total - correction)
        batch_var = over_processes((var + square(difference)).sum(0, keepdims=True) * count) / (total - correction)

        def backward(d_mean: Array, d_var: Array) -> tuple[Array, Array]:
            d_var = over_processes(d_var) * weight
            return over_processes(d_mean) * (count / total) + 2 * d_var * difference, d_var

        return batch_mean, batch_var, backward

    def _processes(self) -> int:
        """Return over how many processes the batch statistics are taken."""
        if self.sync and dist.is_available() and dist.is_initialized():
            return dist.get_world_size(self.process_group)
        return 1

    def _over_processes(self, x: Array) -> Array:
        tensor = as_tensor(x)
        total = _SumOverProcesses.apply(tensor, self.process_group)  # type: ignore[no-untyped-call]
        return total if isinstance(x, Tensor) else total.numpy()

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


def _as_it_is(x: Array) -> Array:
    return x


def move(running: Tensor, value: Array, weight: float | Tensor) -> None:
    """Move a running statistic (C,) towards a batch's value in place."""
    running.add_(weight * (as_tensor(constant(value)).to(running.device).flatten() - running))


def constant(value: Array) -> Array:
    """Return an array through which no gradient flows: ``no_grad`` alone is not in a trace."""
    return value.detach() if isinstance(value, Tensor) else value


def kept(buffer: Tensor, small: Small) -> Tensor:
    """Return what a buffer holds that is about to move, for a backward pass to find, in whatever a formula runs on.

    A compiler makes anew in the backward pass what is cheap to make, from a buffer that has moved by then; torch's
    inductor does so without a word. It keeps the results of reductions.
    """
    return buffer.expand(8, *buffer.shape).amax(0) if small.watched else buffer


def as_tensor(value: Array) -> Tensor:
    """Return an array as a tensor; what is one stays, since a trace would take a new one for a constant."""
    return value if isinstance(value, Tensor) else torch.from_numpy(value)
