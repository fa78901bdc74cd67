"""The folder a run keeps in its output: settings, curves and checkpoints."""

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ...bundles.manifest import LOCK, RUN, SETTINGS, is_empty, require_replaceable
from ...errors import InputError, OutputExistsError, UsageError, named
from ...sources.outputs import clear, require_name, staged
from .accuracy import Accuracy
from .checkpoints import Checkpoint, Checkpoints
from .journal import Journal
from .rate import Plateau
from .settings import Settings

RETIRED = ".run.old"
"""Where the run that a new one replaces waits for it to come to something."""


@dataclass
class Progress:
    """How far a run has come: what its checkpoints tell beside weights."""

    step: int = 0
    losses: list[float] = field(default_factory=list)
    original: Accuracy | None = None
    best: Accuracy | None = None
    best_step: int | None = None
    done: bool = False
    lr: float = 0.0
    plateau: Plateau = field(default_factory=Plateau)
    data: str = ""
    model: str = ""

    def __post_init__(self) -> None:
        for name in ("step", "best_step"):
            if (value := getattr(self, name)) is not None and value < 0:
                raise InputError(f"expected `{name}` of at least 0, received {name}={value}")


class RunFolder:
    """The folder ``run`` in ``output``; only the process of rank 0 (``writes``) changes it.

    Raises `OutputExistsError` for an output that nothing can be called.
    """

    def __init__(self, output: Path, *, writes: bool) -> None:
        require_name(output)
        self.output, self.path, self.writes = output, output / RUN, writes
        self._retired = output / RETIRED
        self.checkpoints = Checkpoints(self.path / "checkpoints", Progress)

    def require_free(self, *, resume: bool, overwrite: bool) -> None:
        """Raise `OutputExistsError` or `InputError` unless a run may begin in the output, or go on there.

        Raises `UsageError` if it is to do both.
        """
        if resume and overwrite:
            raise UsageError(f"expected one of {named('resume')} and {named('overwrite')}, received both")
        if not resume:
            require_replaceable(self.output, overwrite=overwrite)
        elif not self._holds_a_run() and not self._is_empty():
            raise InputError(f"expected a fine-tuning run to resume in {self.output}, received none")

    @contextmanager
    def locked(self, *, expected_empty: bool) -> Iterator[None]:
        """Keep other runs out of the output meanwhile.

        Raises `OutputExistsError` if one is in it, or has been since it was found ``expected_empty``.
        """
        if not self.writes:
            yield
            return
        self.output.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.output / LOCK, blocking=False)
        try:
            lock.acquire()
        except Timeout:
            raise OutputExistsError(
                f"expected an output that no other run is writing, received {self.output}; "
                "wait for that run to end, or write to another output"
            ) from None
        try:
            if expected_empty and not self._is_empty():
                require_replaceable(self.output, overwrite=False)
            yield
        finally:
            Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()
            if self._is_empty():
                shutil.rmtree(self.output, ignore_errors=True)

    def begin(
        self, settings: Settings, record: Mapping[str, Any], new: Progress, *, resume: bool
    ) -> tuple[Progress, Checkpoint[Progress]] | None:
        """Start the folder, or return how far the run in it has come, if it got to a checkpoint.

        Raises `InputError` if that run has other settings, another model or other data than the ``new`` one.
        """
        if resume and self._holds_a_run():
            self._compare(Settings.from_toml(self.path / SETTINGS), settings)
            if self.writes:
                self._clean()
            found = self.checkpoints.newest()
            if found is None:
                return None
            progress = found.log
            for which, received in (
                ("data", "other images, labels or preprocessing"),
                ("model", "another bundle"),
            ):
                if getattr(progress, which) != getattr(new, which):
                    raise InputError(
                        f"expected the {which} of the run in {self.output}, received {received}; "
                        "repeat it, or write to another output"
                    )
            return progress, found
        if self.writes:
            self._clean()
            if self.path.exists() and not self._retired.exists():
                os.replace(self.path, self._retired)
            shutil.rmtree(self.path, ignore_errors=True)  # of a run that did not end, where another waits
            with staged(self.path) as temporary:
                temporary.mkdir()
                (temporary / SETTINGS).write_bytes(settings.to_toml(record).encode("utf-8", "replace"))
        return None

    def journal(self, progress: Progress | None) -> AbstractContextManager[Journal | None]:
        """Return the run's journal, which goes on from there; processes that do not write have none."""
        if not self.writes:
            return nullcontext()
        journal = Journal(self.path, tensorboard=find_spec("tensorboardX") is not None)
        journal.rewind(-1 if progress is None else progress.step)
        return journal

    def finish(self) -> None:
        """Leave nothing of the run that this one replaces."""
        shutil.rmtree(self._retired, ignore_errors=True)

    def discard(self) -> None:
        """Leave nothing of a run that came to nothing, and the one it was to replace."""
        if self.writes:
            shutil.rmtree(self.path, ignore_errors=True)
            if self._retired.exists():
                os.replace(self._retired, self.path)

    def _clean(self) -> None:
        """Remove what a killed writer left."""
        for folder in (self.output, self.checkpoints.folder):
            clear(folder)

    def _compare(self, before: Settings, now: Settings) -> None:
        one, other = asdict(before), asdict(now)
        if changed := [name for name in one if one[name] != other[name]]:
            expected, received = (", ".join(f"{name}={each[name]!r}" for name in changed) for each in (one, other))
            raise InputError(
                f"expected the settings of the run in {self.output}, {expected}, received {received}; "
                "repeat them, or write to another output"
            )

    def _holds_a_run(self) -> bool:
        return (self.path / SETTINGS).is_file()

    def _is_empty(self) -> bool:
        return not self.output.is_dir() or is_empty(self.output)
