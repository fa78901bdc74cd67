"""The formulas of Switchable Normalization and Batch Renormalization on a CPU, compiled by Numba, forward and backward.

They are what the layers' ``mix`` is (see `normalize`), on float64 arrays per sample and channel (N, C), for maps and
for one process: NumPy's calls would take longer than the passes over a small map. A vector that a layer lacks is empty
here.
"""

from typing import Any

import numpy as np
from numba import prange

from .kernels import Array, Values, jit, kernel, map_affine, map_moments, row_affine, row_moments


class Switch:
    """What one call of Switchable Normalization makes of its moments, and the gradients of it.

    ``running`` are the running mean and variance where they are mixed in. With ``of_batch`` those of the batch are, and
    the running ones move towards them by ``momentum``.
    """

    def __init__(
        self,
        count: int,
        parameters: tuple[Values, Values, Values, Values],
        running: tuple[Values, Values],
        temperature: float,
        epsilon: float,
        *,
        of_batch: bool,
        momentum: float,
    ) -> None:
        self.count, self.parameters, self.running = count, parameters, running
        self.temperature, self.epsilon, self.of_batch, self.momentum = temperature, epsilon, of_batch, momentum

    def forward(self, mean: Array, var: Array, pivot: Values, scale: Values, offset: Values) -> None:
        """Write y = (x - pivot)·scale + offset."""
        weight, bias, mean_logits, var_logits = self.parameters
        self.mean, self.var = mean, var
        self.gates, self.batch = constants(mean_logits, var_logits, self.temperature, *self.running, mean.shape[1])
        if self.of_batch:
            batch_moments(mean, var, self.batch)
            if self.momentum:
                move(*self.running, self.batch, self.momentum)
        switch(mean, var, self.gates, self.batch, weight, bias, self.epsilon, pivot, scale, offset)

    def backward(self, product: Array, total: Array, pivot: Values, slope: Values, level: Values) -> list[Array]:
        """Write dx = scale·dy + slope·(x - pivot) + level; return the gradients of γ, β and both gates' logits."""
        d_weight, d_bias = np.zeros((2, self.mean.shape[1]))
        d_logits, weight = np.empty((2, 3)), self.parameters[0]
        divisor = self.temperature if self.temperature > 0 else 1.0
        constant = self.gates, self.batch, weight, self.epsilon, self.count
        written = pivot, slope, level, d_weight, d_bias, d_logits
        switch_backward(product, total, self.mean, self.var, *constant, self.of_batch, divisor, *written)
        return [d_weight, d_bias, *(part[: self.parameters[2].size] for part in d_logits)]


class Renorm:
    """What one call of Batch Renormalization makes of its moments, and the gradients of it."""

    def __init__(
        self,
        count: int,
        parameters: tuple[Values, Values],
        running: tuple[Values, Values],
        limits: tuple[float, float],
        epsilon: float,
        *,
        momentum: float,
    ) -> None:
        self.count, self.parameters, self.running, self.limits = count, parameters, running, limits
        self.epsilon, self.momentum = epsilon, momentum

    def forward(self, mean: Array, var: Array, pivot: Values, scale: Values, offset: Values) -> None:
        """Write y = (x - pivot)·scale + offset."""
        self.mean = mean
        self.batch, self.correction = np.empty((2, 2, mean.shape[1]))
        batch_moments(mean, var, self.batch)
        constant = *self.parameters, *self.running, *self.limits, self.momentum, self.epsilon
        renorm(mean, self.batch, *constant, self.correction, pivot, scale, offset)

    def backward(self, product: Array, total: Array, pivot: Values, slope: Values, level: Values) -> list[Array]:
        """Write dx = scale·dy + slope·(x - pivot) + level; return the gradients of γ and β."""
        d_weight, d_bias = np.zeros((2, self.mean.shape[1]))
        constant = self.batch, self.correction, self.parameters[0], self.epsilon, self.count
        renorm_backward(product, total, *constant, pivot, slope, level, d_weight, d_bias)
        return [d_weight, d_bias]


@jit
def softmax(logits: Values, temperature: float, gates: Array) -> None:
    """Write the gates of some logits; at a temperature of 0 the first of the largest has all."""
    largest = 0
    for k in range(1, logits.size):
        if logits[k] > logits[largest]:
            largest = k
    if not temperature > 0:
        gates[largest] = 1
        return
    total = 0.0
    for k in range(logits.size):
        gates[k] = np.exp((np.float64(logits[k]) - np.float64(logits[largest])) / temperature)
        total += gates[k]
    for k in range(logits.size):
        gates[k] /= total


@jit
def constants(
    mean_logits: Values,
    var_logits: Values,
    temperature: float,
    running_mean: Values,
    running_var: Values,
    channels: int,
) -> tuple[Any, Any]:
    """Return the gates (2, 3) and constant batch statistics (2, C), 0 for what is not mixed in."""
    gates, batch = np.zeros((2, 3)), np.zeros((2, channels))
    softmax(mean_logits, temperature, gates[0])
    softmax(var_logits, temperature, gates[1])
    for c in range(running_mean.size):
        batch[0, c], batch[1, c] = running_mean[c], running_var[c]
    return gates, batch


@jit
def move(running_mean: Values, running_var: Values, batch: Array, momentum: float) -> None:
    """Move running statistics towards a batch's."""
    for c in range(running_mean.size):
        running_mean[c] += momentum * (batch[0, c] - running_mean[c])
        running_var[c] += momentum * (batch[1, c] - running_var[c])


@jit
def batch_moments(mean: Array, var: Array, batch: Array) -> None:
    """Write the mean and the biased variance of all samples together, as (2, C)."""
    samples, channels = mean.shape
    batch_mean, batch_var = batch[0], batch[1]
    batch_mean[:] = 0
    batch_var[:] = 0
    for n in range(samples):
        for c in range(channels):
            batch_mean[c] += mean[n, c]
    for c in range(channels):
        batch_mean[c] /= samples
    for n in range(samples):
        for c in range(channels):
            difference = mean[n, c] - batch_mean[c]
            batch_var[c] += var[n, c] + difference * difference
    for c in range(channels):
        batch_var[c] /= samples


@jit
def layer_moments(mean: Array, var: Array) -> tuple[Any, Any]:
    """Return the mean and the biased variance of one sample's channels (C,) together."""
    channels = mean.size
    layer_mean = mean.sum() / channels
    total = 0.0
    for c in range(channels):
        difference = mean[c] - layer_mean
        total += var[c] + difference * difference
    return layer_mean, total / channels


@jit
def switch_sample(
    mean: Array,
    var: Array,
    gates: Array,
    batch: Array,
    weight: Values,
    bias: Values,
    epsilon: float,
    pivot: Values,
    scale: Values,
    offset: Values,
) -> None:
    """Write one sample's y = (x - pivot)·scale + offset."""
    layer_mean, layer_var = layer_moments(mean, var)
    common = gates[1, 1] * layer_var + epsilon
    for c in range(mean.size):
        pivot[c] = mean[c]
        away = gates[0, 1] * (mean[c] - layer_mean) + gates[0, 2] * (mean[c] - batch[0, c])
        away += np.float64(pivot[c]) - mean[c]
        factor = 1 / np.sqrt(gates[1, 0] * var[c] + gates[1, 2] * batch[1, c] + common)
        if weight.size:
            factor *= weight[c]
        scale[c] = factor
        offset[c] = away * factor + (bias[c] if bias.size else 0.0)


@jit
def switch(
    mean: Array,
    var: Array,
    gates: Array,
    batch: Array,
    weight: Values,
    bias: Values,
    epsilon: float,
    pivot: Values,
    scale: Values,
    offset: Values,
) -> None:
    """Write every sample's y = (x - pivot)·scale + offset."""
    for n in range(mean.shape[0]):
        switch_sample(mean[n], var[n], gates, batch, weight, bias, epsilon, pivot[n], scale[n], offset[n])


@jit
def switch_backward(
    product: Array,
    total: Array,
    mean: Array,
    var: Array,
    gates: Array,
    batch: Array,
    weight: Values,
    epsilon: float,
    count: int,
    of_batch: bool,
    divisor: float,
    pivot: Values,
    slope: Values,
    level: Values,
    d_weight: Array,
    d_bias: Array,
    d_logits: Array,
) -> None:
    """Write what `Switch.backward` returns and writes; the sums of dy·(x - pivot) and of dy are overwritten."""
    samples, channels = mean.shape
    own, layer, rest = gates[1, 0], gates[1, 1], gates[1, 2]
    to_layer, to_batch, to_own_var, to_layer_var, to_batch_var = 0.0, 0.0, 0.0, 0.0, 0.0
    d_batch = np.zeros((2, channels))
    d_layer = np.empty((samples, 2))
    for n in range(samples):
        layer_mean, layer_var = layer_moments(mean[n], var[n])
        common = layer * layer_var + epsilon
        d_mean, d_var = 0.0, 0.0
        for c in range(channels):
            above_layer, above_batch = mean[n, c] - layer_mean, mean[n, c] - batch[0, c]
            away = gates[0, 1] * above_layer + gates[0, 2] * above_batch
            away += np.float64(pivot[n, c]) - mean[n, c]
            mixed = own * var[n, c] + rest * batch[1, c] + common
            inverse = 1 / np.sqrt(mixed)
            factor = inverse * weight[c] if weight.size else inverse
            d_scale = product[n, c] + away * total[n, c]
            d_bias[c] += total[n, c]
            d_weight[c] += d_scale * inverse
            d_away = factor * total[n, c]
            d_mixed = d_scale * factor * (-0.5 / mixed)
            to_layer += d_away * above_layer
            to_batch += d_away * above_batch
            to_own_var += d_mixed * var[n, c]
            to_batch_var += d_mixed * batch[1, c]
            d_mean += d_away
            d_var += d_mixed
            d_batch[0, c] -= d_away
            d_batch[1, c] += d_mixed
            product[n, c], total[n, c] = d_mixed, d_away
        to_layer_var += d_var * layer_var
        d_layer[n, 0], d_layer[n, 1] = gates[0, 1] * d_mean / channels, layer * d_var / channels
    for n in range(samples):
        layer_mean = mean[n].sum() / channels
        for c in range(channels):
            d_mixed, d_away = product[n, c], total[n, c]
            d_var = d_layer[n, 1] + own * d_mixed
            d_mean = (gates[0, 1] + gates[0, 2]) * d_away - d_layer[n, 0]
            d_mean += 2 * d_layer[n, 1] * (mean[n, c] - layer_mean)
            if of_batch:
                through = rest * d_batch[1, c] / samples
                d_var += through
                d_mean += gates[0, 2] * d_batch[0, c] / samples + 2 * through * (mean[n, c] - batch[0, c])
            lean = d_var * (2 / count)
            slope[n, c] = lean
            level[n, c] = (d_mean - d_away) / count + (np.float64(pivot[n, c]) - mean[n, c]) * lean
    d_gates = np.array([[0.0, to_layer, to_batch], [to_own_var, to_layer_var, to_batch_var]])
    for k in range(2):
        along = (gates[k] * d_gates[k]).sum()
        for gate in range(3):
            d_logits[k, gate] = gates[k, gate] * (d_gates[k, gate] - along) / divisor


@kernel
def rows_switch(x: Values, y: Values, gates: Array, batch: Array, weight: Values, bias: Values, epsilon: float) -> None:
    """Write samples (N, C, P) normalized; a sample stays in the cache from its moments to its result."""
    for n in prange(x.shape[0]):
        channels = x.shape[1]
        mean, var = np.empty(channels), np.empty(channels)
        pivot, scale, offset = np.empty(channels, x.dtype), np.empty(channels, x.dtype), np.empty(channels, x.dtype)
        for c in range(channels):
            mean[c], var[c] = row_moments(x[n, c])
        switch_sample(mean, var, gates, batch, weight, bias, epsilon, pivot, scale, offset)
        for c in range(channels):
            row_affine(x[n, c], y[n, c], pivot[c], scale[c], offset[c])


@kernel
def last_switch(x: Values, y: Values, gates: Array, batch: Array, weight: Values, bias: Values, epsilon: float) -> None:
    """Write samples (N, P, C) normalized, as `rows_switch`."""
    for n in prange(x.shape[0]):
        channels = x.shape[2]
        mean, var = np.empty(channels), np.empty(channels)
        pivot, scale, offset = np.empty(channels, x.dtype), np.empty(channels, x.dtype), np.empty(channels, x.dtype)
        map_moments(x[n], mean, var)
        switch_sample(mean, var, gates, batch, weight, bias, epsilon, pivot, scale, offset)
        map_affine(x[n], y[n], pivot, scale, offset)


SWITCH = rows_switch, last_switch
"""Switchable Normalization of samples by constant batch statistics, for both layouts."""


@jit
def renorm(
    mean: Array,
    batch: Array,
    weight: Values,
    bias: Values,
    running_mean: Values,
    running_var: Values,
    r_max: float,
    d_max: float,
    momentum: float,
    epsilon: float,
    correction: Array,
    pivot: Values,
    scale: Values,
    offset: Values,
) -> None:
    """Write r and d (2, C) and y = (x - pivot)·scale + offset, and move the running statistics, the mean of σ."""
    samples, channels = mean.shape
    factor, shift = np.empty(channels), np.empty(channels)
    for c in range(channels):
        sigma, running_sigma = np.sqrt(batch[1, c] + epsilon), np.sqrt(running_var[c] + epsilon)
        ratio = sigma / running_sigma
        correction[0, c] = min(max(ratio, 1 / r_max), r_max) if ratio == ratio else ratio
        distance = (batch[0, c] - running_mean[c]) / running_sigma
        correction[1, c] = min(max(distance, -d_max), d_max) if distance == distance else distance
        gamma = np.float64(weight[c]) if weight.size else 1.0
        factor[c] = gamma * correction[0, c] / sigma
        shift[c] = gamma * correction[1, c] + (bias[c] if bias.size else 0.0)
        if momentum:  # σ and back would round
            running_mean[c] += momentum * (batch[0, c] - running_mean[c])
            averaged = running_sigma + momentum * (sigma - running_sigma)
            running_var[c] = max(averaged * averaged - epsilon, 0.0) if averaged == averaged else averaged
    for n in range(samples):
        for c in range(channels):
            pivot[n, c] = mean[n, c]
            scale[n, c] = factor[c]
            offset[n, c] = (np.float64(pivot[n, c]) - batch[0, c]) * factor[c] + shift[c]


@jit
def renorm_backward(
    product: Array,
    total: Array,
    batch: Array,
    correction: Array,
    weight: Values,
    epsilon: float,
    count: int,
    pivot: Values,
    slope: Values,
    level: Values,
    d_weight: Array,
    d_bias: Array,
) -> None:
    """Write what `Renorm.backward` returns and writes."""
    samples, channels = product.shape
    d_scale = np.zeros(channels)
    for n in range(samples):
        for c in range(channels):
            d_scale[c] += product[n, c] + (np.float64(pivot[n, c]) - batch[0, c]) * total[n, c]
            d_bias[c] += total[n, c]
    d_mean, lean = np.empty(channels), np.empty(channels)
    for c in range(channels):
        mixed = batch[1, c] + epsilon
        factor = correction[0, c] / np.sqrt(mixed)
        d_weight[c] = d_scale[c] * factor + d_bias[c] * correction[1, c]
        if weight.size:
            factor *= weight[c]
        d_mean[c] = -factor * d_bias[c] / (samples * count)
        lean[c] = d_scale[c] * factor * (-0.5 / mixed) * (2 / (samples * count))
    for n in range(samples):
        for c in range(channels):
            slope[n, c] = lean[c]
            level[n, c] = d_mean[c] + (np.float64(pivot[n, c]) - batch[0, c]) * lean[c]
