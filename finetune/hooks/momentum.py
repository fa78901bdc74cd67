"""The hook that keeps moving statistics steady at small batches."""

from contextlib import ExitStack
from typing import Any

from .contract import adapter_of
from .hook import Hook, above_zero

RENORM_MOMENTUM = 0.03
"""The most a batch weighs in BRN's moving statistics: between BatchNorm's 0.1, too noisy, and its paper's slow 0.01."""


class Momentum(Hook):
    r"""Let moving statistics average over as many images as with batches of ``images``, however small these are.

    The weight m of a batch becomes, until the end,

    .. math:: m' = 1 - (1 - m)^{b / \mathtt{images}}

    for batches of b images; larger batches keep it. At m = 0.1 the statistics are those of the last ten batches or so,
    which at two images a batch are too few to normalize by. SN, BRN and BatchNorm have it, unless they average over all
    batches. BRN normalizes by its moving statistics in training, too, and m counts as 0.03 at most there, whatever
    the batch. In Keras, where it is a constant of compiled code, open it before `compile`::

        with Momentum(model, batch_size=2) as hook:
            ...

    Args:
        model: a PyTorch or Keras model.
        batch_size: b, the images in a batch.
        images: those that m was chosen for.

    Raises `InputError` for numbers below 1.
    """

    def __init__(self, model: Any, batch_size: int, images: int = 64) -> None:
        self.share = above_zero("batch_size", batch_size) / max(above_zero("images", images), batch_size)
        self._model, self._adapter = model, adapter_of(model)

    def change(self, undo: ExitStack) -> None:
        """Give the layers the momentum of small batches."""
        undo.callback(self._adapter.scale_momentum(self._model, self.share, RENORM_MOMENTUM))
