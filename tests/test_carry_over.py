"""The carry-over algebra, against what it promises: equality wherever a sample's statistics are as expected."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from normswap import BatchRenorm, GroupNorm, SwitchNorm
from normswap.convert.carry_over import SPREAD, carry_over, group_moments
from normswap.convert.gates import gate_logits, softmax, start_gates
from normswap.convert.state import BatchNormState
from normswap.errors import InputError

from .helpers import exactly

EPS = 1e-3


def state(channels=12, seed=0, **changes):
    rng = np.random.default_rng(seed)
    values = {
        "gamma": rng.normal(1, 0.5, channels),
        "beta": rng.normal(0, 1, channels),
        "mean": rng.normal(0, 2, channels),
        "var": rng.uniform(0.1, 4, channels),
        "eps": EPS,
    }
    return BatchNormState(**{**values, **changes})


def batch_norm(state, x):
    """What the BatchNorm computes at inference for x of shape (C,)."""
    return state.gamma * (x - state.mean) / np.sqrt(state.var + state.eps) + state.beta


@pytest.mark.parametrize("groups", [1, 2, 3, 4, 6, 12])
def test_group_norm_equals_batch_norm_at_the_expected_statistics(groups):
    """With a sample's group moments as foretold, both give the same, but for the share of the scale that is kept."""
    bn = state()
    x = np.random.default_rng(1).normal(size=12)
    carried = carry_over(bn, GroupNorm(groups=groups), groups=groups)
    mean, var = group_moments(bn.mean, bn.var, groups)

    patched = carried.gamma / SPREAD * (x - mean) / np.sqrt(var + EPS) + carried.beta

    np.testing.assert_allclose(patched, batch_norm(bn, x), atol=1e-12)


def test_group_moments_are_those_of_the_pooled_values():
    """The moments of a group are those of all its channels' values taken together."""
    values = np.random.default_rng(0).normal(np.arange(6.0), np.arange(1.0, 7.0), (1000, 6))

    mean, var = group_moments(values.mean(0), values.var(0), 2)

    for group in (slice(0, 3), slice(3, 6)):
        np.testing.assert_allclose(mean[group], values[:, group].mean())
        np.testing.assert_allclose(var[group], values[:, group].var())


@pytest.mark.parametrize("batch_statistics", ["moving", "frozen", "none"])
@pytest.mark.parametrize("start", ["warm", "exact", "even"])
def test_switch_norm_equals_batch_norm_at_the_expected_statistics(start, batch_statistics):
    """The mix of expected statistics is undone whatever the gates."""
    bn, target = state(), SwitchNorm(start, batch_statistics)
    x = np.random.default_rng(1).normal(size=12)
    carried = carry_over(bn, target)
    gates = softmax(carried.gate_logits)
    layer_mean, layer_var = group_moments(bn.mean, bn.var, 1)
    means = [bn.mean, layer_mean, bn.mean][: gates.size]
    variances = [bn.var, layer_var, bn.var][: gates.size]

    mixed_mean, mixed_var = np.tensordot(gates, means, 1), np.tensordot(gates, variances, 1)
    patched = carried.gamma * (x - mixed_mean) / np.sqrt(mixed_var + EPS) + carried.beta

    np.testing.assert_allclose(patched, batch_norm(bn, x), atol=1e-12)


def test_switch_norm_on_single_values_gives_back_what_the_instance_gate_takes():
    """On 1x1 maps the instance mean is the value itself: the signal shrinks by 1-w, and γ′ undoes it."""
    bn, target = state(), SwitchNorm()
    x = np.random.default_rng(1).normal(size=12)
    carried = carry_over(bn, target, spatial=(1, 1))
    instance, layer, batch = start_gates(target)
    layer_mean, layer_var = group_moments(bn.mean, bn.var, 1)

    mixed_mean = instance * x + layer * layer_mean + batch * bn.mean
    mixed_var = layer * layer_var + batch * bn.var
    patched = carried.gamma * (x - mixed_mean) / np.sqrt(mixed_var + EPS) + carried.beta

    np.testing.assert_allclose(patched, batch_norm(bn, x), atol=1e-12)


def test_switch_norm_on_vectors_takes_layer_statistics_for_instance_ones():
    """For (N, C) input the instance gate weighs the layer's statistics."""
    bn, target = state(), SwitchNorm("even")

    vector = carry_over(bn, target, spatial=())

    layer_mean, layer_var = group_moments(bn.mean, bn.var, 1)
    expected_mean, expected_var = (2 * layer_mean + bn.mean) / 3, (2 * layer_var + bn.var) / 3
    deviation = np.sqrt(bn.var + EPS)
    np.testing.assert_allclose(vector.gamma, bn.gamma * np.sqrt(expected_var + EPS) / deviation)
    np.testing.assert_allclose(vector.beta, bn.beta + bn.gamma * (expected_mean - bn.mean) / deviation)


def test_exact_gates_are_one_hot_and_change_nothing():
    """The exact start is the BatchNorm to the last bit, in float32 too."""
    bn = state()
    carried = carry_over(bn, SwitchNorm("exact"))

    logits = carried.gate_logits.astype(np.float32)
    gates = np.exp(logits) / np.exp(logits).sum()

    assert gates.tolist() == [0, 0, 1]
    np.testing.assert_array_equal(carried.gamma, bn.gamma)
    np.testing.assert_array_equal(carried.beta, bn.beta)


def test_batch_renorm_copies():
    """Batch Renormalization computes the BatchNorm at inference with the same parameters."""
    bn = state()
    carried = carry_over(bn, BatchRenorm())

    assert carried.gamma is bn.gamma
    assert carried.beta is bn.beta


def test_without_running_statistics_there_is_nothing_to_match():
    """Gamma and beta are copied where the BatchNorm kept no running statistics."""
    bn = state(mean=None, var=None)

    assert carry_over(bn, GroupNorm(groups=2), groups=2).gamma is bn.gamma


@given(groups=st.sampled_from([1, 2, 3, 6]), channel=st.integers(0, 5), seed=st.integers(0, 100))
def test_a_dead_channel_stays_dead(groups, channel, seed):
    """γ = 0, as a zero-initialised last norm of a block, stays 0 and β is untouched."""
    bn = state(6, seed)
    bn.gamma[channel] = 0
    carried = carry_over(bn, GroupNorm(groups=groups), groups=groups)

    assert carried.gamma[channel] == 0
    assert carried.beta[channel] == bn.beta[channel]


@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=3))
def test_gate_logits_invert_softmax(weights):
    """Logits made from gates give those gates back."""
    gates = np.array(weights) / sum(weights)

    np.testing.assert_allclose(softmax(gate_logits(gates)), gates, atol=1e-12)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"var": np.array([1.0, -1.0])}, "1 negative running variances"),
        ({"var": np.array([np.nan, np.inf])}, "2 non-finite values in var"),
        ({"gamma": np.array([np.nan, 1.0])}, "1 non-finite values in gamma"),
        ({"eps": -0.1}, "eps=-0.1 is negative"),
        ({"eps": 0.0, "var": np.array([0.0, 1.0])}, "1 running variances of 0 with eps=0.0"),
    ],
)
def test_unusable_states_are_refused(changes, problem):
    """A state that would spread NaN is refused with what is wrong about it."""
    message = f"expected finite parameters and variances >= 0, received {problem}"

    with pytest.raises(InputError, match=exactly(message)):
        carry_over(state(2, **changes), GroupNorm(groups=1), groups=1)
