"""Files that are not quite what was written: bytes flipped, cut and put in, fields of other kinds; drawn by a seed."""

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

Way = tuple[str | int, ...]

VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 1.5, -0.0, 2**63, -(2**63), 10**30, 1e308, float("inf"), float("nan")),
    *(
        "",
        "0",
        "1",
        "gn",
        "/etc/passwd",
        "../../x",
        "\x00",
        "é",
        "x" * 5000,
        [],
        {},
        [[]],
        [None],
        {"": None},
        [1, 2, 3],
    ),
)
"""What a field may become."""


def bytes_of(content: bytes, random: random.Random) -> bytes:
    """Return content with a few bytes flipped, cut off, taken out, doubled or put in."""
    found = bytearray(content)
    for _ in range(random.choice((1, 1, 1, 2, 8))):
        if not found:
            break
        at = random.randrange(len(found))
        end = min(len(found), at + random.choice((1, 4, 64)))
        what = random.randrange(6)
        if what <= 1:
            found[at] ^= 1 << random.randrange(8)
        elif what == 2:
            del found[at:]
        elif what == 3:
            del found[at:end]
        elif what == 4:
            found[at:at] = found[at:end]
        else:
            found[at:end] = random.randbytes(end - at)
    return bytes(found)


def ways(data: Any, way: Way = ()) -> Iterator[Way]:
    """Yield the way to every value in plain data, but for the root."""
    items: list[tuple[str | int, Any]] = []
    if isinstance(data, dict):
        items = list(data.items())
    elif isinstance(data, list):
        items = list(enumerate(data))
    for key, value in items:
        yield (*way, key)
        yield from ways(value, (*way, key))


def field_of(data: Any, random: random.Random) -> Any:
    """Return plain data of which a field has another value, is gone, or has a neighbour of another name."""
    data = json.loads(json.dumps(data))
    way = random.choice(list(ways(data)))
    parent = data
    for step in way[:-1]:
        parent = parent[step]
    what = random.randrange(6)
    if what == 0:
        del parent[way[-1]]
    elif what == 1 and isinstance(parent, dict):
        parent[f"{way[-1]}x"] = parent[way[-1]]
    else:
        parent[way[-1]] = random.choice(VALUES)
    return data


def json_of(content: bytes, random: random.Random, seal: Callable[[dict[str, Any]], dict[str, Any]] = dict) -> bytes:
    """Return JSON of which a field is another, sealed again where the file has a seal, a key stands twice, or deep."""
    what = random.randrange(12)
    if what == 0:
        return content.replace(b"{", b"{" + json.dumps(random.choice(("a", "sha256"))).encode() + b": 1, ", 1)
    if what == 1:
        return b"[" * random.choice((99, 500, 100_000))
    return json.dumps(seal(field_of(json.loads(content), random))).encode()
