"""Checkpoints of a run: written whole or not at all, checked when read, the damaged passed over."""

import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...errors import InputError, NormswapWarning, option
from ...sources.files import sha256
from ...sources.outputs import Kind, staged

KEPT = 2
"""How many of the newest checkpoints stay, so that there is one to fall back to."""

_LOG = "checkpoint.json"
CHECKPOINT = Kind("a checkpoint", Path.is_dir)


@dataclass(frozen=True)
class Checkpoint:
    """The folder of one checkpoint, and what its log says."""

    folder: Path
    log: dict[str, Any]


class Checkpoints:
    """The checkpoints in a folder, one subfolder for each step that has one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def writing(self, step: int, log: Any) -> Iterator[Path]:
        """Yield a folder for the files of a step's checkpoint; at the end ``log``, a dataclass, goes beside them.

        The checkpoint appears in one move, after its content is on the disk.
        """
        with staged(self._path(step), overwrite=True, kind=CHECKPOINT) as temporary:
            temporary.mkdir()
            yield temporary
            hashes = {file.name: sha256(file) for file in sorted(temporary.iterdir())}
            (temporary / _LOG).write_text(json.dumps({"log": asdict(log), "sha256": hashes}))

    def prune(self, *, keep: int | None) -> None:
        """Remove all but the newest checkpoints, and that of step ``keep``."""
        for number, path in self._paths()[:-KEPT]:
            if number != keep:
                shutil.rmtree(path)

    def newest(self) -> Checkpoint | None:
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

    def at(self, step: int) -> Checkpoint:
        """Return the checkpoint of ``step``; raises `InputError` if it is damaged."""
        return self._read(self._path(step))

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def _paths(self) -> list[tuple[int, Path]]:
        return sorted((int(path.name.removeprefix("step-")), path) for path in self.folder.glob("step-[0-9]*"))

    def _read(self, path: Path) -> Checkpoint:
        try:
            found = json.loads((path / _LOG).read_text())
            log, hashes = dict(found["log"]), dict(found["sha256"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"expected a checkpoint in {path}, received one without its log: {error}") from None
        for name, digest in hashes.items():
            file = path / Path(name).name
            if not file.is_file() or sha256(file) != digest:
                raise InputError(f"expected {file} as it was saved, received a file that is missing or has changed")
        return Checkpoint(path, log)
