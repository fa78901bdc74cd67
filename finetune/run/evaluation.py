"""How good a run's model is: its accuracy, and how far it is from the original."""

from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...data.dataset import Data
from ...errors import InputError, NormswapError, VerificationError, named, spoken
from ..hooks.contract import adapter_of
from ..hooks.distillation import Distillation
from ..hooks.scores import Logits
from .accuracy import Accuracy, accuracy
from .contract import Trainer
from .figures import drift

WATCHED = 64
"""How many of the images it learns from a model's scores are compared on."""

MOST = 256
"""How many images are predicted at once, where training has room for a fourth of it: nothing is kept for gradients."""

SMALL = 2**22
"""How many values in images there is always room for, however few of them a step takes."""


class Evaluation:
    """Measures ``model``, by the images to evaluate on and against ``original``, where a run has them.

    Raises `VerificationError` if all images are the same.
    """

    def __init__(
        self, trainer: Trainer, model: Any, original: Any, data: Data, eval_data: Data | None, batch_size: int
    ) -> None:
        self.model, self.original, self.eval_data = model, original, eval_data
        self._trainer = trainer
        self._logits, self._originals_logits = Logits(), Logits()
        self._watched = data.batch(data.sample(WATCHED))[0]
        self.batch_size = min(MOST, max(4 * batch_size, SMALL // self._watched[0].size))
        if len(self._watched) > 1 and not np.ptp(self._watched, axis=0).any():
            raise VerificationError(f"expected images that differ, received {len(self._watched)} that are all the same")

    def accuracy(self, model: Any) -> Accuracy:
        """Return a model's accuracy and loss on all the data to evaluate on, of which each process sees its share."""
        assert self.eval_data is not None
        known = self._logits if model is self.model else self._originals_logits

        def logits(found: NDArray[Any]) -> NDArray[Any]:
            known.decide(found)
            return known(found, np)  # type: ignore[no-any-return]

        own = accuracy(
            partial(self._scores, model),
            self.eval_data,
            batch_size=self.batch_size,
            share=self._trainer.processes(),
            logits=logits,
        )
        return Accuracy.merged(self._trainer.gathered(own))

    def drift(self, x: NDArray[np.float32] | None = None) -> float:
        """Return how far the model is from the original (see `drift`) on ``x``, without it on images learned from."""
        x = self._watched if x is None else x
        found, wanted = (self._scores(model, x).astype(np.float64) for model in (self.model, self.original))
        self._logits.decide(found)
        self._originals_logits.decide(wanted)
        return drift(self._logits(found, np), self._originals_logits(wanted, np))

    def divergence(self, temperature: float) -> float:
        """Return the loss of `Distillation` from the original on images learned from, the same in all processes."""
        x = self._watched[: self.batch_size]
        loss = Distillation(self.model, self.original, temperature)(x, adapter_of(self.model).infer(self.model, x))
        return float(self._trainer.gathered(float(loss))[0])

    def require_finite(self, step: int) -> None:
        """Raise `VerificationError` if the model's scores are not: no loss tells of what the last step did."""
        if not np.isfinite(self._scores(self.model, self._watched)).all():
            raise VerificationError(
                f"expected finite scores, received NaN or infinity from the model of step={step}; lower {named('lr')}"
            )

    def _scores(self, model: Any, x: NDArray[np.float32]) -> NDArray[Any]:
        return self._trainer.predict(model, x, batch_size=self.batch_size)


def first_scores(trainer: Trainer, model: Any, data: Data) -> NDArray[Any]:
    """Return a model's scores for one image; raises `InputError` if it cannot take it."""
    return scores_of(trainer, model, data.batch([0])[0])


def scores_of(trainer: Trainer, model: Any, x: NDArray[Any]) -> NDArray[Any]:
    """Return a model's scores for images (N, ...); raises `InputError` if it cannot take them."""
    try:
        return trainer.predict(model, x)
    except NormswapError:
        raise
    except Exception as error:  # of either framework
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"expected images of a shape that the model takes, received {x.shape[1:]}: {reason}; "
            f"see {spoken('--input-shape and --size', 'its preprocessing')}"
        ) from error
