"""The hook that ends a run whose loss is not finite."""

from math import isfinite

from ...errors import VerificationError
from .hook import Hook


class StopAtNaN(Hook):
    """Raise `VerificationError` at a loss that is not finite.

    Told of the loss before the backward pass, it lets no step be taken with it::

        with StopAtNaN() as hook:
            ...
            hook.on_loss(step, loss.item())
    """

    def on_loss(self, step: int, loss: float) -> None:
        """Raise if ``loss`` is NaN or infinite."""
        if not isfinite(loss):
            raise VerificationError(
                f"expected a finite loss, received loss={loss} at step={step}; lower the learning rate"
            )
