"""Targets, group choice and recipes: what may be asked for, and what is said when it may not."""

import json
from math import gcd

import pytest
from hypothesis import given
from hypothesis import strategies as st

from normswap import BatchNorm, BatchRenorm, GroupNorm, Recipe, SwitchNorm
from normswap.convert.groups import resolve_groups
from normswap.convert.recipe import Choice
from normswap.convert.targets import as_target, target_from_dict, target_to_dict
from normswap.errors import InputError, UnsupportedError

from .helpers import exactly


def targets():
    """Every configuration hypothesis can think of."""
    return st.one_of(
        st.builds(
            SwitchNorm,
            st.sampled_from(["warm", "exact", "even"]),
            st.sampled_from(["moving", "frozen", "none"]),
            st.sampled_from([None, "switchablenorms"]),
        ),
        st.builds(BatchRenorm, st.floats(1, 10), st.floats(0, 10)),
        st.builds(GroupNorm, st.one_of(st.just("auto"), st.integers(1, 64)), indivisible=st.sampled_from(["error"])),
        st.builds(GroupNorm, channels_per_group=st.integers(1, 64)),
        st.builds(BatchNorm, st.booleans()),
    )


class TestTargets:
    @given(targets())
    def test_round_trip(self, target):
        """A target survives JSON."""
        assert target_from_dict(json.loads(json.dumps(target_to_dict(target)))) == target

    @pytest.mark.parametrize(
        ("name", "target"),
        [
            ("sn", SwitchNorm()),
            ("brn", BatchRenorm()),
            ("gn", GroupNorm()),
            ("ln", GroupNorm(groups=1)),
            ("in", GroupNorm(channels_per_group=1)),
            ("bn", BatchNorm()),
        ],
    )
    def test_shorthands(self, name, target):
        """The six shorthands stand for configurations."""
        assert as_target(name) == target

    @pytest.mark.parametrize(
        ("build", "message"),
        [
            (
                lambda: as_target("xn"),
                "expected a target out of sn, brn, gn, ln, in, bn, or a SwitchNorm, BatchRenorm, GroupNorm or "
                "BatchNorm; "
                "received target='xn'",
            ),
            (lambda: SwitchNorm(start="hot"), "expected `start` out of warm, exact, even, received start='hot'"),
            (
                lambda: SwitchNorm(compat="keras-switchnorm"),
                "expected `compat` to be None or 'switchablenorms', received compat='keras-switchnorm'",
            ),
            (
                lambda: BatchNorm(reestimate="all"),
                "expected `reestimate` to be True or False, received reestimate='all'",
            ),
            (lambda: BatchRenorm(r_max=0.5), "expected `r_max` of at least 1, received r_max=0.5"),
            (lambda: BatchRenorm(d_max=-1), "expected `d_max` of at least 0, received d_max=-1"),
            (
                lambda: GroupNorm(groups=0),
                "expected `groups` to be a positive integer or 'auto', received groups=0",
            ),
            (
                lambda: GroupNorm(groups=2, channels_per_group=4),
                "expected one of `groups` and `channels_per_group`, received groups=2 and channels_per_group=4",
            ),
            (
                lambda: target_from_dict({"kind": "gn", "group": 3}),
                "expected no field but groups, channels_per_group, indivisible at group, received 3",
            ),
            (lambda: target_from_dict({}), "expected a kind of target out of sn, brn, gn, bn at kind, received none"),
        ],
    )
    def test_refusals(self, build, message):
        """Each wrong value is named with what was expected."""
        with pytest.raises(InputError, match=exactly(message)):
            build()


class TestGroups:
    @given(channels=st.integers(2, 200), size=st.integers(2, 50))
    def test_auto_is_one_group(self, channels, size):
        """One group keeps most of a pretrained function, and always divides."""
        groups, note = resolve_groups(GroupNorm(), channels, size * 16, "bn")

        assert groups == 1
        assert note == "auto: one group averages most values, so its statistics stay nearest to the running ones"

    @given(channels=st.integers(2, 2000), groups=st.integers(1, 64))
    def test_gcd_always_divides(self, channels, groups):
        """With indivisible="gcd" any request ends in groups that divide the channels."""
        used, _ = resolve_groups(GroupNorm(groups=groups, indivisible="gcd"), channels, 49, "bn")

        assert channels % used == 0
        assert used <= groups

    @pytest.mark.parametrize("channels", [16, 24, 40, 72, 112, 728])
    def test_real_widths(self, channels):
        """The widths of real networks that 32 groups do not divide are refused with a way out."""
        message = (
            f"stage.bn: expected groups to divide the {channels} channels, received groups=32; "
            f"use groups={gcd(32, channels)}, groups='auto', or indivisible='gcd'"
        )
        with pytest.raises(UnsupportedError, match=exactly(message)):
            resolve_groups(GroupNorm(groups=32), channels, 49, "stage.bn")

    def test_a_prime_number_of_channels(self):
        """A prime width takes one group, and says so."""
        groups, note = resolve_groups(GroupNorm(groups=32, indivisible="gcd"), 17, 49, "bn")

        assert groups == 1
        assert note == "groups=32 does not divide 17 channels: 1 taken"

    def test_a_group_of_one_value_is_refused(self):
        """Normalising a single value gives 0 whatever the value: the signal would be gone."""
        message = (
            "head.bn: a group of one value per sample normalises to zero and erases the signal "
            "(channels=4, groups=4, values per channel=1); use fewer groups, or leave the layer as it is with "
            "exclude='head.bn'"
        )
        with pytest.raises(UnsupportedError, match=exactly(message)):
            resolve_groups(GroupNorm(groups=4), 4, 1, "head.bn")

    def test_few_values_are_noted(self):
        """Groups of fewer than 16 values go through with a warning."""
        assert resolve_groups(GroupNorm(groups=2), 8, 1, "bn") == (
            2,
            "only 4 values per group: expect noisy statistics",
        )

    def test_unknown_shapes_are_noted(self):
        """Without an example one channel per group may or may not be a single value."""
        assert resolve_groups(GroupNorm(channels_per_group=1), 8, None, "bn") == (
            8,
            "one channel per group: give an example input to check that maps exceed 1x1",
        )


class TestRecipe:
    @given(st.lists(st.tuples(st.text(), st.integers(1, 9), targets()), max_size=5))
    def test_round_trip(self, sites):
        """A recipe survives its file."""
        choices = tuple(Choice(name, "BatchNorm2d", c, t, (c, c)) for name, c, t in sites)
        recipe = Recipe("torch", choices)

        assert Recipe.from_json(recipe.to_json()) == recipe

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (
                "{",
                "expected JSON, received text that is not: Expecting property name enclosed in double quotes: line 1 "
                "column 2 (char 1)",
            ),
            ("[]", "expected an object, received []"),
            ("{}", "expected a value at schema_version, received none (and 2 more)"),
            (
                '{"schema_version": 1, "framework": "torch", "sites": [{"name": "bn", "channels": 8, "target": {}}]}',
                "expected a value at sites[0].source, received none",
            ),
        ],
    )
    def test_refusals(self, text, message):
        """A file that is no recipe is told apart from one that is damaged."""
        with pytest.raises(InputError, match=exactly(message)):
            Recipe.from_json(text)
