"""The processes that train together, started as the command line would be by hand."""

import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..bundles.manifest import RUN, is_bundle
from ..errors import UnsupportedError
from ..finetune.run.history import History
from ..finetune.run.interruption import StoppedError, signals
from ..finetune.run.journal import METRICS

GOES_ON = "the same command goes on"
_POLL = 0.2


def launch(processes: int, arguments: Sequence[str], runs: Iterable[Path]) -> None:
    """Give normswap's command line the arguments in several processes that ``torchrun`` starts, and wait for them.

    Ctrl-C and SIGTERM let them end their step and save, which is told of the one of ``runs`` that was in training.

    Raises `StoppedError` then, `UnsupportedError` if one of them fails, whose own error is above.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes)), **os.environ}
    with signals() as stopped:
        # In a session of its own, else Ctrl-C would reach each of them twice, and at the second they end at once.
        child = subprocess.Popen([*command, "-m", "normswap", *arguments], env=environment, start_new_session=True)  # nosec
        while child.poll() is None:
            if stopped():
                child.terminate()
                child.wait()
                raise StoppedError(stopped(), _steps(runs), GOES_ON)
            try:
                child.wait(_POLL)
            except subprocess.TimeoutExpired:
                continue
    if child.returncode:
        raise UnsupportedError(
            f"expected processes that train together, received exit status {child.returncode} of torchrun; their own "
            f"error is above, and {GOES_ON}"
        )


def _steps(runs: Iterable[Path]) -> int:
    """Return how far the run came that has begun and not ended."""
    begun = [History.of(path) for path in runs if (path / RUN / METRICS).is_file() and not is_bundle(path)]
    return max((history.steps[-1]["step"] for history in begun if history.steps), default=0)
