"""Switchable Normalization for PyTorch."""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..published import KERAS_SWITCHNORM, SWITCHABLENORMS, renamed, takes
from . import cpu, gpu
from .norm import RunningNorm, move
from .normalize import Backward, Small, normalize, square, wide
from .passes import Array

BatchStatistics = Literal["moving", "frozen", "none"]
Compat = Literal["switchablenorms"]


def _assigned(value: Any) -> str:
    return (
        "gates to be given to the layer, as `mean_weight` and `var_weight`, and penalties and constraints to be a "
        "training loop's"
    )


_IN_KERAS = {
    **dict.fromkeys(KERAS_SWITCHNORM, _assigned),
    "final_gamma": renamed("zero_init"),
    "epsilon": renamed("eps"),
}
"""What keras-switchnorm calls its layer's arguments, none of which are taken."""

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

    ``zero_init`` starts γ at 0, for the last norm of a residual branch. The buffer ``temperature`` (1.0) divides the
    logits before the softmax; 0 takes the largest gate alone. A number can be assigned to it, which a compiled layer
    reads at the next call. It is in the state dict, so that averages of a model follow it; one without it loads, and
    leaves it as it is. `harden` takes the largest gate for good.

    ``compat="switchablenorms"`` computes what switchablenorms/Switchable-Normalization does: the variance of a map is
    unbiased, and the layer's and batch's are mixed from it; for (N, C) input those over C and N are unbiased, and the
    instance gate starts closed, which leaves theirs of layer and batch; running statistics start at mean 0 and
    variance 0; ``momentum`` is the weight of the old value. Its ``last_gamma`` is ``zero_init`` here and its
    ``using_bn=False`` is ``batch_statistics="none"``. ``momentum="auto"`` is 0.1, with compat theirs: 0.9 in 2d,
    0.997 in 1d and 3d. `normswap.interop.switchablenorms` reads and writes its checkpoints.

    It cannot be folded as a BatchNorm can, so ``eps``, which code that does so reads, is called ``epsilon``.

    Statistics are computed in float32 for narrower inputs; output has the input's dtype and shape.

    Raises `ValueError` for a wrong rank or channel count, for a state dict with another number of gates, and, with
    compat, for a single value where its variance divides by their number - 1; `TypeError` for a dtype that is not
    floating-point, and for an argument that another system's layer has, with what it is here.

    Source: Luo et al., "Differentiable Learning-to-Normalize via Switchable Normalization", section 3.
    """

    published_momentum: ClassVar[float]
    epsilon: float
    temperature: Tensor

    @takes("switchablenorms", SWITCHABLENORMS, _IN_KERAS, last="momentum")
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | Literal["auto"] | None = "auto",
        affine: bool = True,
        batch_statistics: BatchStatistics = "moving",
        zero_init: bool = False,
        compat: Compat | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if batch_statistics not in get_args(BatchStatistics):
            raise ValueError(
                f"expected `batch_statistics` out of {', '.join(get_args(BatchStatistics))}, "
                f"received batch_statistics={batch_statistics!r}"
            )
        if compat not in (None, *get_args(Compat)):
            raise ValueError(f"expected `compat` to be None or 'switchablenorms', received compat={compat!r}")
        if momentum == "auto":
            momentum = 0.1 if compat is None else self.published_momentum
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
        self.compat = compat
        self.register_buffer("temperature", torch.tensor(1.0, device=device))
        gates = 3 if track else 2
        self.mean_weight = nn.Parameter(torch.ones(gates, device=device, dtype=dtype))
        self.var_weight = nn.Parameter(torch.ones(gates, device=device, dtype=dtype))
        if compat is not None:
            self._start_as_published()

    def _start_as_published(self) -> None:
        with torch.no_grad():
            if self.batch_statistics != "none":
                self.running_var.zero_()
            if 2 in self.ranks:
                self.mean_weight[0] = self.var_weight[0] = CLOSED

    def gates(self) -> tuple[Tensor, Tensor]:
        """Return the gates of the mean and of the variance, in the order instance, layer, batch."""
        return self._gates(self.mean_weight), self._gates(self.var_weight)

    def _number(self, watched: bool) -> float | None:
        """Return the temperature where it may be read without waiting for a device, None where it may not."""
        temperature = self.temperature
        return None if watched or temperature.device.type != "cpu" else float(temperature)

    def _gates(self, logits: Tensor, number: float | None = None) -> Tensor:
        logits = wide(logits)
        if number:  # faster than what follows, which is the same
            return (logits if number == 1.0 else logits / number).softmax(0)
        largest = torch.arange(logits.numel(), device=logits.device) == logits.argmax()
        return torch.where(self.temperature > 0, (logits / self._divisor()).softmax(0), largest.to(logits.dtype))

    def _divisor(self) -> Tensor:
        return torch.where(self.temperature > 0, self.temperature, 1)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "temperature" and not isinstance(value, Tensor):
            self.temperature.fill_(value)
        else:
            super().__setattr__("epsilon" if name == "eps" else name, value)

    def __getattr__(self, name: str) -> Any:
        if name == "eps":  # which whoever folds a BatchNorm into a convolution reads
            raise AttributeError(
                f"{self._label}: expected a BatchNorm, which folds into the layer in front, received a "
                f"{type(self).__name__}, which does not, as each sample has a share in its statistics; fuse the model "
                "before the patch or not at all (ε is the attribute `epsilon`)"
            )
        return super().__getattr__(name)

    def harden(self) -> None:
        """Give each mix to its largest gate for good: that gate becomes 1 and the others 0, which export can fold."""
        with torch.no_grad():
            for logits in (self.mean_weight, self.var_weight):
                taken = F.one_hot(logits.argmax(), logits.numel())
                logits.copy_((1 - taken) * CLOSED)

    def _normalized(self, x: Tensor) -> Tensor:
        if gpu.takes(x, self):
            return gpu.switch_norm(self, x)
        parameters = self.weight, self.bias, self.mean_weight, self.var_weight
        running = (None, None) if self.batch_statistics == "none" else (self.running_mean, self.running_var)
        by_processes = self._takes_batch() and self._processes() > 1
        if self.compat is None and not by_processes and cpu.takes(x, self.temperature, *running, *parameters):
            return self._on_cpu(x, running, parameters)
        return normalize(x, partial(self._mix, x.shape[2:].numel()), *parameters)

    def _on_cpu(self, x: Tensor, running: tuple[Tensor | None, ...], parameters: tuple[Tensor | None, ...]) -> Tensor:
        """Normalize maps on a CPU that nobody watches."""
        statistics, arrays = (tuple(map(cpu.array, tensors)) for tensors in (running, parameters))
        temperature, of_batch = float(self.temperature), self._takes_batch()
        if not of_batch and not (
            torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in (x, *parameters))
        ):
            weight, bias, *logits = arrays
            constant = cpu.formulas().constants(*logits, temperature, *statistics, self.num_features)
            return cpu.switched(x, *constant, weight, bias, self.epsilon)
        momentum = float(self._count_batch()) if of_batch and self._moves() else 0.0
        formula = cpu.formulas().Switch(
            x.shape[2:].numel(), arrays, statistics, temperature, self.epsilon, of_batch=of_batch, momentum=momentum
        )
        result: Tensor = cpu.Normalize.apply(x, formula, *parameters)  # type: ignore[no-untyped-call]
        return result

    def _takes_batch(self) -> bool:
        return self.training and self.batch_statistics == "moving"

    def _check(self, x: Tensor) -> None:
        super()._check(x)
        if self.compat is None or not x.numel():
            return
        if x.dim() > 2:
            counts = {"values per sample and channel": x.shape[2:].numel()}
        else:
            counts = {"channels": x.shape[1]}
            if self._takes_batch():
                counts["samples in training"] = x.shape[0] * self._processes()
        for what, number in counts.items():
            if number < 2:
                raise ValueError(
                    f"{self._label}: expected two or more {what} with compat={self.compat!r}, which divides by their "
                    f"number - 1, received shape={tuple(x.shape)}; use compat=None"
                )

    def _mix(
        self,
        count: int,
        small: Small,
        mean: Array,
        var: Array,
        weight: Tensor | None,
        bias: Tensor | None,
        *gate_logits: Tensor,
    ) -> tuple[tuple[Array, Array, Array], Backward]:
        """Return how far the mixed mean lies below each own ``mean`` (N, C, 1, ...), scale and shift."""
        maps, unbias, correction = mean.ndim > 2, 1.0, 0
        if self.compat is not None:  # unbiased: in a map over its values, for (N, C) input over C and over N
            unbias, correction = (count / (count - 1), 0) if maps else (1.0, 1)
            var = var * unbias
        above_layer = mean - mean.mean(1, keepdims=True)
        unbias_layer = mean.shape[1] / (mean.shape[1] - correction)
        # A sum of two non-negative terms, never E[x²] - E[x]².
        layer_var = (var + square(above_layer)).mean(1, keepdims=True)
        if correction:
            layer_var = layer_var * unbias_layer
        number = self._number(small.watched)
        mean_gates, var_gates = (small.array(self._gates(logits.to(small.dtype), number)) for logits in gate_logits)
        # A vector's own statistics are its layer's. Means are mixed as differences, which a large mean costs no digits.
        layer_gates = [gates[1] if maps else gates[0] + gates[1] for gates in (mean_gates, var_gates)]
        own_var = var if maps else layer_var
        away, mixed_var = layer_gates[0] * above_layer, layer_gates[1] * layer_var
        if maps:
            mixed_var = mixed_var + var_gates[0] * var
        through_batch = None
        if self.batch_statistics == "none":
            mixed_var = mixed_var + self.epsilon
        else:
            batch_mean, batch_var, through_batch = self._batch_statistics(small, count, mean, var, correction)
            above_batch = mean - batch_mean
            away = away + mean_gates[2] * above_batch
            mixed_var = mixed_var + (var_gates[2] * batch_var + self.epsilon)  # constant at inference
        sigma = small.library.sqrt(mixed_var)
        gamma = 1.0 if weight is None else small.per_channel(weight, mean)
        beta = 0.0 if bias is None else small.per_channel(bias, mean)
        scale = gamma / sigma

        def backward(d_away: Array, d_scale: Array, d_shift: Array) -> tuple[Array, ...]:
            d_mixed_var = d_scale * scale * (-0.5 / mixed_var)
            d_above_layer = layer_gates[0] * d_away
            d_layer_var = (layer_gates[1] * unbias_layer) * d_mixed_var.mean(1, keepdims=True)
            d_mean = d_above_layer - d_above_layer.mean(1, keepdims=True) + 2 * d_layer_var * above_layer
            d_var = d_layer_var + var_gates[0] * d_mixed_var if maps else d_layer_var
            to_layer = (d_away * above_layer).sum()
            d_mean_gates = [0 * to_layer if maps else to_layer, to_layer]
            d_var_gates = [(d_mixed_var * own_var).sum(), (d_mixed_var * layer_var).sum()]
            if self.batch_statistics != "none":
                d_above_batch = mean_gates[2] * d_away
                d_mean = d_mean + d_above_batch
                d_mean_gates.append((d_away * above_batch).sum())
                d_var_gates.append((d_mixed_var * batch_var).sum())
            if through_batch is not None:
                d_batch_var = var_gates[2] * d_mixed_var.sum(0, keepdims=True)
                d_own = through_batch(-d_above_batch.sum(0, keepdims=True), d_batch_var)
                d_mean, d_var = d_mean + d_own[0], d_var + d_own[1]
            d_logits = [
                self._d_logits(small, mean_gates, d_mean_gates, number),
                self._d_logits(small, var_gates, d_var_gates, number),
            ]
            return d_mean, d_var * unbias, (d_scale / sigma).sum(0), d_shift.sum(0), *d_logits

        return (away, scale, beta), backward

    def _d_logits(self, small: Small, gates: Array, d_gates: list[Array], number: float | None) -> Array:
        d_gates = small.library.stack(d_gates)
        divisor = small.array(self._divisor()) if number is None else number or 1.0
        return gates * (d_gates - (gates * d_gates).sum()) / divisor  # a one-hot gate gives 0

    def _batch_statistics(
        self, small: Small, count: int, mean: Array, var: Array, correction: int
    ) -> tuple[Array, Array, Callable[[Array, Array], tuple[Array, Array]] | None]:
        if not self._takes_batch():
            return small.per_channel(self.running_mean, mean), small.per_channel(self.running_var, mean), None
        batch_mean, batch_var, backward = self._batch_moments(mean, var, count, correction)
        if self._moves():
            with torch.no_grad():
                self._move(batch_mean, batch_var)
        return batch_mean, batch_var, backward

    def _move(self, mean: Array, var: Array) -> None:
        momentum = self._count_batch()
        move(self.running_mean, mean, momentum)
        move(self.running_var, var, momentum)

    def _count_batch(self) -> float | Tensor:
        weight = super()._count_batch()
        return weight if self.compat is None or self.momentum is None else 1 - weight

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("mean_weight", "var_weight"):
            key, expected = f"{prefix}{name}", tuple(getattr(self, name).shape)
            if key in state_dict and tuple(state_dict[key].shape) != expected:
                raise ValueError(
                    f"expected saved {key} of shape={expected} for batch_statistics={self.batch_statistics!r}, "
                    f"received shape={tuple(state_dict[key].shape)}; give the layer the batch_statistics it was saved "
                    "with"
                )
        state_dict.setdefault(f"{prefix}temperature", self.temperature)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Return the arguments shown by ``print(module)``."""
        shown = f"{super().extra_repr()}, batch_statistics={self.batch_statistics!r}"
        return shown if self.compat is None else f"{shown}, compat={self.compat!r}"


class SwitchNorm1d(_SwitchNorm):
    """For (N, C) and (N, C, L) input; see `_SwitchNorm`."""

    ranks = (2, 3)
    published_momentum = 0.997


class SwitchNorm2d(_SwitchNorm):
    """For (N, C, H, W) input; see `_SwitchNorm`."""

    ranks = (4,)
    published_momentum = 0.9


class SwitchNorm3d(_SwitchNorm):
    """For (N, C, D, H, W) input; see `_SwitchNorm`."""

    ranks = (5,)
    published_momentum = 0.997
