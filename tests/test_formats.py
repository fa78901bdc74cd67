"""JSON and TOML as they are read: what text may be, what fields may be, and what is said of those that may not."""

import json
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from normswap.data.preprocessing import Preprocessing
from normswap.errors import InputError
from normswap.formats.fields import read
from normswap.formats.place import Place
from normswap.formats.seal import sealed, unsealed
from normswap.formats.text import from_json, from_toml, json_object

from .helpers import exactly

PLACE = Place("b/normswap.json", remedy="patch again")


class TestText:
    @pytest.mark.parametrize("content", ['{"a": [1]}', b'{"a": [1]}', b'\xef\xbb\xbf{"a": [1]}'])
    def test_is_read(self, content):
        """Text or bytes, with the mark that some editors set at the beginning of UTF-8 or without."""
        assert from_json(content, PLACE) == {"a": [1]}

    @pytest.mark.parametrize(
        ("parse", "content", "message"),
        [
            (from_json, b"\xff\xfe{", "JSON in b/normswap.json, received text that is not: 'utf-8' codec can't decode "
             "byte 0xff in position 0: invalid start byte"),
            (from_json, "", "JSON in b/normswap.json, received text that is not: Expecting value: line 1 column 1 "
             "(char 0)"),
            (from_toml, "a =", "TOML in b/normswap.json, received text that is not: Invalid value (at end of "
             "document)"),
            (from_json, '{"a": {"b": 1, "b": 1}}', "each key of an object once in b/normswap.json, received 'b' "
             "twice"),
            (from_toml, "a = 1\na = 1", "TOML in b/normswap.json, received text that is not: Cannot overwrite a value "
             "(at end of document)"),
            (from_json, "[" * 100_000, "JSON nested no deeper than 100 levels in b/normswap.json, received deeper"),
            (from_json, "[" * 101 + "]" * 101, "JSON nested no deeper than 100 levels in b/normswap.json, received "
             "deeper"),
            (from_toml, "a = " + "[" * 100_000, "TOML nested no deeper than 100 levels in b/normswap.json, received "
             "deeper"),
            (json_object, "[1]", "an object in b/normswap.json, received [1]"),
        ],
    )  # fmt: skip
    def test_is_refused(self, parse, content, message):
        """Text of another kind, in another encoding, ambiguous, or made to exhaust a reader."""
        with pytest.raises(InputError, match=exactly(f"expected {message}; patch again")):
            parse(content, PLACE)

    def test_may_be_as_deep_as_said(self):
        """The last depth that is taken."""
        assert str(from_json("[" * 100 + "1" + "]" * 100, PLACE)) == "[" * 100 + "1" + "]" * 100


@dataclass(frozen=True)
class Inner:
    size: int
    name: str = ""


@dataclass(frozen=True)
class Outer:
    kind: Literal["a", "b"]
    parts: tuple[Inner, ...] = ()
    rate: float | None = None
    flag: bool = False
    by_name: dict[str, int | str] | None = None


class TestFields:
    def test_are_read(self):
        """Lists become tuples and integers floats, and nothing else is converted."""
        data = {"kind": "a", "parts": [{"size": 2}], "rate": 1, "by_name": {"x": 1, "y": "2"}}

        assert read(Outer, data, PLACE) == Outer("a", (Inner(2),), 1.0, by_name={"x": 1, "y": "2"})

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            ({}, "a value at kind in F, received none"),
            (None, "an object in F, received None"),
            ({"kind": "c"}, "'a' or 'b' at kind in F, received 'c'"),
            ({"kind": ["a"]}, "'a' or 'b' at kind in F, received ['a']"),
            ({"kind": "a", "rate": "1"}, "a number at rate in F, received '1'"),
            ({"kind": "a", "rate": True}, "a number at rate in F, received True"),
            ({"kind": "a", "flag": 1}, "true or false at flag in F, received 1"),
            ({"kind": "a", "parts": {}}, "a list at parts in F, received {}"),
            ({"kind": "a", "parts": [{"size": 1}, {"size": 2.0}]}, "an integer at parts[1].size in F, received 2.0"),
            ({"kind": "a", "parts": [{"size": float("inf")}]}, "an integer at parts[0].size in F, received inf"),
            ({"kind": "a", "parts": [{"size": 1, "more": 2}]}, "no such field at parts[0].more in F, received 2"),
            ({"kind": "a", "parts": [{"name": "x"}]}, "a value at parts[0].size in F, received none"),
            ({"kind": "a", "by_name": {"x": None}}, "an integer or text at by_name.x in F, received None"),
            ({"kind": "a", "more": 2}, "no field but kind, parts, rate, flag, by_name at more in F, received 2"),
            ({"kind": 1, "flag": 2, "rate": "x"}, "'a' or 'b' at kind in F, received 1 (and 2 more)"),
            ({"kind": "x" * 99}, f"'a' or 'b' at kind in F, received '{'x' * 56}..."),
        ],
    )  # fmt: skip
    def test_are_refused(self, data, message):
        """The first field that is not as declared is told by its way from the root, and what is there."""
        with pytest.raises(InputError, match=exactly(f"expected {message}; patch again")):
            read(Outer, data, Place("F", remedy="patch again"))

    def test_that_a_dataclass_refuses(self):
        """What it says itself is told with the place."""
        data = {"shape": [3, 8, 8], "layout": "channels_first", "mean": [float("nan")]}
        message = "expected finite values, received mean=(nan,) (at preprocessing in F)"
        with pytest.raises(InputError, match=exactly(message)):
            Preprocessing.from_dict(data, Place("F", "preprocessing"))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"layout": "/etc/passwd"}, "'channels_first' or 'channels_last' at layout, received '/etc/passwd'"),
            ({"shape": [float("inf"), 8, 8]}, "an integer at shape[0], received inf"),
            ({"shape": "388"}, "a list at shape, received '388'"),
            ({"crop": None}, "a number at crop, received None"),
            ({"std": [True]}, "a number at std[0], received True"),
        ],
    )
    def test_of_images(self, change, message):
        """How images become an input is read like all else."""
        with pytest.raises(InputError, match=exactly(f"expected {message}")):
            Preprocessing.from_dict({"shape": [3, 8, 8], "layout": "channels_first"} | change)

    @pytest.mark.parametrize("data", [{("a", 1): 2}, {"kind": object}])
    def test_of_what_json_cannot_hold(self, data):
        """Python's own objects in plain data are refused too."""
        with pytest.raises(InputError, match="^expected (plain data as in JSON|'a' or 'b') .*patch again$"):
            read(Outer, data, PLACE)


class TestSeal:
    def test_is_over_what_is_said(self):
        """The order of keys and white space are no part of it."""
        data = {"b": [1.5, None, "é"], "a": {"d": 1e300, "c": True}}
        text = json.dumps(dict(reversed(sealed(data).items())), indent=4)

        assert unsealed(from_json(text, PLACE), PLACE) == data

    @pytest.mark.parametrize(
        ("change", "received"),
        [
            ({"a": 1.0}, "one that has changed"),
            ({"b": None}, "one that has changed"),
            ({"seal": "0"}, "one that has changed"),
            ({"seal": None}, "one that has changed"),
        ],
    )
    def test_tells_a_change(self, change, received):
        """A value of another type is another value."""
        data: dict[str, Any] = {**sealed({"a": 1}), **change}
        message = f"expected a file as it was written in b/normswap.json, received {received}; patch again"
        with pytest.raises(InputError, match=exactly(message)):
            unsealed(data, PLACE)
