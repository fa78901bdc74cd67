"""One reader makes a model's arguments of whatever is given as an example."""

from collections import OrderedDict, namedtuple

import numpy as np
import pytest

from normswap.frameworks.example import Inputs

X, Y = np.zeros((2, 3)), np.ones(2)
Pair = namedtuple("Pair", ["first", "second"])


@pytest.mark.parametrize(
    ("example", "args", "kwargs"),
    [
        (X, (X,), {}),
        ((X, Y), (X, Y), {}),
        ({"a": X, "b": None}, (), {"a": X, "b": None}),
        ([X, Y], ([X, Y],), {}),
        (([X, Y], 3), ([X, Y], 3), {}),
        (({"a": X},), ({"a": X},), {}),
        ({0: X}, ({0: X},), {}),
        (Pair(X, Y), (Pair(X, Y),), {}),
        (Inputs(X, b=Y), (X,), {"b": Y}),
    ],
    ids=["array", "tuple", "mapping", "list", "list in a tuple", "mapping in a tuple", "keys that are no names",
         "a tuple of a class", "inputs"],
)  # fmt: skip
def test_what_an_example_stands_for(example, args, kwargs):
    """An array is one argument, a tuple several, a mapping of names some by keyword; all else is the model's own."""
    found = Inputs.of(example)

    assert repr((found.args, found.kwargs)) == repr((args, kwargs))


def test_arrays_have_their_places():
    """What lies within an argument is found by its argument's number or name and the way into it."""
    found = Inputs((X, {"deep": [Y]}), "text", mask=Y, size=3)

    assert list(found.arrays) == [(0, 0), (0, 1, "deep", 0), ("mask",)]
    assert len(found) == 3


def test_arrays_are_replaced_in_order():
    """Containers keep their classes, and what is no array stays what it is."""
    given = Inputs(Pair(X, [Y, None]), OrderedDict(a=X), b=(Y, 1.5, True))
    found = given.filled([1, 2, 3, 4])

    assert found.args == (Pair(1, [2, None]), {"a": 3})
    assert found.kwargs == {"b": (4, 1.5, True)}
    assert type(found.args[1]) is OrderedDict
    assert given.args[0].first is X
