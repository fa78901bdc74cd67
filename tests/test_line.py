"""The line through what a norm returns over what it is given: sums that stream, and the BatchNorm that computes it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from normswap.convert.line import LineFit


def pair(seed=0, rows=200, offset=0.0):
    """Inputs and outputs (N, 3) of three channels that a line explains to different shares."""
    random = np.random.default_rng(seed)
    x = random.normal(offset, [1.0, 0.1, 5.0], (rows, 3))
    y = x * [2.0, -30.0, 0.1] + [1.0, 0.0, -4.0] + random.normal(0, [0.01, 1.0, 1.0], (rows, 3))
    return x, y


def fitted(x, y, *cuts):
    """The fit to parts of the pair, cut at these rows."""
    fit = LineFit()
    for part in zip(np.split(x, cuts), np.split(y, cuts), strict=True):
        fit.add(*part)
    return fit


@pytest.mark.parametrize("offset", [0.0, 1e6])
@given(seed=st.integers(0, 99), cut=st.integers(1, 199))
def test_parts_are_as_good_as_the_whole(offset, seed, cut):
    """The moments of a stream do not depend on how it is cut, also where means are far above deviations."""
    x, y = pair(seed, offset=offset)
    line = fitted(x, y, cut).line()

    np.testing.assert_allclose(line.mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(line.var, x.var(0), rtol=1e-6)
    np.testing.assert_allclose(line.out, y.var(0), rtol=1e-6)


def test_the_batch_norm_computes_the_line():
    """γ, β, mean and variance give what the line says, whatever ε is."""
    x, y = pair()
    line = fitted(x, y, 50).line()
    for eps in (1e-5, 1e-3, 1.0):
        norm = line.batch_norm(eps)
        computed = norm.gamma * (x - norm.mean) / np.sqrt(norm.var + eps) + norm.beta

        np.testing.assert_allclose(computed, line.level + line.slope * (x - line.mean), rtol=1e-9, atol=1e-9)


def test_the_drop_is_what_is_left_of_the_deviation():
    """It is the root of the mean square distance over that of the deviation, all channels together."""
    x, y = pair()
    line = fitted(x, y).line()
    left = np.square(y - line.level - line.slope * (x - line.mean)).mean(0)

    np.testing.assert_allclose(line.left, left, rtol=1e-9)
    assert line.drop == pytest.approx(np.sqrt(left.sum() / y.var(0).sum()))
    assert fitted(x, 3 * x + 1).line().drop == pytest.approx(0, abs=1e-7)


def test_the_line_keeps_the_deviation_while_it_is_nearer_than_a_constant():
    """The slope is that of the deviations, with the correlation's sign, or less where the two hardly correlate."""
    random = np.random.default_rng(0)
    x, noise = random.normal(size=(2, 20_000))
    y = np.stack([x + noise, -x + noise, x + 3 * noise, noise], -1)
    line = fitted(np.stack([x] * 4, -1), y).line()
    correlation = np.array([np.corrcoef(x, column)[0, 1] for column in y.T])

    share = np.array([1, -1, 2 * correlation[2], 2 * correlation[3]])
    np.testing.assert_allclose(line.slope, share * y.std(0) / x.std(), rtol=1e-9)
    assert (line.left <= line.out * (1 + 1e-12)).all()
    assert line.left[0] < line.out[0]


def test_a_constant_channel_has_no_slope():
    """Where the input never differs, the output's mean is all there is to compute, and nothing is divided by 0."""
    x, y = pair()
    x[:, 1] = np.float32(0.1)
    fit = fitted(x, y)
    line = fit.line()

    assert line.slope[1] == 0
    assert line.level[1] == pytest.approx(y[:, 1].mean())
    assert not fit.is_constant
    assert fitted(np.ones((9, 2)), np.ones((9, 2))).is_constant
    assert not fitted(x, np.where(y > 0, np.nan, y)).is_finite
