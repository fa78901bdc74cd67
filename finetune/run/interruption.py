"""Ctrl-C and SIGTERM as a wish to stop after the step, not in it."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from ...errors import NormswapError, option


class StoppedError(NormswapError):
    """A signal ended the run after a whole step; its exit code is the shell's for that signal, 128 + number."""

    def __init__(self, number: int, step: int, way: str | None = None) -> None:
        name, way = signal.Signals(number).name, way or f"go on with {option('resume')}"
        super().__init__(f"stopped by {name} after step {step}, which is saved; {way}")
        self.number, self.step, self.exit_code = number, step, 128 + number


@contextmanager
def signals() -> Iterator[Callable[[], int]]:
    """Yield what returns the number of the signal received, 0 for none; a second one acts at once.

    Signals belong to the main thread: in another this watches for none.
    """
    received = 0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal received
        received = number
        restore()

    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    try:
        yield lambda: received
    finally:
        restore()
