"""A file in a runtime of another process, as this one sees it: what it answers, or how it failed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from ...errors import InputError, UnsupportedError, named
from .known import Runtime

Arrays = dict[str, NDArray[Any]]

_LONGEST_PAUSE = 0.05


class RuntimeFailedError(Exception):
    """The runtime did not answer, and why: an error of its own, or that its process ended."""


class Child:
    """A file that a runtime has loaded; a process that has ended is started again for what is asked next.

    ``told`` is what it said as it loaded the file, see the protocol. It is to be closed.

    Raises `MissingDependencyError` if the runtime is not installed, `UnsupportedError` if it refuses the file,
    `InputError` if it takes more than ``timeout`` seconds, and `RuntimeFailedError` if it crashes.
    """

    def __init__(
        self,
        runtime: Runtime,
        path: Path,
        *,
        outputs: Sequence[str],
        precision: str = "f32",
        data: Sequence[str] = (),
        timeout: float,
    ) -> None:
        self.runtime, self.path, self.timeout = runtime, path, timeout
        self._folder = TemporaryDirectory(prefix="normswap-")
        self._process: subprocess.Popen[bytes] | None = None
        self._asked = 0
        job = {"file": str(path.absolute()), "precision": precision, "outputs": [*outputs], "data": [*data]}
        self._place("job.json").write_text(json.dumps(job), encoding="utf-8")
        try:
            self.told = self._started()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process and remove what it was given."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None
        self._folder.cleanup()

    def run(self, arrays: Mapping[str, NDArray[Any]]) -> Arrays:
        """Return the outputs by name; raises `RuntimeFailedError`, or `InputError` if they take too long."""
        if self._process is None:
            self._started()
        assert self._process is not None
        assert self._process.stdin is not None
        self._asked += 1
        number = str(self._asked)
        save_file(dict(arrays), self._place(f"{number}.in"))
        shapes = ", ".join(str(array.shape) for array in arrays.values())
        try:
            self._process.stdin.write(f"{number}\n".encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended, which is found below
        answer = self._answer(f"{number}.json", f"the file's outputs for inputs of shape {shapes}")
        if "failed" in answer:
            raise RuntimeFailedError(answer["failed"])
        found: Arrays = load_file(self._place(f"{number}.out"))
        for part in (f"{number}.in", f"{number}.out", f"{number}.json"):
            self._place(part).unlink()
        return found

    def _started(self) -> dict[str, Any]:
        """Start the process, have it load the file, and return what it tells of it."""
        self._place("loaded.json").unlink(missing_ok=True)
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        try:
            with self._place("stderr").open("wb") as errors:
                self._process = subprocess.Popen(
                    [*self.runtime.command, self._folder.name],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=errors,
                    env=environment,
                )
        except FileNotFoundError:
            raise self.runtime.missing(self.runtime.command[0], "it is not installed") from None
        told = self._answer("loaded.json", "the file loaded")
        if "missing" in told:
            raise self.runtime.missing(told["missing"], told["reason"])
        if "refused" in told:
            raise UnsupportedError(
                f"expected a file that {self.runtime.name} loads, received {self.path}, which it refuses: "
                f"{told['refused'].rstrip('.')}; update {self.runtime.name}, or leave it out of {named('runtime')}"
            )
        return told

    def _answer(self, name: str, what: str) -> dict[str, Any]:
        """Return what a file says once the process has written it."""
        assert self._process is not None
        path, deadline, pause = self._place(name), time.monotonic() + self.timeout, 0.001
        while True:
            ended = self._process.poll() is not None
            if path.exists():
                told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
                return told
            if ended:
                code, self._process = self._process.wait(), None
                raise RuntimeFailedError(self._last_words(code))
            if time.monotonic() > deadline:
                self.close()
                raise InputError(
                    f"expected {what} by {self.runtime.name} within {self.timeout:g} s, received none; "
                    f"allow more by {named('timeout')}"
                )
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _last_words(self, code: int) -> str:
        """Return how a process ended, with the last line it wrote."""
        lines = self._place("stderr").read_text(encoding="utf-8", errors="replace").split("\n")
        said = next((f": {line.strip()}" for line in reversed(lines) if line.strip()), "")
        if code < 0:
            return f"its process was ended by {signal.Signals(-code).name}{said}"
        return f"its process ended with exit code {code}{said}"

    def _place(self, name: str) -> Path:
        return Path(self._folder.name) / name
