"""Running statistics measured anew, at once and as a hook."""

from collections.abc import Callable, Iterable
from typing import Any

from ...frameworks import several
from .contract import adapter_of
from .hook import Hook


def update_statistics(model: Any, batches: Iterable[Any]) -> Callable[[], None]:
    """Re-estimate the running statistics of every SN, BRN and BatchNorm on ``batches``, in place of moving averages.

    Mean and variance become those of all the values a layer saw, each batch weighted by its count, while the layers
    normalize by the batch, without BRN's correction towards what is to be replaced; all else runs as at inference. It
    does for all of them what `torch.optim.swa_utils.update_bn` does for BatchNorm. PyTorch layers that synchronize
    count the batches of all their processes, which have to have as many each; in Keras, masked positions take no part,
    and layers that are not trainable keep theirs. ::

        undo = update_statistics(model, batches)
        undo()  # gives the layers the statistics they had

    Args:
        model: a PyTorch or Keras model.
        batches: inputs as the model takes them, on any device, or pairs whose first part is; an array is one batch.

    Returns what gives the layers the statistics they had. Raises `UnsupportedError` if the model has no such layer,
    `InputError` if there are no batches or what is given is none; the statistics are then as before.
    """
    return adapter_of(model).update_statistics(model, several.batches(batches))


class Statistics(Hook):
    """Re-estimate running statistics on ``batches`` before every evaluation and at the end (see `update_statistics`).

    Nothing happens in a model without any. Give it last, since the other hooks settle what the layers are given::

        with Hooks(GateSchedule(model, 1000), Statistics(model, batches)) as hooks:
            ...

    Args:
        model: a PyTorch or Keras model.
        batches: inputs as the model takes them, or pairs whose first part is; an iterator is held in memory, and an
            array is one batch.
    """

    def __init__(self, model: Any, batches: Iterable[Any]) -> None:
        self.model, self._adapter = model, adapter_of(model)
        self.batches = several.batches(batches)

    def on_evaluate(self) -> None:
        """Re-estimate them."""
        if self._adapter.moving_layers(self.model):
            self._adapter.update_statistics(self.model, self.batches)

    def on_end(self) -> None:
        """Re-estimate them."""
        super().on_end()
        self.on_evaluate()
