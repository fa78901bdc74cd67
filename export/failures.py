"""Why a framework's own exporter failed, and where in the model: what it says itself is about the exporter."""

import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType, ModuleType

from ..errors import uncoloured

_OURS = [Path(__file__).resolve().parents[1] / room for room in ("export", "frameworks", "layers", "patchers")]

_ADVICE = "The error above occurred when calling torch.export.export."


def reason_of(error: BaseException) -> str:
    """Return in one line, without colours, what went wrong in the first place."""
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    for each in reversed(causes[1:] or causes):  # the first is the exporter's own
        own = uncoloured(str(each)).partition(_ADVICE)[0]
        first = next((line.strip() for line in own.splitlines() if line.strip()), "")
        if " " in first:
            return first
    return type(causes[-1]).__name__


def place_of(
    error: BaseException,
    layers: Mapping[int, str],
    libraries: Sequence[ModuleType],
    *,
    told: Callable[[FrameType], tuple[str, str]] | None = None,
) -> str:
    """Return where in a model an error arose: the layer, and the line of the user's code; "" where neither is known.

    ``layers`` are the names of the model's layers by their ids; code of the ``libraries`` is not the user's. ``told``
    returns the layer and the line that a call within a library is about, "" for what it does not tell.
    """
    folders = folders_of(libraries)
    layer, line = "", ""
    for each in chain(error):
        for frame, number in traceback.walk_tb(each.__traceback__):
            layer = layers.get(id(frame.f_locals.get("self")), "") or layer
            if told is not None:
                about, at = told(frame)
                layer, line = about or layer, at or line
            line = line_of(frame.f_code.co_filename, number, folders) or line
    found = ", ".join(filter(None, [layer and f"in {layer}", line]))
    return found and f" ({found})"


def folders_of(libraries: Sequence[ModuleType]) -> list[Path]:
    """Return where the code of this package and of ``libraries`` is."""
    return [*_OURS, *(Path(str(library.__file__)).parent for library in libraries)]


def line_of(file: str, number: int | str, folders: Sequence[Path]) -> str:
    """Return a line of code as it is told to people, "" if it is in one of the ``folders`` or in no file."""
    path = Path(file)
    inside = any(path.is_relative_to(folder) or path.resolve().is_relative_to(folder) for folder in folders)
    return f"{path.name}, line {number}" if path.exists() and not inside else ""


def chain(error: BaseException) -> list[BaseException]:
    """Return an error and all that led to it, the first of them last."""
    found: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in found:
        found.append(following)
        following = following.__cause__ or following.__context__
    return found
