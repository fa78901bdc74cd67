"""The passes over the data on a GPU, and the arithmetic between them, as Triton kernels; `gpu` launches them.

Data are (N, C, P) in any of their two layouts, told by strides; a program takes one sample, ``BLOCK_C`` channels and a
run of ``tiles`` tiles of ``BLOCK_P`` positions, of which a row (n, c) has ``splits``. Loads become float32. What is per
sample and channel is float64 where it is a mean or a sum, since a mean far above the deviation has to leave digits;
differences of means and all that follows are float32. float64 is slow on cards for gaming, so nothing of the data's
size is, and each program that reads data takes two or three differences in it. Offsets are 64 bits.

Moments are taken about the mean of a run's first tile, by Welford's recurrence in each lane of a tile, and merged over
lanes, runs and samples as in Chan et al., "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances"
(1979). There are no atomics, and nothing depends on which program comes first: results are the same bit for bit each
time. A launch reads only what earlier launches wrote, which a CUDA stream keeps in order.

Between the passes one launch has programs for samples and others for channels: layer statistics are sums over a
sample's channels, batch statistics over a channel's samples. What needs both, the mix, is the first thing that the
programs of the pass that follows do, for their own rows.

Arrays: ``partial`` (2, N, splits, C) mean and variance, or sums of dy·(x - pivot) and of dy, of each run; ``rows``
(2, N, C) the same of each row, which is ``partial`` where a row is one run; ``samples`` (2, N) layer mean and variance;
``channels`` (2, C) batch mean and variance; ``gates`` (7,) those of the mean, those of the variance, and what divides
the logits.
"""

import triton
import triton.language as tl

COUNTS = ["N", "splits", "tiles"]
"""Arguments of whose values nothing is compiled in, so that batches of all sizes share a program."""


@triton.jit
def _place(C, splits, BLOCK_C: tl.constexpr):
    """Return the sample, the channels, which of them there are, and the run of this program."""
    program = tl.program_id(0)
    blocks = (C + BLOCK_C - 1) // BLOCK_C
    split = program % splits
    block = (program // splits) % blocks
    n = program // splits // blocks
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    return n, c, c < C, split


@triton.jit
def _count(split, splits, P, tiles, BLOCK_P: tl.constexpr):
    """Return how many values a run has."""
    run = tiles * BLOCK_P
    return tl.where(split < splits - 1, run, P - (splits - 1) * run)


@triton.jit
def _small(n, C, c, split, splits):
    """Return the place of a run in a small array; what is given for n alone is how far apart two such arrays are."""
    return (tl.cast(n, tl.int64) * splits + split) * C + c


@triton.jit
def _tile(split, tiles, t, BLOCK_P: tl.constexpr):
    """Return the positions of a tile."""
    return (split * tiles + t).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)


@triton.jit
def _rows(n, c, stride_n, stride_c):
    """Return where rows begin, in values from the first."""
    return n.to(tl.int64) * stride_n + c.to(tl.int64) * stride_c


@triton.jit
def _mask(inside, p, P):
    return inside[:, None] & (p < P)[None, :]


@triton.jit
def _of_channels(vector, c, inside, default: tl.constexpr):
    """Return a vector's values at channels, or ones or zeros where the layer has none."""
    value = tl.zeros(c.shape, tl.float32) + default
    if vector is not None:
        value = tl.load(vector + c, mask=inside, other=0.0).to(tl.float32)
    return value


@triton.jit
def _weight_of_new(momentum, tracked):
    """Return the weight of a batch in the running statistics: ``momentum``, or 1/n in an average of all."""
    weight = tl.cast(momentum, tl.float64)
    if tracked is not None:
        weight = 1.0 / tl.load(tracked).to(tl.float64)
    return weight


@triton.jit(do_not_specialize=COUNTS)
def moments(
    x, partial, counter, stride_n, stride_c, stride_p, N, C, P, splits, tiles,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Write mean and biased variance of each run, and count a batch where there is a counter."""
    if counter is not None:
        if tl.program_id(0) == 0:  # nobody in this launch reads it
            tl.store(counter, tl.load(counter) + 1)
    n, c, inside, split = _place(C, splits, BLOCK_C)
    rows = x + _rows(n, c, stride_n, stride_c)[:, None]
    count = tl.cast(_count(split, splits, P, tiles, BLOCK_P), tl.float32)
    p = _tile(split, tiles, 0, BLOCK_P)
    mask = _mask(inside, p, P)
    value = tl.load(rows + p[None, :] * stride_p, mask=mask, other=0.0).to(tl.float32)
    pivot = tl.sum(value, 1) / tl.where(count < BLOCK_P, count, BLOCK_P)

    rest = tl.where(mask, value - pivot[:, None], 0.0)
    power = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    lanes = (p < P).to(tl.float32)
    for t in range(1, tiles):
        p = _tile(split, tiles, t, BLOCK_P)
        mask = _mask(inside, p, P)
        value = tl.load(rows + p[None, :] * stride_p, mask=mask, other=0.0).to(tl.float32) - pivot[:, None]
        lanes += (p < P).to(tl.float32)
        difference = value - rest
        rest += tl.where(mask, difference / tl.cast(t + 1, tl.float32), 0.0)
        power += tl.where(mask, difference * (value - rest), 0.0)
    mean = tl.sum(rest * lanes[None, :], 1) / count
    difference = rest - mean[:, None]
    var = tl.sum(power + lanes[None, :] * difference * difference, 1) / count

    at = partial + _small(n, C, c, split, splits)
    tl.store(at, pivot.to(tl.float64) + mean.to(tl.float64), mask=inside)
    tl.store(at + _small(N, C, 0, 0, splits), var.to(tl.float64), mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def products(
    dy, x, partial, line, rows, stride_n, stride_c, stride_p, N, C, P, splits, tiles,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Write the sums of dy·(x - pivot) and of dy of each run; the pivot is the row's mean, or the one in ``line``."""
    n, c, inside, split = _place(C, splits, BLOCK_C)
    if line is None:
        pivot = tl.load(rows + _small(n, C, c, 0, 1), mask=inside, other=0.0).to(tl.float32)
    else:
        pivot = tl.load(line + c, mask=inside, other=0.0)
    offset = _rows(n, c, stride_n, stride_c)[:, None]
    product = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    total = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for t in range(tiles):
        p = _tile(split, tiles, t, BLOCK_P)
        mask = _mask(inside, p, P)
        at = offset + p[None, :] * stride_p
        value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) - pivot[:, None]
        above = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
        product += tl.where(mask, above * value, 0.0)
        total += above
    at = partial + _small(n, C, c, split, splits)
    tl.store(at, tl.sum(product, 1).to(tl.float64), mask=inside)
    tl.store(at + _small(N, C, 0, 0, splits), tl.sum(total, 1).to(tl.float64), mask=inside)


@triton.jit
def _load_gates(gates, MAPS: tl.constexpr):
    """Return the gates of both mixes as they act; a vector's instance statistics are its layer's."""
    m0, m1, m2 = tl.load(gates), tl.load(gates + 1), tl.load(gates + 2)
    v0, v1, v2 = tl.load(gates + 3), tl.load(gates + 4), tl.load(gates + 5)
    if not MAPS:
        m1 += m0
        v1 += v0
    return m1, m2, v0, v1, v2


@triton.jit
def _mix(mean, var, layer_mean, layer_var, batch_mean, batch_var, gates, eps, MAPS: tl.constexpr):
    """Return how far the layer's, the batch's and the mixed mean lie below each own, and the mixed variance."""
    m1, m2, v0, v1, v2 = _load_gates(gates, MAPS)
    above_layer, above_batch = (mean - layer_mean).to(tl.float32), (mean - batch_mean).to(tl.float32)
    mixed = v0 * var.to(tl.float32) + v1 * layer_var.to(tl.float32) + v2 * batch_var.to(tl.float32) + eps
    return above_layer, above_batch, m1 * above_layer + m2 * above_batch, mixed


@triton.jit
def _unbias(count, CORRECTION: tl.constexpr):
    """Return n / (n - 1), with a correction of 0 instead of 1 just 1, in float64."""
    count = tl.cast(count, tl.float64)
    return count / (count - CORRECTION)


@triton.jit
def _load_row(rows, samples, channels, n, c, inside, N, C, P, MAP_CORRECTION: tl.constexpr, BATCH: tl.constexpr):
    """Return what is mixed for rows of one sample: means and variances of instance, layer and batch."""
    at = rows + _small(n, C, c, 0, 1)
    mean = tl.load(at, mask=inside, other=0.0)
    var = tl.load(at + _small(N, C, 0, 0, 1), mask=inside, other=0.0) * _unbias(P, MAP_CORRECTION)
    layer_mean, layer_var = tl.load(samples + n), tl.load(samples + N + n)
    batch_mean, batch_var = mean, tl.zeros(c.shape, tl.float64)
    if BATCH:
        batch_mean = tl.load(channels + c, mask=inside, other=0.0)
        batch_var = tl.load(channels + C + c, mask=inside, other=0.0)
    return mean, var, layer_mean, layer_var, batch_mean, batch_var


@triton.jit(do_not_specialize=COUNTS)
def affine(
    x, y, line, rows, samples, channels, gates, weight, bias, step, eps, stride_n, stride_c, stride_p, N, C, P, splits,
    tiles, MAPS: tl.constexpr, MAP_CORRECTION: tl.constexpr, BATCH: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Write y = (x - pivot)·scale + shift, of a channel's ``line`` or, without one, of the mix of each row.

    A step of a schedule is counted here: the launch before has read it.
    """
    if step is not None:
        if tl.program_id(0) == 0:
            tl.store(step, tl.load(step) + 1)
    n, c, inside, split = _place(C, splits, BLOCK_C)
    if line is None:
        mean, var, layer_mean, layer_var, batch_mean, batch_var = _load_row(
            rows, samples, channels, n, c, inside, N, C, P, MAP_CORRECTION, BATCH
        )
        _above_layer, _above_batch, away, mixed = _mix(
            mean, var, layer_mean, layer_var, batch_mean, batch_var, gates, eps, MAPS
        )
        pivot = mean.to(tl.float32)
        scale = _of_channels(weight, c, inside, 1) / tl.sqrt(mixed)
        away += (pivot.to(tl.float64) - mean).to(tl.float32)
        shift = away * scale + _of_channels(bias, c, inside, 0)
    else:
        pivot = tl.load(line + c, mask=inside, other=0.0)
        scale = tl.load(line + C + c, mask=inside, other=0.0)
        shift = tl.load(line + 2 * C + c, mask=inside, other=0.0)
    offset = _rows(n, c, stride_n, stride_c)[:, None]
    for t in range(tiles):
        p = _tile(split, tiles, t, BLOCK_P)
        mask = _mask(inside, p, P)
        at = offset + p[None, :] * stride_p
        value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        result = (value - pivot[:, None]) * scale[:, None] + shift[:, None]
        tl.store(y + at, result.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def combine(
    dy, x, dx, line, rows, samples, channels, gates, weight, sums, sample_sums, to_batch, d_mean_weight, d_var_weight,
    eps, stride_n, stride_c, stride_p, N, C, P, splits, tiles,
    MAPS: tl.constexpr, MAP_CORRECTION: tl.constexpr, BATCH: tl.constexpr, LIVE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Write dx = scale·dy + slope·(x - pivot) + level, and in the first program the gradients of the gates' logits.

    ``to_batch`` (2, C) is what each value of a channel has for its share in the batch's mean and variance.
    """
    if d_mean_weight is not None:
        if tl.program_id(0) == 0:
            _write_gates(sample_sums, gates, d_mean_weight, d_var_weight, N, MAPS, BATCH, BLOCK_N)
    if dx is not None:
        n, c, inside, split = _place(C, splits, BLOCK_C)
        count = tl.cast(P, tl.float32)
        to_mean = tl.zeros(c.shape, tl.float32)
        to_var = tl.zeros(c.shape, tl.float32)
        if LIVE:
            to_mean = tl.load(to_batch + c, mask=inside, other=0.0).to(tl.float32)
            to_var = tl.load(to_batch + C + c, mask=inside, other=0.0).to(tl.float32)
        if line is None:
            mean, var, layer_mean, layer_var, batch_mean, batch_var = _load_row(
                rows, samples, channels, n, c, inside, N, C, P, MAP_CORRECTION, BATCH
            )
            m1, m2, v0, _v1, _v2 = _load_gates(gates, MAPS)
            above_layer, above_batch, away, mixed = _mix(
                mean, var, layer_mean, layer_var, batch_mean, batch_var, gates, eps, MAPS
            )
            pivot = mean.to(tl.float32)
            rest = (pivot.to(tl.float64) - mean).to(tl.float32)
            scale = _of_channels(weight, c, inside, 1) / tl.sqrt(mixed)
            of_row = sums + _small(n, C, c, 0, 1)
            product = tl.load(of_row, mask=inside, other=0.0)
            total = tl.load(of_row + _small(N, C, 0, 0, 1), mask=inside, other=0.0)
            d_away, _d_scale, d_mixed = _d_mix(product, total, scale, away + rest, mixed)
            d_away_layer = tl.load(sample_sums + n).to(tl.float32)
            d_layer_var = tl.load(sample_sums + N + n).to(tl.float32)
            # of the own mean beside the sum of dy, which is in `level` with the other sign, and of the own variance
            d_mean = (m1 + m2 - 1.0) * d_away - d_away_layer + 2.0 * d_layer_var * above_layer
            d_var = d_layer_var + v0 * d_mixed
            unbias = _unbias(P, MAP_CORRECTION).to(tl.float32)
            slope = 2.0 * unbias * (d_var / count + to_var)
            level = d_mean / count + to_mean + 2.0 * to_var * above_batch + rest * slope
        else:
            pivot = tl.load(line + c, mask=inside, other=0.0)
            scale = tl.load(line + C + c, mask=inside, other=0.0)
            rest = (pivot.to(tl.float64) - tl.load(channels + c, mask=inside, other=0.0)).to(tl.float32)
            slope = 2.0 * to_var
            level = to_mean + rest * slope
        offset = _rows(n, c, stride_n, stride_c)[:, None]
        for t in range(tiles):
            p = _tile(split, tiles, t, BLOCK_P)
            mask = _mask(inside, p, P)
            at = offset + p[None, :] * stride_p
            value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
            above = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
            result = scale[:, None] * above + (slope[:, None] * (value - pivot[:, None]) + level[:, None])
            tl.store(dx + at, result.to(dx.dtype.element_ty), mask=mask)


@triton.jit
def _softmax(logits, temperature, BATCH: tl.constexpr):
    """Return two or three gates and the divisor; a temperature of 0 leaves the largest alone."""
    a, b = tl.load(logits).to(tl.float32), tl.load(logits + 1).to(tl.float32)
    c = float("-inf") + 0.0 * a
    if BATCH:
        c = tl.load(logits + 2).to(tl.float32)
    heat = tl.load(temperature).to(tl.float32)
    divisor = tl.where(heat > 0, heat, 1.0)
    top = tl.where(b > a, b, a)
    top = tl.where(c > top, c, top)
    one, two, three = tl.exp((a - top) / divisor), tl.exp((b - top) / divisor), tl.exp((c - top) / divisor)
    total = one + two + three
    one, two, three = one / total, two / total, three / total
    first = a == top
    second = (b == top) & (a != top)
    soft = heat > 0
    one = tl.where(soft, one, first.to(tl.float32))
    two = tl.where(soft, two, second.to(tl.float32))
    three = tl.where(soft, three, 1.0 - first.to(tl.float32) - second.to(tl.float32))
    return one, two, three, divisor


@triton.jit
def _write_vector(vector, c, value, inside):
    tl.store(vector + c, value.to(tl.float32).to(vector.dtype.element_ty), mask=inside)


@triton.jit
def _batch_moments(
    partial, c, inside, N, C, P, splits, tiles, CORRECTION: tl.constexpr, MAP_CORRECTION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Return the mean and variance of channels over the runs of all samples."""
    runs = N * splits
    values = tl.cast(N, tl.float64) * tl.cast(P, tl.float64)
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float64)
    for begin in range(0, runs, BLOCK_R):
        r = begin + tl.arange(0, BLOCK_R)
        mask = (r < runs)[:, None] & inside[None, :]
        count = _count(r % splits, splits, P, tiles, BLOCK_P)
        at = partial + r.to(tl.int64)[:, None] * C + c[None, :]
        total += tl.load(at, mask=mask, other=0.0) * tl.cast(count, tl.float64)[:, None]
    mean = tl.sum(total, 0) / values
    power = tl.zeros([BLOCK_R, BLOCK_C], tl.float64)
    for begin in range(0, runs, BLOCK_R):
        r = begin + tl.arange(0, BLOCK_R)
        mask = (r < runs)[:, None] & inside[None, :]
        count = _count(r % splits, splits, P, tiles, BLOCK_P)
        at = partial + r.to(tl.int64)[:, None] * C + c[None, :]
        difference = tl.load(at, mask=mask, other=0.0) - mean[None, :]
        var = tl.load(at + _small(N, C, 0, 0, splits), mask=mask, other=0.0) * _unbias(P, MAP_CORRECTION)
        squares = (var + difference * difference) * tl.cast(count, tl.float64)[:, None]
        power += tl.where(mask, squares, 0.0)
    return mean, tl.sum(power, 0) / (values - CORRECTION)


@triton.jit
def _row_moments(
    partial, n, c, inside, N, C, P, splits, tiles, SPLITS: tl.constexpr, BLOCK_P: tl.constexpr
):  # fmt: skip
    """Return the mean and variance of rows of one sample."""
    s = tl.arange(0, SPLITS)
    mask = (s < splits)[:, None] & inside[None, :]
    count = tl.where(s < splits, _count(s, splits, P, tiles, BLOCK_P), 0).to(tl.float64)
    at = partial + _small(n, C, c[None, :], s[:, None], splits)
    means = tl.load(at, mask=mask, other=0.0)
    mean = tl.sum(means * count[:, None], 0) / tl.cast(P, tl.float64)
    difference = means - mean[None, :]
    var = tl.load(at + _small(N, C, 0, 0, splits), mask=mask, other=0.0)
    power = tl.where(mask, (var + difference * difference) * count[:, None], 0.0)
    return mean, tl.sum(power, 0) / tl.cast(P, tl.float64)


@triton.jit
def _move(running, value, c, inside, weight):
    """Move a running statistic towards a batch's value."""
    old = tl.load(running + c, mask=inside, other=0.0).to(tl.float64)
    _write_vector(running, c, old + weight * (value - old), inside)


@triton.jit
def _sample_forward(
    n, partial, rows, samples, N, C, P, splits, tiles, MAP_CORRECTION: tl.constexpr, LAYER_CORRECTION: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Write a sample's rows and layer statistics."""
    total = tl.zeros([BLOCK], tl.float64)
    for begin in range(0, C, BLOCK):
        c = begin + tl.arange(0, BLOCK)
        mean, var = _row_moments(partial, n, c, c < C, N, C, P, splits, tiles, SPLITS, BLOCK_P)
        total += tl.where(c < C, mean, 0.0)
        if SPLITS > 1:
            tl.store(rows + _small(n, C, c, 0, 1), mean, mask=c < C)
            tl.store(rows + _small(n, C, c, 0, 1) + _small(N, C, 0, 0, 1), var, mask=c < C)
    layer_mean = tl.sum(total, 0) / tl.cast(C, tl.float64)
    power = tl.zeros([BLOCK], tl.float64)
    for begin in range(0, C, BLOCK):
        c = begin + tl.arange(0, BLOCK)
        mean, var = _row_moments(partial, n, c, c < C, N, C, P, splits, tiles, SPLITS, BLOCK_P)
        difference = mean - layer_mean
        squares = var * _unbias(P, MAP_CORRECTION) + difference * difference
        power += tl.where(c < C, squares, 0.0)
    layer_var = tl.sum(power, 0) / tl.cast(C, tl.float64) * _unbias(C, LAYER_CORRECTION)
    tl.store(samples + n, layer_mean)
    tl.store(samples + N + n, layer_var)


@triton.jit
def _channels_forward(
    strip, partial, channels, running_mean, running_var, momentum, tracked, N, C, P, splits, tiles,
    MAP_CORRECTION: tl.constexpr, BATCH_CORRECTION: tl.constexpr, LIVE: tl.constexpr, MOVES: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Write batch statistics, the batch's or the running ones, and move these."""
    c = strip * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < C
    if LIVE:
        mean, var = _batch_moments(
            partial, c, inside, N, C, P, splits, tiles, BATCH_CORRECTION, MAP_CORRECTION,
            BLOCK_R, BLOCK_C, BLOCK_P,
        )  # fmt: skip
    else:
        mean = tl.load(running_mean + c, mask=inside, other=0.0).to(tl.float64)
        var = tl.load(running_var + c, mask=inside, other=0.0).to(tl.float64)
    tl.store(channels + c, mean, mask=inside)
    tl.store(channels + C + c, var, mask=inside)
    if MOVES:
        _move(running_mean, mean, c, inside, _weight_of_new(momentum, tracked))
        _move(running_var, var, c, inside, _weight_of_new(momentum, tracked))


@triton.jit(do_not_specialize=COUNTS)
def switch_forward(
    partial, rows, samples, channels, gates, mean_weight, var_weight, temperature, running_mean, running_var, momentum,
    tracked, N, C, P, splits, tiles, MAP_CORRECTION: tl.constexpr, LAYER_CORRECTION: tl.constexpr,
    BATCH_CORRECTION: tl.constexpr, BATCH: tl.constexpr, LIVE: tl.constexpr, MOVES: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Write rows, layer statistics, gates and batch statistics of SN, and move the running ones.

    The first N programs take a sample each, the others ``BLOCK_C`` channels. ``SPLITS`` is the power of 2 that
    ``splits`` fits in.
    """
    program = tl.program_id(0)
    if program < N:
        if program == 0:
            m0, m1, m2, divisor = _softmax(mean_weight, temperature, BATCH)
            v0, v1, v2, divisor = _softmax(var_weight, temperature, BATCH)
            tl.store(gates, m0)
            tl.store(gates + 1, m1)
            tl.store(gates + 2, m2)
            tl.store(gates + 3, v0)
            tl.store(gates + 4, v1)
            tl.store(gates + 5, v2)
            tl.store(gates + 6, divisor)
        _sample_forward(
            program, partial, rows, samples, N, C, P, splits, tiles, MAP_CORRECTION, LAYER_CORRECTION, SPLITS, BLOCK,
            BLOCK_P,
        )  # fmt: skip
    elif BATCH:
        _channels_forward(
            program - N, partial, channels, running_mean, running_var, momentum, tracked, N, C, P, splits, tiles,
            MAP_CORRECTION, BATCH_CORRECTION, LIVE, MOVES, BLOCK_R, BLOCK_C, BLOCK_P,
        )  # fmt: skip


@triton.jit
def _d_mix(product, total, scale, away, mixed):
    """Return the gradients of how far the mixed mean lies below the own, of the scale and of the mixed variance."""
    product, total = product.to(tl.float32), total.to(tl.float32)
    d_scale = product + away * total
    return scale * total, d_scale, d_scale * scale * (-0.5 / mixed)


@triton.jit
def _sample_backward(
    n, partial, sums, rows, samples, channels, gates, weight, sample_sums, eps, N, C, P, splits, MAPS: tl.constexpr,
    MAP_CORRECTION: tl.constexpr, LAYER_CORRECTION: tl.constexpr, BATCH: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the sums over a sample."""
    m1, _m2, _v0, v1, _v2 = _load_gates(gates, MAPS)
    of_away = tl.zeros([BLOCK], tl.float64)
    of_mixed = tl.zeros([BLOCK], tl.float64)
    mean_layer = tl.zeros([BLOCK], tl.float64)
    mean_batch = tl.zeros([BLOCK], tl.float64)
    var_own = tl.zeros([BLOCK], tl.float64)
    var_batch = tl.zeros([BLOCK], tl.float64)
    s = tl.arange(0, SPLITS)
    layer_var = tl.load(samples + N + n)
    for begin in range(0, C, BLOCK):
        c = begin + tl.arange(0, BLOCK)
        inside = c < C
        mask = (s < splits)[:, None] & inside[None, :]
        at = partial + _small(n, C, c[None, :], s[:, None], splits)
        product = tl.sum(tl.load(at, mask=mask, other=0.0), 0)
        total = tl.sum(tl.load(at + _small(N, C, 0, 0, splits), mask=mask, other=0.0), 0)
        if SPLITS > 1:
            tl.store(sums + _small(n, C, c, 0, 1), product, mask=inside)
            tl.store(sums + _small(n, C, c, 0, 1) + _small(N, C, 0, 0, 1), total, mask=inside)
        mean, var, layer_mean, _layer_var, batch_mean, batch_var = _load_row(
            rows, samples, channels, n, c, inside, N, C, P, MAP_CORRECTION, BATCH
        )
        above_layer, above_batch, away, mixed = _mix(
            mean, var, layer_mean, layer_var, batch_mean, batch_var, gates, eps, MAPS
        )
        rest = (mean.to(tl.float32).to(tl.float64) - mean).to(tl.float32)
        scale = _of_channels(weight, c, inside, 1) / tl.sqrt(mixed)
        d_away, _d_scale, d_mixed = _d_mix(product, total, scale, away + rest, mixed)
        d_away = tl.where(inside, d_away, 0.0)
        d_mixed = tl.where(inside, d_mixed, 0.0).to(tl.float64)
        of_away += d_away.to(tl.float64)
        of_mixed += d_mixed
        mean_layer += tl.where(inside, d_away * above_layer, 0.0).to(tl.float64)
        mean_batch += tl.where(inside, d_away * above_batch, 0.0).to(tl.float64)
        var_own += d_mixed * var
        var_batch += d_mixed * batch_var
    channels_of_all = tl.cast(C, tl.float64)
    mixed_of_all = tl.sum(of_mixed, 0)
    at = sample_sums + n
    tl.store(at, m1 * tl.sum(of_away, 0) / channels_of_all)
    tl.store(at + N, v1 * mixed_of_all / channels_of_all * _unbias(C, LAYER_CORRECTION))
    tl.store(at + 2 * N, tl.sum(mean_layer, 0))
    tl.store(at + 3 * N, tl.sum(mean_batch, 0))
    tl.store(at + 4 * N, tl.sum(var_own, 0))
    tl.store(at + 5 * N, mixed_of_all * layer_var)
    tl.store(at + 6 * N, tl.sum(var_batch, 0))


@triton.jit
def _channels_backward(
    strip, partial, rows, samples, channels, gates, weight, to_batch, d_weight, d_bias, eps, N, C, P, splits,
    MAPS: tl.constexpr, MAP_CORRECTION: tl.constexpr, BATCH_CORRECTION: tl.constexpr, BATCH: tl.constexpr,
    LIVE: tl.constexpr, RAW: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write the sums over all samples."""
    _m1, m2, _v0, _v1, v2 = _load_gates(gates, MAPS)
    c = strip * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < C
    gamma = _of_channels(weight, c, inside, 1)[None, :]
    batch_mean = tl.zeros([BLOCK_C], tl.float64)
    batch_var = tl.zeros([BLOCK_C], tl.float64)
    if BATCH:
        batch_mean = tl.load(channels + c, mask=inside, other=0.0)
        batch_var = tl.load(channels + C + c, mask=inside, other=0.0)
    of_away = tl.zeros([BLOCK_R, BLOCK_C], tl.float64)
    of_mixed = tl.zeros([BLOCK_R, BLOCK_C], tl.float64)
    of_gamma = tl.zeros([BLOCK_R, BLOCK_C], tl.float64)
    of_beta = tl.zeros([BLOCK_R, BLOCK_C], tl.float64)
    runs = N * splits
    for begin in range(0, runs, BLOCK_R):
        r = begin + tl.arange(0, BLOCK_R)
        n = r // splits
        mask = (r < runs)[:, None] & inside[None, :]
        at = rows + _small(n[:, None], C, c[None, :], 0, 1)
        mean = tl.load(at, mask=mask, other=0.0)
        var = tl.load(at + _small(N, C, 0, 0, 1), mask=mask, other=0.0) * _unbias(P, MAP_CORRECTION)
        layer_mean = tl.load(samples + n, mask=r < runs, other=0.0)[:, None]
        layer_var = tl.load(samples + N + n, mask=r < runs, other=0.0)[:, None]
        compared = batch_mean[None, :]
        if not BATCH:
            compared = mean
        _above_layer, _above_batch, away, mixed = _mix(
            mean, var, layer_mean, layer_var, compared, batch_var[None, :], gates, eps, MAPS
        )
        rest = (mean.to(tl.float32).to(tl.float64) - mean).to(tl.float32)
        sigma = tl.sqrt(mixed)
        at = partial + _small(r[:, None], C, c[None, :], 0, 1)
        product = tl.load(at, mask=mask, other=0.0)
        total = tl.load(at + _small(N, C, 0, 0, splits), mask=mask, other=0.0)
        d_away, d_scale, d_mixed = _d_mix(product, total, gamma / sigma, away + rest, mixed)
        of_away += tl.where(mask, d_away, 0.0).to(tl.float64)
        of_mixed += tl.where(mask, d_mixed, 0.0).to(tl.float64)
        of_gamma += tl.where(mask, d_scale / sigma, 0.0).to(tl.float64)
        of_beta += total
    if LIVE:
        values = tl.cast(N, tl.float64) * tl.cast(P, tl.float64)
        d_mean, d_var = -m2 * tl.sum(of_away, 0), v2 * tl.sum(of_mixed, 0)
        if not RAW:
            d_mean = d_mean / values
            d_var = d_var / (values - BATCH_CORRECTION)
        tl.store(to_batch + c, d_mean, mask=inside)
        tl.store(to_batch + C + c, d_var, mask=inside)
    if d_weight is not None:
        _write_vector(d_weight, c, tl.sum(of_gamma, 0), inside)
    if d_bias is not None:
        _write_vector(d_bias, c, tl.sum(of_beta, 0), inside)


@triton.jit(do_not_specialize=COUNTS)
def switch_backward(
    partial, sums, rows, samples, channels, gates, weight, sample_sums, to_batch, d_weight, d_bias, eps,
    N, C, P, splits, MAPS: tl.constexpr, MAP_CORRECTION: tl.constexpr, LAYER_CORRECTION: tl.constexpr,
    BATCH_CORRECTION: tl.constexpr, BATCH: tl.constexpr, LIVE: tl.constexpr, RAW: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write SN's gradients of γ and β, and what `combine` needs of samples and of the batch.

    ``sums`` (2, N, C) are of each row, ``sample_sums`` (7, N) what a row has of its layer's mean and variance, and the
    sums of which the gates' gradients are made, mean of layer and batch, variance of instance, layer and batch.
    ``RAW`` leaves ``to_batch`` as sums, for other processes' to be added.
    """
    program = tl.program_id(0)
    if program < N:
        _sample_backward(
            program, partial, sums, rows, samples, channels, gates, weight, sample_sums, eps, N, C, P, splits, MAPS,
            MAP_CORRECTION, LAYER_CORRECTION, BATCH, SPLITS, BLOCK,
        )  # fmt: skip
    else:
        _channels_backward(
            program - N, partial, rows, samples, channels, gates, weight, to_batch, d_weight, d_bias, eps, N, C, P,
            splits, MAPS, MAP_CORRECTION, BATCH_CORRECTION, BATCH, LIVE, RAW, BLOCK_R, BLOCK_C,
        )  # fmt: skip


@triton.jit
def _write_logits(logits, one, two, three, d_one, d_two, d_three, divisor, BATCH: tl.constexpr):
    """Write the gradients of logits for those of their gates; where one gate is all they are 0."""
    common = one * d_one + two * d_two + three * d_three
    tl.store(logits, (one * (d_one - common) / divisor).to(logits.dtype.element_ty))
    tl.store(logits + 1, (two * (d_two - common) / divisor).to(logits.dtype.element_ty))
    if BATCH:
        tl.store(logits + 2, (three * (d_three - common) / divisor).to(logits.dtype.element_ty))


@triton.jit
def _sum_of_samples(values, N, BLOCK_N: tl.constexpr):
    total = tl.zeros([BLOCK_N], tl.float64)
    for begin in range(0, N, BLOCK_N):
        n = begin + tl.arange(0, BLOCK_N)
        total += tl.load(values + n, mask=n < N, other=0.0)
    return tl.sum(total, 0).to(tl.float32)


@triton.jit
def _write_gates(
    sample_sums, gates, d_mean_weight, d_var_weight, N, MAPS: tl.constexpr, BATCH: tl.constexpr, BLOCK_N: tl.constexpr
):
    d_mean_layer = _sum_of_samples(sample_sums + 2 * N, N, BLOCK_N)
    d_mean_batch = _sum_of_samples(sample_sums + 3 * N, N, BLOCK_N)
    d_var_own = _sum_of_samples(sample_sums + 4 * N, N, BLOCK_N)
    d_var_layer = _sum_of_samples(sample_sums + 5 * N, N, BLOCK_N)
    d_var_batch = _sum_of_samples(sample_sums + 6 * N, N, BLOCK_N)
    d_mean_own = 0.0 * d_mean_layer
    if not MAPS:
        d_mean_own = d_mean_layer
        d_var_own = d_var_layer
    m0, m1, m2 = tl.load(gates), tl.load(gates + 1), tl.load(gates + 2)
    v0, v1, v2 = tl.load(gates + 3), tl.load(gates + 4), tl.load(gates + 5)
    divisor = tl.load(gates + 6)
    _write_logits(d_mean_weight, m0, m1, m2, d_mean_own, d_mean_layer, d_mean_batch, divisor, BATCH)
    _write_logits(d_var_weight, v0, v1, v2, d_var_own, d_var_layer, d_var_batch, divisor, BATCH)


@triton.jit
def _clip(value, low, high):
    """Return what torch.clip does, NaNs included."""
    value = tl.where(value < low, low, value)
    return tl.where(value > high, high, value)


@triton.jit
def _ramp(progress, begin, end):
    return _clip((progress - begin) / (end - begin), 0.0, 1.0)


@triton.jit
def _scheduled(step, r_most, d_most, begin, r_end, d_end, steps, t_delta, start, SIGMOID: tl.constexpr):
    """Return the limits at a step, as `normswap.layers.limits.limits_at` does."""
    now = tl.load(step).to(tl.float32)
    if SIGMOID:
        t = now * t_delta
        r = r_most / (1.0 + (r_most - 1.0) * tl.exp(-t))
        d = tl.where(d_most > 0.0, d_most / (1.0 + (d_most / start - 1.0) * tl.exp(-2.0 * t)), 0.0)
    else:
        progress = now / steps
        r = 1.0 + (r_most - 1.0) * _ramp(progress, begin, r_end)
        d = d_most * _ramp(progress, begin, d_end)
    return r, d


@triton.jit(do_not_specialize=COUNTS)
def renorm_forward(
    partial, channels, line, running_mean, running_var, r_max, d_max, weight, bias, momentum, tracked, eps, step,
    r_most, d_most, begin, r_end, d_end, steps, t_delta, start, N, C, P, splits, tiles, SIGMOID: tl.constexpr,
    FINISH: tl.constexpr, MOVES: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Write a batch's moments, unless they are there, then BRN's r and d and line, and move the running statistics.

    Where there is a ``step`` the limits are those of a schedule, and are written.
    ``channels`` (4, C) are mean, variance, r and d of the batch, ``line`` (3, C) pivot, scale and shift of the data.
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < C
    if partial is not None:
        mean, var = _batch_moments(
            partial, c, inside, N, C, P, splits, tiles, 0, 0, BLOCK_R, BLOCK_C, BLOCK_P
        )  # fmt: skip
        tl.store(channels + c, mean, mask=inside)
        tl.store(channels + C + c, var, mask=inside)
    else:
        mean = tl.load(channels + c, mask=inside, other=0.0)
        var = tl.load(channels + C + c, mask=inside, other=0.0)
    if FINISH:
        sigma = tl.sqrt(var + eps)
        old_mean = tl.load(running_mean + c, mask=inside, other=0.0).to(tl.float64)
        old_sigma = tl.sqrt(tl.load(running_var + c, mask=inside, other=1.0).to(tl.float64) + eps)
        if step is not None:
            most, far = _scheduled(step, r_most, d_most, begin, r_end, d_end, steps, t_delta, start, SIGMOID)
            if tl.program_id(0) == 0:  # the others compute it, too
                tl.store(r_max, most)
                tl.store(d_max, far)
        else:
            most, far = tl.load(r_max).to(tl.float32), tl.load(d_max).to(tl.float32)
        most, far = most.to(tl.float64), far.to(tl.float64)
        r = _clip(sigma / old_sigma, 1.0 / most, most)
        d = _clip((mean - old_mean) / old_sigma, -far, far)
        gamma = _of_channels(weight, c, inside, 1).to(tl.float64)
        beta = _of_channels(bias, c, inside, 0).to(tl.float64)
        scale = gamma * r / sigma
        pivot = mean.to(tl.float32)
        shift = (pivot.to(tl.float64) - mean) * scale + (gamma * d + beta)
        tl.store(channels + 2 * C + c, r, mask=inside)
        tl.store(channels + 3 * C + c, d, mask=inside)
        tl.store(line + c, pivot, mask=inside)
        tl.store(line + C + c, scale.to(tl.float32), mask=inside)
        tl.store(line + 2 * C + c, shift.to(tl.float32), mask=inside)
        if MOVES:
            share = _weight_of_new(momentum, tracked)
            _write_vector(running_mean, c, old_mean + share * (mean - old_mean), inside)
            averaged = old_sigma + share * (sigma - old_sigma)
            moved = averaged * averaged - eps
            _write_vector(running_var, c, tl.where(moved < 0, 0.0, moved), inside)


@triton.jit(do_not_specialize=COUNTS)
def renorm_backward(
    partial, channels, line, to_batch, d_weight, d_bias, eps, N, C, P, splits, RAW: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write BRN's gradients of γ and β, and what `combine` needs of the batch; ``RAW`` as in `switch_backward`."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = c < C
    products = tl.zeros([BLOCK_R, BLOCK_C], tl.float64)
    totals = tl.zeros([BLOCK_R, BLOCK_C], tl.float64)
    runs = N * splits
    for begin in range(0, runs, BLOCK_R):
        r = begin + tl.arange(0, BLOCK_R)
        mask = (r < runs)[:, None] & inside[None, :]
        at = partial + _small(r[:, None], C, c[None, :], 0, 1)
        products += tl.load(at, mask=mask, other=0.0)
        totals += tl.load(at + _small(N, C, 0, 0, splits), mask=mask, other=0.0)
    mean = tl.load(channels + c, mask=inside, other=0.0)
    var = tl.load(channels + C + c, mask=inside, other=1.0) + eps
    r = tl.load(channels + 2 * C + c, mask=inside, other=0.0)
    d = tl.load(channels + 3 * C + c, mask=inside, other=0.0)
    pivot = tl.load(line + c, mask=inside, other=0.0).to(tl.float64)
    scale = tl.load(line + C + c, mask=inside, other=0.0).to(tl.float64)
    total = tl.sum(totals, 0)
    d_scale = tl.sum(products, 0) + (pivot - mean) * total
    d_mean, d_var = -scale * total, d_scale * scale * (-0.5 / var)
    if not RAW:
        values = tl.cast(N, tl.float64) * tl.cast(P, tl.float64)
        d_mean = d_mean / values
        d_var = d_var / values
    tl.store(to_batch + c, d_mean, mask=inside)
    tl.store(to_batch + C + c, d_var, mask=inside)
    if d_weight is not None:
        _write_vector(d_weight, c, d_scale * r / tl.sqrt(var) + total * d, inside)
    if d_bias is not None:
        _write_vector(d_bias, c, total, inside)
