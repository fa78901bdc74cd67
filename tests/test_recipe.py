"""Rules, the recipe that people write: what a file may say and what is refused."""

import json

import pytest

from normswap import GroupNorm, Recipe, SwitchNorm
from normswap.convert.recipe import Choice, Rule, Rules, recipe_from_json
from normswap.errors import InputError

from .helpers import exactly


def file(*rules, **more):
    """The text of a rules file."""
    return json.dumps({"schema_version": 1, "rules": list(rules), **more})


def test_a_file_of_rules():
    """Targets are shorthands, objects, or "leave"; conditions that are not given always hold."""
    text = file(
        {"match": "layer4.*", "target": "leave"},
        {"depth": [0, 0.5], "target": {"kind": "sn", "batch_statistics": "frozen"}},
        {"match": "re:.*bn2", "stage": 1, "target": {"kind": "gn", "groups": 8}},
        {"target": "gn"},
    )

    assert recipe_from_json(text) == Rules(
        (
            Rule(None, match="layer4.*"),
            Rule(SwitchNorm(batch_statistics="frozen"), depth=(0, 0.5)),
            Rule(GroupNorm(groups=8), match="re:.*bn2", stage=1),
            Rule(GroupNorm()),
        )
    )


def test_a_file_of_choices():
    """A resolved recipe is read as one, also out of a larger object."""
    recipe = Recipe("torch", (Choice("bn", "BatchNorm2d", 8, GroupNorm(groups=1), (4, 4)),))

    assert recipe_from_json(recipe.to_json()) == recipe
    assert recipe_from_json(json.dumps({"plan": [], "recipe": recipe.to_dict()})) == recipe


KNOWN = "target, match, depth, stage"
DEPTH = "expected `depth` as two numbers from 0 to 1, the smaller first, received match='*', depth="


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (file({"match": "a", "taget": "gn"}), "expected a value at rules[0].target, received none (and 1 more)"),
        (file({"target": "gn", "kind": 1}), "expected no such field at rules[0].kind, received 1"),
        (file({"target": "gn"}, {"match": "a"}), "expected a value at rules[1].target, received none"),
        (file("gn"), "expected an object at rules[0], received 'gn'"),
        (file({"target": "gn", "depth": [0.5, 0.1]}), f"{DEPTH}(0.5, 0.1) (at rules[0])"),
        (file({"target": "gn"}, {"target": "gn", "depth": [0, 3]}), f"{DEPTH}(0.0, 3.0) (at rules[1])"),
        (file({"target": "gn", "depth": [0, float("nan")]}), f"{DEPTH}(0.0, nan) (at rules[0])"),
        (file({"target": "gn", "depth": 0.5}), "expected a list at rules[0].depth, received 0.5"),
        (file({"target": "gn", "depth": ["0", 1]}), "expected a number at rules[0].depth[0], received '0'"),
        (file({"target": "gn", "depth": [0, True]}), "expected a number at rules[0].depth[1], received True"),
        (
            file({"target": "gn", "stage": -1}),
            "expected `stage` as a number from 0, the largest maps, received match='*', stage=-1 (at rules[0])",
        ),
        (file({"target": "gn", "stage": "last"}), "expected an integer at rules[0].stage, received 'last'"),
        (file({"target": "gn", "match": ["a"]}), "expected text at rules[0].match, received ['a']"),
        (file({"target": 1}), "expected text or an object at rules[0].target, received 1"),
        (
            file({"target": "xn"}),
            "expected a target out of sn, brn, gn, ln, in, bn, or a SwitchNorm, BatchRenorm, GroupNorm or "
            "BatchNorm; received target='xn' (at rules[0])",
        ),
        (
            file({"target": {"kind": "gn", "group": 2}}),
            "expected no field but groups, channels_per_group, indivisible at rules[0].target.group, received 2",
        ),
        (
            file({"target": {"kind": "gn", "groups": "4"}}),
            "expected an integer or 'auto' at rules[0].target.groups, received '4'",
        ),
        (
            file({"target": {"kind": "sn", "gates": [float("nan"), 0.5, 0.5]}}),
            "expected `gates` as 3 shares that sum to 1, received gates=(nan, 0.5, 0.5) (at rules[0].target)",
        ),
        (file(), "expected one rule or more at rules, received none"),
        (file({"target": "gn"}, sites=[]), "expected no field but schema_version, rules at sites, received []"),
        (
            '{"schema_version": 2, "rules": [{"target": "gn"}]}',
            "expected 1 at schema_version, received 2",
        ),
        ("[1]", "expected an object, received [1]"),
        ('{"rules": [], "rules": 1}', "expected each key of an object once, received 'rules' twice"),
        ("[" * 100_000, "expected JSON nested no deeper than 100 levels, received deeper"),
        (
            b"\xff",
            "expected JSON, received text that is not: 'utf-8' codec can't decode byte 0xff in position 0: invalid "
            "start byte",
        ),
    ],
)
def test_what_is_refused(text, message):
    """A mistake is told with the field it is in, what was expected and what was received."""
    with pytest.raises(InputError, match=exactly(message)):
        recipe_from_json(text)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Rule("gn"),
            "expected `target` as a SwitchNorm, BatchRenorm, GroupNorm or BatchNorm, or None, received target='gn'",
        ),
        (
            lambda: Rule(None, match=None),
            "expected `match` as a glob, or a regular expression after re:, received match=None",
        ),
        (
            lambda: Rules(Rule(None, match="a")),
            "expected `rules` as a tuple of Rule objects, received rules=Rule(target=None, match='a', depth=None, "
            "stage=None)",
        ),
        (lambda: Rules(("gn",)), "expected `rules` as a tuple of Rule objects, received rules=('gn',)"),
    ],
)
def test_rules_in_python_of_other_objects(make, message):
    """They are refused where they are made."""
    with pytest.raises(InputError, match=exactly(message)):
        make()
