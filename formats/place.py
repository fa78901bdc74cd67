"""Where a value stands in what is read, for a message."""

from dataclasses import dataclass, replace
from typing import Any

SHOWN = 60
"""How many characters of a value a message shows."""


@dataclass(frozen=True)
class Place:
    """A field of a file, such as ``recipe.sites[3]`` of ``net-gn/normswap.json``; either may be unknown ("").

    ``remedy`` says what to do about a file that is not as it should be.
    """

    file: str = ""
    field: str = ""
    remedy: str = ""

    def of(self, *way: str | int) -> "Place":
        """Return the place of what is further down the ``way`` of keys and numbers."""
        field = self.field
        for step in way:
            field += f"[{step}]" if isinstance(step, int) else f".{step}" if field else step
        return replace(self, field=field)

    def __str__(self) -> str:
        return (f" at {self.field}" if self.field else "") + (f" in {self.file}" if self.file else "")

    def said(self, expected: str, received: str) -> str:
        """Return the message about something else than what was ``expected`` here."""
        return f"expected {expected}{self}, received {received}" + (f"; {self.remedy}" if self.remedy else "")


def shown(value: Any) -> str:
    """Return a value as a message shows it."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."
