"""Equalizing, against arrays that are normalized in full: exactness, gradient, invariances, and what it never does."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from normswap import GroupNorm, SwitchNorm
from normswap.convert.carry_over import carry_over
from normswap.convert.equalize import Front, Problem, equalize, error, error_of, fit, opposed
from normswap.convert.gates import LEAST, MOST, start_gates, warm_gates
from normswap.convert.samples import IMAGINED, Samples, imagine
from normswap.convert.state import BatchNormState

from .helpers import exactly

CHANNELS = 12


def state(seed=0, eps=1e-3, **changes):
    random = np.random.default_rng(seed)
    values = {
        "gamma": random.normal(1, 0.5, CHANNELS),
        "beta": random.normal(size=CHANNELS),
        "mean": random.normal(size=CHANNELS),
        "var": np.exp(random.normal(0, 2, CHANNELS)),
    }
    return BatchNormState(**{**values, **changes}, eps=eps)


def maps(bn, count=40, positions=9, seed=1):
    """Inputs (N, C, P) of a BatchNorm whose samples differ in mean and contrast, and their moments."""
    random = np.random.default_rng(seed)
    x_hat = random.normal(size=(count, CHANNELS, positions)) * np.exp(0.4 * random.normal(size=(count, CHANNELS, 1)))
    x_hat = x_hat + 0.4 * (random.normal(size=(count, CHANNELS, 1)) + random.normal(size=(count, 1, 1)))
    return x_hat, Samples(x_hat.mean(2), np.square(x_hat).mean(2))


def front(seed=2, inputs=20):
    weights = np.random.default_rng(seed).normal(size=(CHANNELS, inputs))
    return Front(weights, np.sqrt(np.square(weights).sum(1)))


def group_norm(z, groups, gamma, beta, eps):
    grouped = z.reshape(len(z), groups, -1)
    mean, var = grouped.mean(2, keepdims=True), grouped.var(2, keepdims=True)
    return ((grouped - mean) / np.sqrt(var + eps)).reshape(z.shape) * gamma[:, None] + beta[:, None]


class TestError:
    @pytest.mark.parametrize("groups", [1, 3, 12])
    @pytest.mark.parametrize("positions", [1, 7])
    @pytest.mark.parametrize("eps", [1e-5, 0.1])
    def test_it_is_exact(self, groups, positions, eps):
        """It is the mean square of GroupNorm's distance from the BatchNorm, whatever a, b, γ′ and β′ are."""
        bn = state(eps=eps)
        x_hat, samples = maps(bn, positions=positions)
        a, b, gamma, beta = np.random.default_rng(3).normal(size=(4, CHANNELS))
        got = group_norm(a[:, None] * x_hat + b[:, None], groups, gamma, beta, eps)
        wanted = bn.gamma[:, None] * x_hat + bn.beta[:, None]

        found = error(bn, GroupNorm(), samples, scale=a, shift=b, gamma=gamma, beta=beta, groups=groups)

        np.testing.assert_allclose(found, np.square(got - wanted).mean(2), rtol=1e-8, atol=1e-10)

    def test_of_switch_norm(self):
        """It is exact for SN with its mix of instance, layer and running statistics."""
        bn = state()
        x_hat, samples = maps(bn)
        a, b, gamma, beta = np.random.default_rng(3).normal(size=(4, CHANNELS))
        z = a[:, None] * x_hat + b[:, None]
        gates = (0.2, 0.3, 0.5)
        running = a**2 * bn.var / (bn.var + bn.eps)
        m = 0.2 * z.mean(2, keepdims=True) + 0.3 * z.mean((1, 2), keepdims=True) + 0.5 * b[:, None]
        v = 0.2 * z.var(2, keepdims=True) + 0.3 * z.var((1, 2), keepdims=True) + 0.5 * running[:, None]
        got = (z - m) / np.sqrt(v + bn.eps) * gamma[:, None] + beta[:, None]
        wanted = bn.gamma[:, None] * x_hat + bn.beta[:, None]

        target = SwitchNorm(gates=gates)
        found = error(bn, target, samples, scale=a, shift=b, gamma=gamma, beta=beta)

        np.testing.assert_allclose(found, np.square(got - wanted).mean(2), rtol=1e-8, atol=1e-10)

    @pytest.mark.parametrize("groups", [1, 4])
    @pytest.mark.parametrize("shifts", [None, np.linspace(-1, 1, CHANNELS)])
    def test_its_gradient(self, groups, shifts):
        """The solver's gradient is that of its error, with b free and with b that follows a."""
        bn = state()
        _, samples = maps(bn)
        signs = np.where(np.arange(CHANNELS) % 3, 1.0, -1.0)
        problem = Problem(bn, samples, groups, signs, shifts)
        point = np.random.default_rng(4).normal(0, 0.5, CHANNELS * (2 if shifts is None else 1))
        steps = 1e-6 * np.eye(point.size)
        numeric = [(problem(point + step)[0] - problem(point - step)[0]) / 2e-6 for step in steps]

        np.testing.assert_allclose(problem(point)[1], numeric, atol=1e-7)

    def test_the_solver_minimizes_what_is_left(self):
        """It ends well below where it starts, and what it finds is nearer than the carry-over."""
        bn = state()
        _, samples = maps(bn)
        problem = Problem(bn, samples, 1, np.ones(CHANNELS), None)
        found = equalize(bn, GroupNorm(), front(), groups=1, samples=samples)
        a, b = fit(bn, samples, 1, np.ones(CHANNELS))
        start = problem(np.zeros(2 * CHANNELS))[0]

        assert problem(np.concatenate([np.log(np.abs(a)), b / a]))[0] < 0.8 * start
        assert found.error < found.before


class TestEqualize:
    @pytest.mark.parametrize("mode", ["full", "scale"])
    @pytest.mark.parametrize("target", [GroupNorm(), GroupNorm(groups=4), SwitchNorm()])
    def test_samples_that_nothing_was_fitted_to(self, mode, target):
        """With data it is never further off than the carry-over on other samples, and mostly far nearer."""
        bn = state()
        _, samples = maps(bn, 160)
        groups = getattr(target, "groups", None)
        groups = 1 if groups == "auto" else groups
        found = equalize(bn, target, front(), groups=groups, mode=mode, samples=samples)

        assert found.error <= found.before
        assert error_of(found, target, samples, groups=groups) == pytest.approx(found.error)
        if mode == "full" and groups == 1:
            assert found.chosen == "fitted"
            assert found.error < 0.3 * found.before

    @given(seed=st.integers(0, 50), spread=st.floats(0, 4))
    @settings(deadline=None, max_examples=15)
    def test_it_is_never_worse(self, seed, spread):
        """Also of few and strange samples the best on those kept aside is taken, the carry-over if need be."""
        random = np.random.default_rng(seed)
        bn = state(seed)
        mean = random.standard_t(3, size=(16, CHANNELS)) * spread
        samples = Samples(mean, np.square(mean) + random.exponential(size=(16, CHANNELS)))
        found = equalize(bn, GroupNorm(), front(seed), groups=1, samples=samples)

        assert found.error <= found.before
        assert np.isfinite([found.scale, found.shift, found.gamma, found.beta]).all()

    @pytest.mark.parametrize("samples", [None, "given"])
    def test_the_weights_keep_their_norm(self, samples):
        """‖W‖ of the layer in front is what it was."""
        bn, layer = state(), front()
        samples = samples and maps(bn, 160)[1]
        found = equalize(bn, GroupNorm(), layer, groups=1, samples=samples)
        now = np.sum(np.square(layer.norms * found.factor))

        assert now == pytest.approx(np.sum(np.square(layer.norms)))

    def test_what_the_layer_in_front_returns(self):
        """W·factor and the absorbed bias return a·x̂ + b."""
        bn, layer = state(), front()
        found = equalize(bn, GroupNorm(), layer, groups=1)
        inputs = np.random.default_rng(0).normal(size=(20, 5))
        bias = np.linspace(-1, 1, CHANNELS)
        x_hat = ((layer.gain @ inputs + bias[:, None]).T - bn.mean) / np.sqrt(bn.var + bn.eps)
        got = (layer.gain * found.factor[:, None]) @ inputs + found.absorbed(bias)[:, None]

        np.testing.assert_allclose(got.T, found.scale * x_hat + found.shift, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(found.var, found.scale**2 * bn.var / (bn.var + bn.eps))
        np.testing.assert_array_equal(found.mean, found.shift)

    def test_a_scale_needs_no_bias(self):
        """In the mode "scale" a layer without a bias gets none: what it would be is 0."""
        bn = state()
        found = equalize(bn, GroupNorm(), front(), groups=1, mode="scale")

        np.testing.assert_allclose(found.absorbed(None), 0, atol=1e-12)

    def test_channels_that_say_nothing(self):
        """γ = 0 stays 0, and constant channels keep their weights and give what the BatchNorm gave of them."""
        bn = state(gamma=np.r_[0.0, np.ones(11)], var=np.r_[1.0, 0.0, np.ones(10)])
        x_hat, _ = maps(bn, 160)
        x_hat[:, 1] = 0
        samples = Samples(x_hat.mean(2), np.square(x_hat).mean(2))
        for known in (None, samples):
            found = equalize(bn, GroupNorm(), front(), groups=1, samples=known)
            assert found.gamma[0] == 0
            assert found.factor[1] == pytest.approx(1)
            assert np.isfinite([found.scale, found.shift, found.gamma, found.beta]).all()
        errors = error(
            bn, GroupNorm(), samples, scale=found.scale, shift=found.shift, gamma=found.gamma, beta=found.beta, groups=1
        )
        assert np.sqrt(errors[:, 1].mean()) < 0.1

    def test_maps_of_one_value(self):
        """On 1x1 maps and (N, C) input the imagined samples have no variance of their own, and it is solved."""
        samples = imagine(front().gain, (1, 1))

        np.testing.assert_allclose(samples.square, np.square(samples.mean))
        for spatial in ((), (1, 1)):
            found = equalize(state(), GroupNorm(), front(), groups=1, spatial=spatial)
            assert found.error < found.before

    def test_without_solving_it_is_the_carry_over(self):
        """Weights from elsewhere need none: the layer in front stays, γ′ and β′ are carried over."""
        bn = state()
        found, carried = (
            equalize(bn, GroupNorm(), front(), groups=3, solve=False),
            carry_over(bn, GroupNorm(), groups=3),
        )

        np.testing.assert_allclose(found.factor, 1)
        np.testing.assert_allclose(found.absorbed(None), 0, atol=1e-15)
        np.testing.assert_array_equal(found.gamma, carried.gamma)

    def test_it_is_deterministic(self):
        """The same question has the same answer."""
        first, again = (equalize(state(), GroupNorm(), front(), groups=1, samples=s) for s in (None, None))

        assert first is again


class TestOpposed:
    def test_channels_that_vary_alike_cancel(self):
        """Two groups of channels that all vary together get signs whose sum is 0."""
        means = np.random.default_rng(0).normal(size=(50, 1)) * np.ones(8)

        assert opposed(means, 2).reshape(2, 4).sum(1).tolist() == [0, 0]

    @given(seed=st.integers(0, 100))
    @settings(deadline=None, max_examples=20)
    def test_it_is_no_worse_than_no_signs(self, seed):
        """The variance of the signed sum is at most that of the plain one."""
        means = np.random.default_rng(seed).normal(size=(30, 9)) @ np.random.default_rng(seed + 1).normal(size=(9, 9))

        assert np.var(means @ opposed(means, 1)) <= np.var(means.sum(1)) * (1 + 1e-9)


class TestImagined:
    def test_what_reads_alike_varies_alike(self):
        """Outputs with the same kernel sums have the same means in every sample, with opposite ones the opposite."""
        gain = np.random.default_rng(0).normal(size=(4, 6))
        gain[1], gain[2] = 2 * gain[0], -gain[0]
        samples = imagine(gain, (4, 4))

        assert len(samples) == IMAGINED
        np.testing.assert_allclose(samples.mean[:, 1], samples.mean[:, 0])
        np.testing.assert_allclose(samples.mean[:, 2], -samples.mean[:, 0])
        assert np.square(samples.square.mean(0) - 1).max() < 0.05


class TestWarmGates:
    @pytest.mark.parametrize("depth", [1, 5, 49, 10_000])
    def test_they_go_by_depth(self, depth):
        """All instance gates together take a quarter at most, or each the least that still learns."""
        instance, layer, batch = warm_gates(SwitchNorm(), depth, None).gates

        assert instance * depth <= 0.25 or instance == LEAST
        assert (LEAST <= instance <= MOST, layer) == (True, MOST)
        assert instance + layer + batch == pytest.approx(1)

    def test_unlike_channels_close_the_layer_gate(self):
        """Where a channel varies far less than the others the layer gate starts smaller, and still learns."""
        alike, unlike = (state(eps=1e-8, var=np.r_[first, np.ones(11)]) for first in (1.0, 1e-6))
        gates = [warm_gates(SwitchNorm(), 5, bn).gates[1] for bn in (alike, unlike)]

        assert gates[0] == pytest.approx(MOST, rel=0.2)
        assert gates[1] == LEAST
        assert LEAST * (1 - LEAST) > 1e-3

    def test_gates_that_are_given_stay(self):
        """Gates of one's own and those of another start are not chosen anew."""
        for target in (SwitchNorm(gates=(0.5, 0.25, 0.25)), SwitchNorm("even"), SwitchNorm("exact")):
            assert warm_gates(target, 9, state()) == target
        assert start_gates(SwitchNorm(gates=(0.5, 0.25, 0.25))).tolist() == [0.5, 0.25, 0.25]

    @pytest.mark.parametrize("gates", [(0.5, 0.5), (0.5, 0.6, -0.1), (0.2, 0.2, 0.2)])
    def test_what_are_no_gates(self, gates):
        """Another number of shares, a negative one and another sum are refused."""
        from normswap.errors import InputError

        with pytest.raises(InputError, match=exactly(f"expected `gates` as 3 shares that sum to 1, received {gates=}")):
            SwitchNorm(gates=gates)
