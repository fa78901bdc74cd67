"""Checkpoints of a run: written whole or not at all, checked when read, the damaged passed over."""

import json
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from ...errors import InputError, NormswapWarning, option
from ...formats.fields import read
from ...formats.place import Place
from ...formats.seal import sealed, unsealed
from ...formats.text import json_object
from ...sources.listing import listing, require_listed
from ...sources.outputs import Kind, staged

KEPT = 2
"""How many of the newest checkpoints stay, so that there is one to fall back to."""

_LOG = "checkpoint.json"
_STEP = re.compile(r"step-(\d{6,18})", re.ASCII)
CHECKPOINT = Kind("a checkpoint", Path.is_dir)


Log = TypeVar("Log")


@dataclass(frozen=True)
class Checkpoint(Generic[Log]):
    """The folder of one checkpoint, and what its log says."""

    folder: Path
    log: Log


@dataclass(frozen=True)
class _File:
    """What the file beside a checkpoint's others says."""

    log: dict[str, Any]
    sha256: dict[str, str]


class Checkpoints(Generic[Log]):
    """The checkpoints in a folder, one subfolder for each step that has one, with a ``kind`` of log, a dataclass."""

    def __init__(self, folder: Path, kind: type[Log]) -> None:
        self.folder, self._kind = folder, kind

    @contextmanager
    def writing(self, step: int, log: Log) -> Iterator[Path]:
        """Yield a folder for the files of a step's checkpoint; at the end ``log`` goes beside them.

        The checkpoint appears in one move, after its content is on the disk.
        """
        with staged(self._path(step), overwrite=True, kind=CHECKPOINT) as temporary:
            temporary.mkdir()
            yield temporary
            told = {"log": asdict(log), "sha256": listing(temporary)}  # type: ignore[call-overload]
            (temporary / _LOG).write_text(json.dumps(sealed(told)), encoding="utf-8")

    def prune(self, *, keep: int | None) -> None:
        """Remove all but the newest checkpoints, and that of step ``keep``."""
        for number, path in self._paths()[:-KEPT]:
            if number != keep:
                shutil.rmtree(path)

    def newest(self) -> Checkpoint[Log] | None:
        """Return the newest checkpoint that is whole, None if there are none.

        Warns of each damaged one it passes over. Raises `InputError` if all are.
        """
        paths = self._paths()
        for number, path in reversed(paths):
            try:
                return self._read(path)
            except InputError as error:
                if number == paths[0][0]:
                    anew = f"start anew with {option('overwrite')}"
                    raise InputError(f"{error}; no other checkpoint is whole: {anew}") from None
                warnings.warn(f"{error}; going on from the checkpoint before it", NormswapWarning, stacklevel=2)
        return None

    def at(self, step: int) -> Checkpoint[Log]:
        """Return the checkpoint of ``step``; raises `InputError` if it is damaged."""
        return self._read(self._path(step))

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def _paths(self) -> list[tuple[int, Path]]:
        found = ((_STEP.fullmatch(path.name), path) for path in self.folder.glob("step-*"))
        return sorted((int(match[1]), path) for match, path in found if match)

    def _read(self, path: Path) -> Checkpoint[Log]:
        place = Place(str(path / _LOG))
        try:
            content = (path / _LOG).read_bytes()
        except OSError as error:
            raise InputError(f"expected a checkpoint in {path}, received one without its log: {error}") from None
        found = read(_File, unsealed(json_object(content, place), place), place)
        require_listed(path, found.sha256, (), (), place.of("sha256"))
        unlisted = sorted(file.name for file in path.iterdir() if file.name not in (*found.sha256, _LOG))
        if unlisted:
            raise InputError(
                place.of("sha256").said("every file beside it", f"{unlisted[0]}, which is there and not listed")
            )
        return Checkpoint(path, read(self._kind, found.log, place.of("log")))
