"""The plan: what rules choose, what each choice is expected to cost, and what folds."""

import numpy as np
import pytest

from normswap import BatchRenorm, GroupNorm, SwitchNorm
from normswap.convert.carry_over import carry_over
from normswap.convert.expected_drift import expected_drift
from normswap.convert.gates import SHARED, SPREAD_OF_SAMPLES
from normswap.convert.recipe import Rule, Rules
from normswap.convert.state import BatchNormState
from normswap.errors import InputError
from normswap.patchers.plan import Site, decide

from .helpers import exactly

NAMES = ["stem.bn", "layer1.0.bn", "layer1.1.bn", "layer2.0.bn", "layer2.1.bn", "head.bn"]
SIDES = [16, 8, 8, 4, 4, 8]  # the head works on larger maps again
SITES = [Site(name, "BatchNorm2d", 8, spatial=(side, side)) for name, side in zip(NAMES, SIDES, strict=True)]
GN, SN, BRN = GroupNorm(), SwitchNorm(), BatchRenorm()


def chosen(*rules, sites=SITES):
    """What the rules make of each site: the target's kind, or the note of a site that is left."""
    decisions = decide("torch", sites, Rules(rules)).decisions
    return [d.target.kind if d.action == "replace" else d.note for d in decisions]


class TestRules:
    def test_the_first_that_matches_wins(self):
        """Names match a glob or a regular expression; a rule may leave layers, and what fits none is left."""
        found = chosen(Rule(SN, "layer1.0.*"), Rule(None, "re:layer1.+"), Rule(BRN, "layer*"), Rule(GN, "stem.bn"))

        assert found == ["gn", "sn", "left by rule 2", "brn", "brn", "no rule matches"]

    @pytest.mark.parametrize(
        ("depth", "count"), [((0, 1 / 3), 2), ((0, 0.5), 3), ((0, 0.01), 0), ((0, 0.1), 1), ((0, 1), 6)]
    )
    def test_depth(self, depth, count):
        """A share of the sites in the model's order: the first third of six is two."""
        rules = [Rule(SN, depth=depth), Rule(GN)]
        if count:
            assert chosen(*rules) == ["sn"] * count + ["gn"] * (6 - count)
        else:
            with pytest.raises(
                InputError, match=r"received rule 1 \(match='\*', depth=\(0, 0.01\)\) that matches none"
            ):
                chosen(*rules)

    def test_stages(self):
        """A stage is a size of maps, counted from the largest, wherever in the model it is."""
        assert chosen(Rule(SN, stage=1), Rule(GN)) == ["gn", "sn", "sn", "gn", "gn", "sn"]
        assert chosen(Rule(SN, stage=2, match="*.0.bn"), Rule(GN)) == ["gn", "gn", "gn", "sn", "gn", "gn"]

    def test_stages_need_shapes(self):
        """Without an example nothing tells the size of maps."""
        message = "expected an example for a rule by stage, which goes by the size of maps, received none"
        with pytest.raises(InputError, match=exactly(message)):
            chosen(Rule(SN, stage=0), sites=[Site("bn", "BatchNorm2d", 8)])

    @pytest.mark.parametrize(
        ("rule", "said"), [(Rule(SN, "layer9.*"), "match='layer9.*'"), (Rule(SN, stage=3), "match='*', stage=3")]
    )
    def test_a_rule_that_matches_nothing(self, rule, said):
        """A rule without a site is a mistake, told with its number and what it says."""
        message = (
            f"expected rules that each match a BatchNorm, received rule 2 ({said}) that matches none of 6; names begin "
            "stem.bn, layer1.0.bn, layer1.1.bn, layer2.0.bn, layer2.1.bn"
        )
        with pytest.raises(InputError, match=exactly(message)):
            chosen(Rule(GN), rule)

    def test_what_is_no_regular_expression(self):
        """A broken pattern is the caller's mistake."""
        problem = "missing ), unterminated subpattern at position 0"
        message = f"expected a regular expression after re:, received 're:(' ({problem})"
        with pytest.raises(InputError, match=exactly(message)):
            chosen(Rule(GN, "re:("))

    def test_aliases_match_too(self):
        """A layer under two names is matched by either."""
        assert chosen(Rule(GN, "b"), sites=[Site("a", "BatchNorm2d", 8, aliases=("b",))]) == ["gn"]

    def test_what_is_left_alone_stays_so(self):
        """A frozen BatchNorm is not taken in by a rule that matches everything."""
        assert chosen(Rule(GN), sites=[Site("a", "FrozenBatchNorm2d", 8, left="frozen")]) == ["frozen"]


def state(channels=32, seed=0):
    """A BatchNorm's state with channels of different spread and scale."""
    rng = np.random.default_rng(seed)
    mean, var = rng.normal(0, 1, channels), rng.uniform(0.3, 3, channels)
    return BatchNormState(rng.uniform(0.3, 2, channels), rng.normal(0, 0.5, channels), mean, var, 1e-5)


class TestExpectedDrift:
    @pytest.mark.parametrize("groups", [1, 4, 32])
    def test_formula(self, groups):
        """The docstring's formula, channel by channel."""
        bn = state()
        size = 32 // groups
        squares = 0.0
        for c in range(32):
            group = slice(c // size * size, (c // size + 1) * size)
            ratio = np.mean(bn.var[group] + bn.eps) / (bn.var[c] + bn.eps)
            squares += bn.gamma[c] ** 2 * (SHARED + (1 - SHARED) / size) * ratio
        expected = SPREAD_OF_SAMPLES * np.sqrt(squares / np.sum(bn.gamma**2 + bn.beta**2))

        assert expected_drift(bn, GN, groups=groups) == pytest.approx(expected, rel=1e-12)

    @pytest.mark.parametrize("groups", [1, 4, 16])
    def test_it_foretells_samples_that_vary_as_it_assumes(self, groups):
        """On samples whose channel means spread by τ, a share ρ of it together, it is right within a third."""
        bn, rng = state(), np.random.default_rng(1)
        shape = (400, 32, 64)
        together, apart, within = (rng.normal(size=size) for size in ((400, 1, 1), (400, 32, 1), shape))
        spread = SPREAD_OF_SAMPLES * (np.sqrt(SHARED) * together + np.sqrt(1 - SHARED) * apart)
        deviation = np.sqrt(bn.var)[:, None]
        x = bn.mean[:, None] + deviation * (spread + np.sqrt(1 - SPREAD_OF_SAMPLES**2) * within)
        y = (x - bn.mean[:, None]) / deviation * bn.gamma[:, None] + bn.beta[:, None]
        carried = carry_over(bn, GN, groups=groups)
        grouped = x.reshape(400, groups, -1)
        centred = grouped - grouped.mean(axis=2, keepdims=True)
        normal = (centred / grouped.std(axis=2, keepdims=True)).reshape(shape)
        measured = np.linalg.norm(normal * carried.gamma[:, None] + carried.beta[:, None] - y) / np.linalg.norm(y)

        assert expected_drift(bn, GN, groups=groups) == pytest.approx(measured, rel=1 / 3)

    def test_what_changes_nothing(self):
        """BatchRenorm and SwitchNorm's batch statistics are the BatchNorm; a layer that returns zeros stays so."""
        bn = state()
        silent = BatchNormState(bn.gamma * 0, bn.beta * 0, bn.mean, bn.var, bn.eps)

        assert [expected_drift(bn, t) for t in (BRN, SwitchNorm("exact"))] == [0.0, 0.0]
        assert expected_drift(silent, GN, groups=1) == 0.0

    def test_switch_norm_by_its_gates(self):
        """Each gate takes its share of what InstanceNorm and LayerNorm would change."""
        bn = state()
        instance, layer = (expected_drift(bn, GN, groups=groups) for groups in (32, 1))

        assert expected_drift(bn, SwitchNorm("even")) == pytest.approx((instance + layer) / 3)
        assert expected_drift(bn, SwitchNorm("warm", "none")) == pytest.approx(0.05 * instance + 0.95 * layer)
        assert expected_drift(bn, SwitchNorm("even"), spatial=()) == pytest.approx(2 * layer / 3)
        assert expected_drift(bn, SwitchNorm("even"), spatial=(1, 1)) == pytest.approx(layer / 3)

    @pytest.mark.parametrize(
        "broken", [{"mean": None, "var": None}, {"var": -np.ones(32)}, {"var": np.full(32, np.nan)}]
    )
    def test_what_nothing_tells(self, broken):
        """Without usable running statistics nothing is expected."""
        values = {**vars(state()), **broken}

        assert expected_drift(BatchNormState(**values), GN, groups=4) is None


def test_a_decision_as_data():
    """Everything the table shows is in the data, for one that folds, one that does not and one that is left."""
    values = {"bn1": state(8), "bn2": None, "bn3": state(8)}
    sites = [Site(name, "BatchNorm2d", 8, spatial=(4, 4), goes_in=True) for name in values]
    rules = Rules((Rule(SwitchNorm("exact"), "bn1"), Rule(GroupNorm(groups=2), "bn2")))
    rows = [d.to_dict() for d in decide("torch", sites, rules, state_of=values.get).decisions]

    assert [(row["action"], row["drift"], row["folds"], row["shape"], row["note"]) for row in rows] == [
        ("replace", 0.0, True, [4, 4], ""),
        ("replace", None, False, [4, 4], ""),
        ("skip", None, None, [4, 4], "no rule matches"),
    ]
