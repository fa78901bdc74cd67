r"""Equalizing: a scale and a shift in front of a norm, per channel, with which its statistics hardly vary by sample.

Where the input x of a BatchNorm comes from a linear layer that nothing else reads, that layer can as well return
:math:`z = a\,\hat x + b` with :math:`\hat x = (x-\mu)/\sqrt{v+\epsilon}`: its weights take the factor
:math:`a/\sqrt{v+\epsilon}`, its bias the rest (`Equalized.absorbed`). With the statistics :math:`m_s, v_s` that the
replacement takes of z in sample s, :math:`k = \gamma' a/\sqrt{v_s+\epsilon} - \gamma` and
:math:`d = \gamma'(b-m_s)/\sqrt{v_s+\epsilon} + \beta' - \beta`, it differs from the BatchNorm by exactly

.. math:: E_p[(k \hat x + d)^2] = k^2 M_2 + 2 k d M_1 + d^2

(`error`). `equalize` chooses a, b, γ′ and β′ for the least mean of that over samples and channels: of given samples, or
without data of imagined ones. Everything here is float64 NumPy, the oracle for both frameworks.
"""

from collections import OrderedDict
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .carry_over import carry_over
from .gates import start_gates
from .samples import Samples, imagine
from .state import Array, BatchNormState
from .targets import GroupNorm, Mode, SwitchNorm, Target

OFFSET = 3.0
"""The largest |b/a|: how many deviations a channel may be moved, which costs half precision two bits."""

STRETCH = 1.5
"""The largest |ln|a|| before the common factor: how unlike the channels' scales may become."""

RIDGE = 1e-4
"""Weight of the mean squares of ln|a| and b/a beside the error, which is a share of the output's mean square."""

STEPS = 60
"""The most steps of the solver."""

DEAD = 1e-3
"""Below this share of ε a running variance is none: the channel is a constant, and its weights stay as they are."""

Chosen = Literal["carried over", "standardized", "fitted"]


@dataclass(frozen=True)
class Front:
    """The linear layer in front of a norm, as its C outputs see it.

    ``gain`` (C, K) is what a constant in each of K inputs adds to each output, ``norms`` (C,) the Euclidean norm of
    each output's weights. ``bias`` (C,) is None where the layer has none.
    """

    gain: Array
    norms: Array
    bias: Array | None = None


def by_groups(gain: Array, groups: int) -> Array:
    """Return gains (C, K) to the K inputs that each of ``groups`` reads as gains (C, groups·K) to all inputs."""
    outputs, inputs = gain.shape
    found = np.zeros((outputs, groups, inputs))
    found[np.arange(outputs), np.arange(outputs) // (outputs // groups)] = gain
    return found.reshape(outputs, -1)


@dataclass(frozen=True)
class Equalized:
    r"""What one norm and the layer in front of it become.

    The layer returns :math:`z = a \hat x + b` with ``scale`` a and ``shift`` b; the norm has ``gamma``, ``beta`` and
    for SN the logits ``gate_logits``, and takes ``mean`` and ``var`` for the running statistics of z. ``chosen`` says
    by what a and b were; ``error`` and ``before`` are the mean squared errors of this and of the carry-over, as shares
    of the output's mean square.
    """

    state: BatchNormState
    scale: Array
    shift: Array
    gamma: Array
    beta: Array
    gate_logits: Array | None
    chosen: Chosen
    error: float
    before: float

    @property
    def running_mean(self) -> Array:
        """The mean of the layer's output before."""
        return self.state.running()[0]

    @property
    def mean(self) -> Array:
        """The mean of z where the input's is the running one."""
        return self.shift

    @property
    def var(self) -> Array:
        """The variance of z where the input's is the running one."""
        _, deviation = self.state.running()
        return np.square(self.scale) * (1 - self.state.eps / np.square(deviation))

    @property
    def factor(self) -> Array:
        """What the weights of each output of the layer in front are multiplied by."""
        return self.scale / self.state.running()[1]

    @property
    def affine(self) -> tuple[Array, Array]:
        """The scale and shift with which the BatchNorm's output is computed of z."""
        scale = self.state.gamma / self.scale
        return scale, self.state.beta - scale * self.shift

    def absorbed(self, bias: Array | None) -> Array:
        """Return the bias with which the layer in front returns z, given its own."""
        mean, _ = self.state.running()
        return ((0.0 if bias is None else bias) - mean) * self.factor + self.shift


def equalize(
    state: BatchNormState,
    target: GroupNorm | SwitchNorm,
    front: Front | None,
    *,
    groups: int | None = None,
    spatial: tuple[int, ...] | None = None,
    mode: Mode = "full",
    samples: Samples | None = None,
    gates: Array | None = None,
    solve: bool = True,
) -> Equalized:
    """Return what ``target`` and the layer in front of it become, for the least error over samples.

    Args:
        state: The BatchNorm, with running statistics.
        target: What it becomes.
        front: The linear layer in front, which nothing else reads; None if there is none, which leaves γ′ and β′.
        groups: The number of groups of a GroupNorm.
        spatial: The shape behind the channels, where known; see `carry_over`.
        mode: ``"scale"`` leaves the layer's bias what it was, times the scale.
        samples: What was seen of samples. Seven of eight are fitted to, and the rest chooses between that,
            channels that are standardized, and the carry-over. None: they are imagined.
        gates: What SN's gates are, if not those it starts with.
        solve: False takes the carry-over, which leaves the layer in front what it is.

    Example:
        >>> import numpy as np
        >>> state = BatchNormState(*np.ones((3, 4)), var=np.array([1.0, 2.0, 0.01, 4.0]), eps=1e-5)
        >>> front = Front(gain=np.eye(4), norms=np.ones(4))
        >>> found = equalize(state, GroupNorm(), front, groups=1)
        >>> found.error < found.before
        True
    """
    if not solve:
        return _carried_over(state, target, groups, spatial, gates)
    if samples is not None:
        return _equalize(state, target, front, groups, spatial, mode, samples, gates)
    key = _key(state, target, front, groups, spatial, mode, gates)
    if key not in _SOLVED:
        _SOLVED[key] = _equalize(state, target, front, groups, spatial, mode, samples, gates)
        while len(_SOLVED) > _REMEMBERED:
            _SOLVED.popitem(last=False)
    return _SOLVED[key]


_SOLVED: OrderedDict[bytes, Equalized] = OrderedDict()  # a plan and its patch ask the same
_REMEMBERED = 512


def _key(*parts: Any) -> bytes:
    digest = sha256()

    def add(part: Any) -> None:
        if isinstance(part, np.ndarray):
            digest.update(np.ascontiguousarray(part).tobytes())
        if isinstance(part, BatchNormState | Front):
            for each in vars(part).values():
                add(each)
        else:
            digest.update(repr(getattr(part, "shape", part)).encode())

    for part in parts:
        add(part)
    return digest.digest()


def _equalize(
    state: BatchNormState,
    target: GroupNorm | SwitchNorm,
    front: Front | None,
    groups: int | None,
    spatial: tuple[int, ...] | None,
    mode: Mode,
    samples: Samples | None,
    gates: Array | None,
) -> Equalized:
    known = imagine(np.eye(state.gamma.size) if front is None else front.gain, spatial) if samples is None else samples
    fitting, judging = (known, known) if samples is None else known.split()
    mean, deviation = state.running()
    plain = _carried_over(state, target, groups, spatial, gates)
    before = _Norm(state, target, groups, spatial, deviation, mean, gates)
    error_before = before.error(judging, plain.gamma, plain.beta)
    count = groups if isinstance(target, GroupNorm) and groups is not None else 1
    alive = deviation**2 - state.eps > DEAD * state.eps
    starts: dict[Chosen, tuple[Array, Array]] = {}
    if front is not None:
        shifts = None if mode == "full" else mean / deviation
        signs = opposed(fitting.mean, count)
        starts["standardized"] = signs, np.zeros_like(signs) if shifts is None else signs * shifts
        starts["fitted"] = fit(state, fitting, count, signs, shifts)
    found = []
    for chosen, (scale, shift) in starts.items():
        assert front is not None
        scale, shift = _with_norm(scale, shift, alive, deviation, mean, front.norms, mode)
        norm = _Norm(state, target, groups, spatial, scale, shift, gates)
        gamma, beta = norm.solve(fitting)
        error = norm.error(judging, gamma, beta)
        found.append(Equalized(state, scale, shift, gamma, beta, plain.gate_logits, chosen, error, error_before))
    if samples is not None or front is None:
        found.append(replace(plain, error=error_before, before=error_before))
        gamma, beta = before.solve(fitting)
        refitted = before.error(judging, gamma, beta)
        found.append(replace(plain, gamma=gamma, beta=beta, error=refitted, before=error_before))
    return min(found, key=lambda each: each.error)


def factor_since(before: Array, after: Array) -> Array:
    """Return the factor (C,) of least squares by which a layer's weights (C, K) have changed; 1 where they were 0."""
    square = np.square(before).sum(axis=1)
    found: Array = np.where(square > 0, (before * after).sum(axis=1) / np.where(square > 0, square, 1.0), 1.0)
    return found


def affine_since(
    state: BatchNormState, before: tuple[Array, Array | None], after: tuple[Array, Array | None]
) -> tuple[Array, Array]:
    """Return the scale and shift with which the BatchNorm's output is computed of what the layer in front returns now.

    ``before`` and ``after`` are the weights (C, K) and the bias (C,) of that layer, which has taken a factor for each
    output channel and a bias; of one that has been trained since, the factor is that of least squares.
    """
    mean, deviation = state.running()
    (old, old_bias), (new, new_bias) = before, after
    factor = factor_since(old, new)
    shift = (0.0 if new_bias is None else new_bias) - (0.0 if old_bias is None else old_bias) * factor
    usable = np.abs(factor) > 0
    scale = np.where(usable, state.gamma / (np.where(usable, factor, 1.0) * deviation), 0.0)
    return scale, state.beta - scale * (mean * factor + shift)


def _carried_over(
    state: BatchNormState,
    target: GroupNorm | SwitchNorm,
    groups: int | None,
    spatial: tuple[int, ...] | None,
    gates: Array | None,
) -> Equalized:
    mean, deviation = state.running()
    if isinstance(target, SwitchNorm) and gates is None:
        gates = start_gates(target)
    carried = carry_over(state, target, groups=groups, spatial=spatial, gates=gates)
    return Equalized(state, deviation, mean, carried.gamma, carried.beta, carried.gate_logits, "carried over", 0.0, 0.0)


def error(
    state: BatchNormState,
    target: GroupNorm | SwitchNorm,
    samples: Samples,
    *,
    scale: Array,
    shift: Array,
    gamma: Array,
    beta: Array,
    groups: int | None = None,
    spatial: tuple[int, ...] | None = None,
) -> Array:
    """Return the exact mean squared error (N, C) of each sample and channel, over its positions."""
    return _Norm(state, target, groups, spatial, scale, shift).errors(samples, gamma, beta)


def error_of(
    found: Equalized,
    target: GroupNorm | SwitchNorm,
    samples: Samples,
    *,
    groups: int | None = None,
    spatial: tuple[int, ...] | None = None,
    gates: Array | None = None,
) -> float:
    """Return the error on the samples that `equalize` judges by, as a share of the output's mean square."""
    norm = _Norm(found.state, target, groups, spatial, found.scale, found.shift, gates)
    return norm.error(samples.split()[1], found.gamma, found.beta)


def opposed(means: Array, groups: int) -> Array:
    """Return a sign for each channel with which a group's channels cancel in its mean, sample by sample.

    Means (N, C); a local search for the least variance of their signed sum, from all signs alike and from two more.
    """
    centred = means - means.mean(axis=0)
    size = means.shape[1] // groups
    signs = [_opposed(centred[:, start : start + size]) for start in range(0, means.shape[1], size)]
    return np.concatenate(signs)


def _opposed(means: Array) -> Array:
    covariance = means.T @ means
    own = np.diag(covariance)
    random = np.random.default_rng(0)
    best, least = np.ones(len(own)), np.inf
    for start in (np.ones(len(own)), *(random.choice([-1.0, 1.0], (2, len(own))))):
        signs, sums = start, covariance @ start
        for _ in range(4 * len(own)):
            change = own - signs * sums  # of a flip, over 4
            worst = int(change.argmin())
            if change[worst] >= -1e-12 * own.max(initial=0):
                break
            signs[worst] = -signs[worst]
            sums = sums + 2 * signs[worst] * covariance[worst]
        if (sum_ := float(signs @ sums)) < least:
            best, least = signs, sum_
    return best


def fit(
    state: BatchNormState, samples: Samples, groups: int, signs: Array, shifts: Array | None = None
) -> tuple[Array, Array]:
    r"""Return a and b for which a GroupNorm comes nearest to the BatchNorm over samples.

    For given a and b, γ′ and β′ of least error are each channel's least squares, and what is left of the error is the
    part of the channel's variance that the norm's output u does not explain:

    .. math:: L(a, b) = \frac{\sum_c \gamma_c^2 V_c\,\bigl(1 - \mathrm{corr}(u_c, \hat x_c)^2\bigr)}
                             {\sum_c \gamma_c^2 V_c} + \lambda\,\overline{\ln^2 |a|} + \lambda\,\overline{(b/a)^2}

    (variable projection: Golub and Pereyra, 2003). L-BFGS-B minimizes it over ln|a| and b/a within `STRETCH` and
    `OFFSET`, from channels that are standardized. ``shifts`` gives b/a where the layer in front cannot shift.
    """
    from scipy.optimize import minimize

    problem = Problem(state, samples, groups, signs, shifts)
    channels = signs.size
    bounds = [(-STRETCH, STRETCH)] * channels + [(-OFFSET, OFFSET)] * (channels if shifts is None else 0)
    options = {"maxiter": STEPS, "maxcor": 20}
    start = np.zeros(len(bounds))
    return problem.parameters(minimize(problem, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options).x)


class Problem:
    """`fit`'s error and its gradient; every step is a few products of the samples with vectors."""

    def __init__(
        self, state: BatchNormState, samples: Samples, groups: int, signs: Array, shifts: Array | None
    ) -> None:
        self.groups, self.size, self.count = groups, signs.size // groups, len(samples)
        self.signs, self.shifts = self._by_group(signs), None if shifts is None else self._by_group(shifts)
        self.eps = state.eps
        self.means, self.squares = (
            np.ascontiguousarray(each.reshape(self.count, groups, self.size).transpose(1, 0, 2))
            for each in (samples.mean, samples.square)
        )
        self.mean = self.means.mean(axis=1)
        variance = self.squares.mean(axis=1) - np.square(self.mean)
        known = variance > 1e-9  # of a channel that is constant in all samples nothing can be said
        self.variance = np.where(known, variance, 1.0)
        weights = np.square(self._by_group(state.gamma)) * np.where(known, self.variance, 0.0)
        self.weights = weights / max(weights.sum(), np.finfo(np.float64).tiny)

    def parameters(self, point: Array) -> tuple[Array, Array]:
        """Return a and b, each of shape (C,)."""
        scale, shift = self._split(point)
        return scale.ravel(), (scale * shift).ravel()

    def __call__(self, point: Array) -> tuple[float, Array]:
        """Return the error at a point and its gradient."""
        a, offset = self._split(point)
        b = a * offset
        s, n, means, squares = self.size, self.count, self.means, self.squares
        linear, m = means @ np.stack([a, a * b], -1), b.mean(1, keepdims=True)
        m = linear[..., 0] / s + m
        v = (squares @ (a * a)[..., None])[..., 0] / s + 2 * linear[..., 1] / s + (b * b).mean(1, keepdims=True) - m * m
        r = 1 / np.sqrt(v + self.eps)
        p = [r / n, r * r / n, r * m / n, r * r * m / n]
        rm1, r2m1, rmm1, r2mm1 = np.moveaxis(np.stack(p, 1) @ means, 1, 0)
        rm2, r2m2 = np.moveaxis(np.stack(p[:2], 1) @ squares, 1, 0)
        s1, s2, s3, s4 = (each.sum(1, keepdims=True) for each in p)
        s5 = (p[3] * m).sum(1, keepdims=True)
        u = a * rm1 + b * s1 - s3
        u_square = a * a * r2m2 + 2 * a * b * r2m1 - 2 * a * r2mm1 + b * b * s2 - 2 * b * s4 + s5
        u_x = a * rm2 + b * rm1 - rmm1
        covariance = u_x - u * self.mean
        spread = np.maximum(u_square - u * u, 1e-12)
        explained = covariance * covariance / (spread * self.variance)
        value = float(np.sum(self.weights * (1 - explained)))

        d_ux = -2 * self.weights * covariance / (spread * self.variance)
        d_u2 = self.weights * explained / spread
        d_u = -self.mean * d_ux - 2 * u * d_u2
        d_a = d_u * rm1 + d_ux * rm2 + d_u2 * (2 * a * r2m2 + 2 * b * r2m1 - 2 * r2mm1)
        d_b = d_u * s1 + d_ux * rm1 + d_u2 * (2 * a * r2m1 + 2 * b * s2 - 2 * s4)
        by_means = means @ np.stack([d_u * a + d_ux * b, d_ux, 2 * d_u2 * a * b, d_u2 * a], -1)
        by_squares = squares @ np.stack([d_ux * a, d_u2 * a * a], -1)

        def total(each: Array) -> Array:
            found: Array = each.sum(1, keepdims=True)
            return found

        d_1 = by_means[..., 0] + by_squares[..., 0] + total(d_u * b)
        d_2 = by_squares[..., 1] + by_means[..., 2] + total(d_u2 * b * b)
        d_3 = -total(d_u) - by_means[..., 1]
        d_4 = -2 * by_means[..., 3] - 2 * total(d_u2 * b)
        d_5 = total(d_u2)
        d_r = (d_1 + 2 * r * d_2 + m * d_3 + 2 * r * m * d_4 + 2 * r * m * m * d_5) / n
        d_v = -0.5 * r**3 * d_r
        d_m = (r * d_3 + r * r * d_4 + 2 * r * r * m * d_5) / n - 2 * m * d_v
        m_means, v_means = np.moveaxis(np.stack([d_m, d_v], 1) @ means, 1, 0)
        v_squares = (d_v[:, None] @ squares)[:, 0]
        d_a = d_a + m_means / s + 2 * a * v_squares / s + 2 * b * v_means / s
        d_b = d_b + total(d_m) / s + 2 * a * v_means / s + 2 * b * total(d_v) / s

        logs = np.log(np.abs(a))
        channels = a.size
        value += RIDGE * float(np.mean(np.square(logs)) + np.mean(np.square(offset)))
        d_log = (d_a + d_b * offset) * a + 2 * RIDGE * logs / channels
        if self.shifts is not None:
            return value, d_log.ravel()
        return value, np.concatenate([d_log.ravel(), (d_b * a + 2 * RIDGE * offset / channels).ravel()])

    def _split(self, point: Array) -> tuple[Array, Array]:
        channels = self.signs.size
        scale = self.signs * np.exp(self._by_group(point[:channels]))
        return scale, self._by_group(point[channels:]) if self.shifts is None else self.shifts

    def _by_group(self, values: Array) -> Array:
        found: Array = values.reshape(self.groups, self.size)
        return found


class _Norm:
    """A target's statistics of z, sample by sample, and the affine of least error for them."""

    def __init__(
        self,
        state: BatchNormState,
        target: Target,
        groups: int | None,
        spatial: tuple[int, ...] | None,
        scale: Array,
        shift: Array,
        gates: Array | None = None,
    ) -> None:
        self.gates = start_gates(target) if gates is None and isinstance(target, SwitchNorm) else gates
        self.state, self.groups, self.spatial = state, groups, spatial
        self.scale, self.shift = scale, shift

    def statistics(self, samples: Samples) -> tuple[Array, Array]:
        """Return the mean and variance (N, C) that the norm takes of each sample for each channel."""
        means = self.scale * samples.mean + self.shift
        squares = self.scale**2 * samples.square + 2 * self.scale * self.shift * samples.mean + self.shift**2
        if self.gates is None:
            return _of_groups(means, squares, self.groups or 1)
        gates = self.gates
        layer = _of_groups(means, squares, 1)
        own = layer if self.spatial == () else (means, np.maximum(squares - means**2, 0.0))
        m, v = (gates[0] * mine + gates[1] * whole for mine, whole in zip(own, layer, strict=True))
        if gates.size == 3:
            _, deviation = self.state.running()
            m = m + gates[2] * self.shift
            v = v + gates[2] * self.scale**2 * (1 - self.state.eps / deviation**2)
        return m, v

    def solve(self, samples: Samples) -> tuple[Array, Array]:
        """Return γ′ and β′ of least error: the regression of the BatchNorm's output on the norm's, per channel."""
        m, v = self.statistics(samples)
        r = 1 / np.sqrt(v + self.state.eps)
        a, offset = self.scale, self.shift - m
        u = (r * (a * samples.mean + offset)).mean(axis=0)
        u_square = (r**2 * (a**2 * samples.square + 2 * a * offset * samples.mean + offset**2)).mean(axis=0)
        u_x = (r * (a * samples.square + offset * samples.mean)).mean(axis=0)
        mean = samples.mean.mean(axis=0)
        spread, variance = u_square - u**2, samples.square.mean(axis=0) - mean**2
        usable = (spread > 1e-9) & (variance > 1e-9)
        _, deviation = self.state.running()
        constant = deviation**2 - self.state.eps <= DEAD * self.state.eps
        otherwise = np.where(constant, 0.0, 1 / (a * r.mean(axis=0)))  # a constant's slope would amplify noise alone
        slope = np.where(usable, (u_x - u * mean) / np.where(usable, spread, 1.0), otherwise)
        gamma = self.state.gamma * slope
        return gamma, self.state.beta + self.state.gamma * mean - gamma * u

    def errors(self, samples: Samples, gamma: Array, beta: Array) -> Array:
        """Return the exact error (N, C)."""
        m, v = self.statistics(samples)
        r = 1 / np.sqrt(v + self.state.eps)
        k = gamma * self.scale * r - self.state.gamma
        d = gamma * (self.shift - m) * r + beta - self.state.beta
        found: Array = k**2 * samples.square + 2 * k * d * samples.mean + d**2
        return found

    def error(self, samples: Samples, gamma: Array, beta: Array) -> float:
        """Return the mean error as a share of the output's mean square."""
        scale = float(np.sum(self.state.gamma**2 + self.state.beta**2))
        found = float(self.errors(samples, gamma, beta).mean(axis=0).sum())
        return max(found, 0.0) / scale if scale > 0 else 0.0


def _of_groups(means: Array, squares: Array, groups: int) -> tuple[Array, Array]:
    """Return each group's mean and variance, for each of its channels."""
    size = means.shape[1] // groups
    mean, square = (each.reshape(len(means), groups, size).mean(axis=2) for each in (means, squares))
    return mean.repeat(size, axis=1), np.maximum(square - mean**2, 0.0).repeat(size, axis=1)


def _with_norm(
    scale: Array, shift: Array, alive: NDArray[Any], deviation: Array, mean: Array, norms: Array, mode: Mode
) -> tuple[Array, Array]:
    """Return a and b times the factor with which the weights in front keep their norm; those of constants stay."""
    now = np.sum(np.square(norms * scale / deviation), where=alive)
    common = np.sqrt(np.sum(np.square(norms), where=alive) / now) if now > 0 else 1.0
    scale = np.where(alive, common * scale, deviation)
    shift = np.where(alive, common * shift, mean if mode == "scale" else 0.0)
    return scale, shift
