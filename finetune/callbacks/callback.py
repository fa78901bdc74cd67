"""What the callbacks of all ecosystems share."""

from types import TracebackType
from typing import Self

from ..hooks.hook import Hooks


class HooksCallback:
    """A callback that is a context manager over its ``hooks``, for whoever wants them closed on every way out.

    An ecosystem that tells its callbacks of no exception leaves them open at one; ``with callback:`` around the
    training does not, and opens them before anything is built.
    """

    hooks: Hooks

    def __enter__(self) -> Self:
        self.hooks.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.hooks.__exit__(kind, error, trace)
