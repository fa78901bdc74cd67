"""What fits into the machine, told before it is asked for."""

import os

from ..errors import UsageError
from .archives import size


def require_memory(needed: int, what: str) -> None:
    """Raise `UsageError` if ``what``, of so many bytes, is more than all the memory there is."""
    if needed > (total := _total()):
        raise UsageError(
            f"expected {what} to fit into memory, {size(total)} here, received {size(needed)}; give a smaller size"
        )


def _total() -> int:
    """Return how many bytes of memory the machine has, as many as can be where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 1 << 62
