"""What a page is made of, and how it is written: sections of facts, tables and pictures, as one HTML file.

Every text is escaped, since names of layers and messages are those of whoever made the model: only what `Markup` says
is markup goes through as it is. The page runs no script and loads nothing, and its policy forbids the browser to.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

Cell = str | int | Markup | None


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    kind: ClassVar[str] = "text"


@dataclass(frozen=True)
class Facts:
    """Names, each with what is to be said of it; one of nothing is left out."""

    facts: dict[str, Cell]
    kind: ClassVar[str] = "facts"


@dataclass(frozen=True)
class Table:
    """Rows of cells, of which the first names its row; a column in which nothing stands is left out.

    ``numbers`` are the columns that are set to the right, ``legend`` has for each colour what it stands for.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    numbers: frozenset[str] = frozenset()
    legend: Sequence[tuple[str, str]] = ()
    kind: ClassVar[str] = "table"

    def __post_init__(self) -> None:
        kept = [
            index
            for index, _ in enumerate(self.columns)
            if not index or any(row[index] not in (None, "") for row in self.rows)
        ]
        object.__setattr__(self, "columns", [self.columns[index] for index in kept])
        object.__setattr__(self, "rows", [[row[index] for index in kept] for row in self.rows])


@dataclass(frozen=True)
class Figure:
    """A picture with its title; ``legend`` has for each of its colours what it stands for."""

    title: str
    picture: Markup
    legend: Sequence[tuple[str, str]] = ()
    note: str = ""
    kind: ClassVar[str] = "figure"


@dataclass(frozen=True)
class Figures:
    """Pictures side by side, where there is room."""

    figures: Sequence[Figure]
    kind: ClassVar[str] = "figures"


@dataclass(frozen=True)
class Details:
    """What is shown to whoever asks for it."""

    summary: str
    blocks: Sequence["Block"]
    open: bool = False
    kind: ClassVar[str] = "details"


Block = Text | Facts | Table | Figure | Figures | Details


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Tile:
    """A figure that is to be seen first, and what it is; ``state`` is good or bad where it is either."""

    label: str
    value: str
    note: str = ""
    state: str = ""


@dataclass(frozen=True)
class Page:
    """All there is to be shown of ``title``, which is ``what``."""

    title: str
    what: str
    sections: Sequence[Section]
    tiles: Sequence[Tile] = field(default_factory=list)

    def html(self) -> str:
        """Return the page as HTML."""
        environment = Environment(
            loader=FileSystemLoader(Path(__file__).parent),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        return environment.get_template("page.html").render(page=self)

    def write(self, path: Path) -> None:
        """Write the page; a character that no file can hold, as in the name of one, is written as a question mark."""
        path.write_bytes(self.html().encode("utf-8", "replace"))
