"""The passes over the data on a CPU, compiled by Numba: each goes through its arrays once.

There is one set for contiguous data, as rows (N·C, P), and one for channels-last data (N, P, C); the arrays per sample
and channel are (N·C,) and (N, C). Sums run in the data's dtype over a strip, which stays in the first-level cache, and
in float64 over strips; moments of strips are merged as in Chan et al., "Updating Formulae and a Pairwise Algorithm for
Computing Sample Variances" (1979). They are taken about a guess of the mean, and once more about the mean where the
guess was far from it. Values of several rows are added up first where channels are last, to load and store the sums
less often.
"""

from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple, TypeVar, cast

import numba
import numpy as np
from numba import prange
from numpy.typing import NDArray

Values = NDArray[Any]
Array = NDArray[np.float64]
Function = TypeVar("Function", bound=Callable[..., Any])

ROW_STRIP = 4096
LAST_STRIP = 64
SAMPLE = 16
"""Values whose mean is the guess of a row's."""

ROW_SHARE = 0.2
LAST_SHARE = 0.5
"""More is allowed where one channel in a strip that is far from the guess has all of them summed again."""


class Kernel(NamedTuple):
    """One function compiled twice, each time at the first call."""

    serial: Callable[..., None]
    parallel: Callable[..., None]


def kernel(function: Any) -> Kernel:
    """Compile a function whose outer loop, over `prange`, may be shared by threads."""
    shared = FunctionType(function.__code__, function.__globals__)
    shared.__qualname__ = f"{function.__qualname__}_shared"  # the name in Numba's cache, where options do not count
    return Kernel(jit(function), jit(shared, parallel=True))


def set_num_threads(threads: int) -> None:
    """Let kernels compiled in parallel run on so many threads, or on all there are."""
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]


def jit(function: Function, **options: Any) -> Function:
    """Compile a function at its first call."""
    # Sums may be reordered (else none of them is vectorized); nothing is assumed of infinities and NaNs.
    options |= {"nogil": True, "fastmath": {"reassoc", "contract"}, "error_model": "numpy"}
    # What is compiled is kept in pickles, and Numba lets this file in the working folder, anybody's, say where.
    kept = not Path(".numba_config.yaml").exists()
    try:
        return cast(Function, numba.njit(cache=kept, **options)(function))
    except RuntimeError:  # nowhere to write the cache to
        return cast(Function, numba.njit(**options)(function))


@jit
def _sum(row: Values) -> Any:
    total = row.dtype.type(0)
    for i in range(row.shape[0]):
        total += row[i]
    return total


@jit
def _sums_of_difference(row: Values, pivot: Any) -> tuple[Any, Any]:
    total, squares = row.dtype.type(0), row.dtype.type(0)
    for i in range(row.shape[0]):
        difference = row[i] - pivot
        total += difference
        squares += difference * difference
    return total, squares


@jit
def _sums_of_product(dy: Values, x: Values, pivot: Any) -> tuple[Any, Any]:
    product, total = x.dtype.type(0), x.dtype.type(0)
    for i in range(x.shape[0]):
        product += dy[i] * (x[i] - pivot)
        total += dy[i]
    return product, total


@jit
def _far(total: Any, squares: Any, count: int, share: float) -> bool:
    """Whether more than a share of the squares about a pivot is its distance from the mean, which costs digits."""
    return bool(total * total > share * squares * count)


@jit
def _merge(mean: Any, power: Any, pivot: Any, rest: Any, squares: Any, share: Any, weight: Any) -> tuple[Any, Any]:
    """Return mean and sum of squares with a strip's, whose mean is ``pivot + rest`` and whose squares are about it."""
    difference = pivot + rest - mean
    return mean + difference * share, power + squares + difference * difference * weight


@jit
def row_moments(row: Values) -> tuple[Any, Any]:
    """Return a row's mean and biased variance."""
    mean, power = 0.0, 0.0
    for begin in range(0, row.size, ROW_STRIP):
        strip = row[begin : begin + ROW_STRIP]
        count = strip.size
        sample = strip[:SAMPLE]
        pivot = row.dtype.type(np.float64(_sum(sample)) / sample.size)
        total, squares = _sums_of_difference(strip, pivot)
        if _far(total, squares, count, ROW_SHARE):
            pivot += row.dtype.type(np.float64(total) / count)
            total, squares = _sums_of_difference(strip, pivot)
        rest = np.float64(total) / count
        exact = squares - rest * total
        if begin == 0:
            mean, power = pivot + rest, exact
        else:
            share = count / (begin + count)
            mean, power = _merge(mean, power, np.float64(pivot), rest, exact, share, begin * share)
    return mean, max(power / row.size, 0.0)


@jit
def row_affine(x: Values, y: Values, pivot: Any, scale: Any, shift: Any) -> None:
    """Write a row's y = (x - pivot)·scale + shift."""
    for i in range(x.size):
        y[i] = (x[i] - pivot) * scale + shift


@kernel
def rows_moments(x: Values, mean: Array, var: Array) -> None:
    """Write each row's mean and biased variance."""
    for r in prange(x.shape[0]):
        mean[r], var[r] = row_moments(x[r])


@kernel
def rows_affine(x: Values, y: Values, pivot: Values, scale: Values, shift: Values) -> None:
    """Write y = (x - pivot)·scale + shift."""
    for r in prange(x.shape[0]):
        row_affine(x[r], y[r], pivot[r], scale[r], shift[r])


@kernel
def rows_products(dy: Values, x: Values, pivot: Values, products: Array, sums: Array) -> None:
    """Write each row's sums of dy·(x - pivot) and of dy."""
    for r in prange(x.shape[0]):
        product, total = 0.0, 0.0
        for begin in range(0, x.shape[1], ROW_STRIP):
            end = begin + ROW_STRIP
            some, others = _sums_of_product(dy[r, begin:end], x[r, begin:end], pivot[r])
            product += some
            total += others
        products[r], sums[r] = product, total


@kernel
def rows_combine(dy: Values, x: Values, dx: Values, pivot: Values, scale: Values, slope: Values, level: Values) -> None:
    """Write dx = scale·dy + slope·(x - pivot) + level."""
    for r in prange(x.shape[0]):
        p, a, s, b = pivot[r], scale[r], slope[r], level[r]
        for i in range(x.shape[1]):
            dx[r, i] = a * dy[r, i] + (s * (x[r, i] - p) + b)


@jit
def _add(strip: Values, total: Values) -> None:
    size, channels = strip.shape
    for i in range(0, size - size % 4, 4):
        for c in range(channels):
            total[c] += (strip[i, c] + strip[i + 1, c]) + (strip[i + 2, c] + strip[i + 3, c])
    for i in range(size - size % 4, size):
        for c in range(channels):
            total[c] += strip[i, c]


@jit
def _add_differences(strip: Values, pivot: Values, total: Values, squares: Values) -> None:
    size, channels = strip.shape
    for i in range(0, size - size % 2, 2):
        for c in range(channels):
            one, two = strip[i, c] - pivot[c], strip[i + 1, c] - pivot[c]
            total[c] += one + two
            squares[c] += one * one + two * two
    for i in range(size - size % 2, size):
        for c in range(channels):
            one = strip[i, c] - pivot[c]
            total[c] += one
            squares[c] += one * one


@jit
def _add_products(dy: Values, x: Values, pivot: Values, product: Values, total: Values) -> None:
    size, channels = x.shape
    for i in range(0, size - size % 4, 4):
        for c in range(channels):
            p = pivot[c]
            one, two = dy[i, c] * (x[i, c] - p), dy[i + 1, c] * (x[i + 1, c] - p)
            three, four = dy[i + 2, c] * (x[i + 2, c] - p), dy[i + 3, c] * (x[i + 3, c] - p)
            product[c] += (one + two) + (three + four)
            total[c] += (dy[i, c] + dy[i + 1, c]) + (dy[i + 2, c] + dy[i + 3, c])
    for i in range(size - size % 4, size):
        for c in range(channels):
            product[c] += dy[i, c] * (x[i, c] - pivot[c])
            total[c] += dy[i, c]


@jit
def _any_far(total: Values, squares: Values, count: int) -> bool:
    far = False
    for c in range(total.size):
        far |= _far(total[c], squares[c], count, LAST_SHARE)
    return far


@jit
def map_moments(x: Values, mean: Array, power: Array) -> None:
    """Write the mean and biased variance of a sample (P, C) per channel; ``power`` is the variance at the end."""
    size, channels = x.shape
    pivot, total, squares = np.empty(channels, x.dtype), np.zeros(channels, x.dtype), np.empty(channels, x.dtype)
    mean[:] = 0
    power[:] = 0
    for begin in range(0, size, LAST_STRIP):
        strip = x[begin : begin + LAST_STRIP]
        count = strip.shape[0]
        if begin == 0:
            _add(strip, total)
            pivot[:] = total / count
        else:
            pivot[:] = mean
        total[:] = 0
        squares[:] = 0
        _add_differences(strip, pivot, total, squares)
        if _any_far(total, squares, count):
            pivot += total / count
            total[:] = 0
            squares[:] = 0
            _add_differences(strip, pivot, total, squares)
        share, inverse = count / (begin + count), 1 / count
        weight = begin * share
        for c in range(channels):
            rest = total[c] * inverse
            exact = squares[c] - rest * total[c]
            mean[c], power[c] = _merge(mean[c], power[c], pivot[c], rest, exact, share, weight)
    for c in range(channels):
        power[c] = max(power[c] / size, 0.0)


@jit
def map_affine(x: Values, y: Values, pivot: Values, scale: Values, shift: Values) -> None:
    """Write y = (x - pivot)·scale + shift of a sample (P, C)."""
    size, channels = x.shape
    for i in range(size):
        for c in range(channels):
            y[i, c] = (x[i, c] - pivot[c]) * scale[c] + shift[c]


@kernel
def last_moments(x: Values, mean: Array, var: Array) -> None:
    """Write each sample's mean and biased variance per channel."""
    for n in prange(x.shape[0]):
        map_moments(x[n], mean[n], var[n])


@kernel
def last_affine(x: Values, y: Values, pivot: Values, scale: Values, shift: Values) -> None:
    """Write y = (x - pivot)·scale + shift."""
    for n in prange(x.shape[0]):
        map_affine(x[n], y[n], pivot[n], scale[n], shift[n])


@kernel
def last_products(dy: Values, x: Values, pivot: Values, products: Array, sums: Array) -> None:
    """Write each sample's sums of dy·(x - pivot) and of dy per channel."""
    for n in prange(x.shape[0]):
        product, total = np.empty(x.shape[2], x.dtype), np.empty(x.shape[2], x.dtype)
        products[n] = 0
        sums[n] = 0
        for begin in range(0, x.shape[1], LAST_STRIP):
            end = begin + LAST_STRIP
            product[:] = 0
            total[:] = 0
            _add_products(dy[n, begin:end], x[n, begin:end], pivot[n], product, total)
            products[n] += product
            sums[n] += total


@kernel
def last_combine(dy: Values, x: Values, dx: Values, pivot: Values, scale: Values, slope: Values, level: Values) -> None:
    """Write dx = scale·dy + slope·(x - pivot) + level."""
    for n in prange(x.shape[0]):
        p, a, s, b = pivot[n], scale[n], slope[n], level[n]
        for i in range(x.shape[1]):
            for c in range(x.shape[2]):
                dx[n, i, c] = a[c] * dy[n, i, c] + (s[c] * (x[n, i, c] - p[c]) + b[c])


MOMENTS = rows_moments, last_moments
AFFINE = rows_affine, last_affine
PRODUCTS = rows_products, last_products
COMBINE = rows_combine, last_combine
"""Each pass for both layouts."""
