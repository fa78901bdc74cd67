"""The hook that leads over from BatchNorm to what replaced it."""

from contextlib import ExitStack
from typing import Any

from ...errors import InputError
from .contract import adapter_of
from .hook import Hook, above_zero


class Blend(Hook):
    r"""Fade every replaced layer in, in training, and the BatchNorm that ``reference`` has in its place out.

    .. math:: y = \lambda_i\,\mathrm{BN}_i(x) + (1 - \lambda_i)\,\mathrm{new}_i(x)

    with BN frozen at its running statistics, one affine map per channel. λ falls linearly from 1 to 0, over the first
    ``1 - stagger`` of the steps in the first layer and over the last in the last: what a layer adapts to behind earlier
    ones is then what it will be given in the end, while the layers after it still compute what they were trained to.
    Evaluations are of the new layers alone, which are what is saved at any time and all that is left in the end. ::

        with Blend(model, original, 500) as hook:
            ...

    Args:
        model: a PyTorch or Keras model, patched.
        reference: the model before the patch.
        steps: how many steps it takes.
        stagger: the share of them by which the last layer begins after the first.

    Raises `InputError` for values out of range and for a ``reference`` without the layers' BatchNorms;
    `UnsupportedError` for a model without replaced layers, and on Keras's JAX backend.

    Source: Guo et al., "SLAB: Efficient Transformers with Simplified Linear Attention and Progressive Re-parameterized
    Batch Normalization", section 3.1 (λ); Baroni et al., "Transformers Don't Need LayerNorm at Inference Time" (one
    layer after the other).
    """

    def __init__(self, model: Any, reference: Any, steps: int, *, stagger: float = 0.5) -> None:
        if not 0 <= stagger < 1:
            raise InputError(f"expected `stagger` from 0 to below 1, received stagger={stagger}")
        self.steps, self.stagger = above_zero("steps", steps), stagger
        self._mixes = adapter_of(model).blend(model, reference)

    def change(self, undo: ExitStack) -> None:
        """Put the BatchNorms in, with no share yet."""
        for mix in self._mixes:
            undo.callback(mix.close)
            mix.open()

    def on_step(self, step: int) -> None:
        """Set each layer's λ."""
        super().on_step(step)
        last = max(1, len(self._mixes) - 1)
        for index, mix in enumerate(self._mixes):
            progress = (step / self.steps - self.stagger * index / last) / (1 - self.stagger)
            mix.set(1 - min(1.0, max(0.0, progress)))

    def on_evaluate(self) -> None:
        """Leave the new layers alone."""
        for mix in self._mixes:
            mix.set(0.0)
