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


KEYS = "expected an object with the keys target, match, depth, stage (needed: target), received"
DEPTH = "expected `depth` as two numbers from 0 to 1, the smaller first, received match='*', depth="
STAGE = "expected `stage` as a number from 0, the largest maps, received match='*', stage="


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (file({"match": "a", "taget": "gn"}), f"rule 1: {KEYS} match, taget"),
        (file({"target": "gn"}, {"match": "a"}), f"rule 2: {KEYS} match"),
        (file("gn"), "rule 1: expected an object, received 'gn'"),
        (file({"target": "gn", "depth": [0.5, 0.1]}), f"rule 1: {DEPTH}(0.5, 0.1)"),
        (file({"target": "gn", "depth": [0, 3]}), f"rule 1: {DEPTH}(0, 3)"),
        (file({"target": "gn", "depth": 0.5}), f"rule 1: {DEPTH}0.5"),
        (file({"target": "gn", "depth": ["0", True]}), f"rule 1: {DEPTH}('0', True)"),
        (file({"target": "gn", "stage": -1}), f"rule 1: {STAGE}-1"),
        (file({"target": "gn", "stage": "last"}), f"rule 1: {STAGE}'last'"),
        (
            file({"target": "gn", "match": ["a"]}),
            "rule 1: expected `match` as a glob, or a regular expression after re:, received match=['a']",
        ),
        (
            file({"target": "xn"}),
            "rule 1: expected a target out of sn, brn, gn, ln, in, bn, or a SwitchNorm, BatchRenorm, GroupNorm or "
            "BatchNorm; received target='xn'",
        ),
        (
            file({"target": {"kind": "gn", "group": 2}}),
            "rule 1: expected the fields groups, channels_per_group, indivisible for a target of kind 'gn', received "
            "group",
        ),
        (file(), "expected `rules` as a list of objects, received rules=[]"),
        (
            file({"target": "gn"}, sites=[]),
            "expected an object with the keys schema_version, rules (needed: schema_version, rules), received "
            "schema_version, rules, sites",
        ),
        (
            '{"schema_version": 2, "rules": [{"target": "gn"}]}',
            "expected rules of schema_version=1, received schema_version=2",
        ),
        ("[1]", "expected a recipe as a JSON object, received a list"),
        (
            b"\xff",
            "expected a recipe in JSON, received text that is not JSON: 'utf-8' codec can't decode byte 0xff in "
            "position 0: invalid start byte",
        ),
    ],
)
def test_what_is_refused(text, message):
    """A mistake is told with the number of its rule, what was expected and what was received."""
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
