"""Learn from the original model instead of labels."""

from contextlib import ExitStack
from typing import Any

from ...errors import InputError, UnsupportedError
from ...frameworks.detect import get_framework
from .contract import adapter_of
from .hook import Hook
from .scores import Logits, scores


class Distillation(Hook):
    r"""The distance of ``model`` from ``teacher``, the model before the patch, as a loss that needs no labels.

    .. math:: L = T^2\,\mathrm{KL}(p \,\Vert\, q) + w\,\frac1S \sum_s \frac{\overline{(y_s - t_s)^2}}{\mathrm{var}(t_s)}

    p and q are the softmax of teacher's and model's scores over T, the ``temperature``; the divergence is averaged over
    all but the classes, dimension 1 in PyTorch and the last in Keras. w is ``features``, and y and t are what the S
    replaced layers of model and teacher return in their last call. The scores may be ``"logits"`` of a mapping or the
    first of several outputs. They may be probabilities, which each model's first batch decides for all; code that is
    traced for a graph, as Keras's ``fit`` is, needs `decide` for that.

    ``loss = distillation(x, output)`` follows ``output = model(x)``; in Keras it is what ``compute_loss`` returns. With
    ``features`` it has to be open in the forward pass, in code that is compiled before that::

        with Distillation(model, original, features=0.1) as distillation:
            for x in images:
                loss = distillation(x, model(x))
                ...

    The teacher runs at inference, without gradients and under the autocast of the caller. A model that drops units or
    paths meanwhile learns to make up for what it alone is lacking: ``model.eval()``, or in Keras ``training=False``,
    has it compute as its teacher, as a run of `finetune` does. The teacher costs a forward pass each step, about a
    third of one more step, and its weights; ``features`` cost that the outputs of the replaced layers of both models
    are held until the backward pass, and a few passes over each.

    Args:
        model: a PyTorch or Keras model, patched.
        teacher: the model before the patch.
        temperature: T.
        features: w, 0 to look at scores alone.

    Raises `InputError` for values out of range and for a teacher without the model's layers; `UnsupportedError` for
    ``features`` of a model without replaced layers, and for an output without scores.

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", section 2; Romero et al., "FitNets: Hints for
    Thin Deep Nets", section 2.2.
    """

    def __init__(self, model: Any, teacher: Any, temperature: float = 2.0, features: float = 0.0) -> None:
        if not temperature > 0:
            raise InputError(f"expected `temperature` above 0, received temperature={temperature}")
        if not features >= 0:
            raise InputError(f"expected `features` of at least 0, received features={features}")
        self.teacher, self.temperature, self.features = teacher, temperature, features
        self._model, self._adapter = model, adapter_of(model)
        self._names = self._layers() if features > 0 else []
        self._logits, self._teachers_logits = Logits(), Logits()
        self._asks = False
        self._own: dict[str, Any] = {}
        self._wanted: dict[str, Any] = {}

    def _layers(self) -> list[str]:
        """Return the names of the layers whose outputs count."""
        names = list(self._adapter.replaced(self._model))
        if not names:
            raise UnsupportedError("expected a patched model for features=, received one without replaced layers")
        known = dict(get_framework(self.teacher).named_layers(self.teacher))
        if missing := [name for name in names if name not in known]:
            raise InputError(
                "expected a teacher with the layers of the model, which it is before the patch, received one without "
                f"{', '.join(missing)}"
            )
        return names

    def change(self, undo: ExitStack) -> None:
        """Listen to the replaced layers of both models."""
        undo.callback(self._forget)
        for model, note in ((self._model, self._note_own), (self.teacher, self._note_wanted)):
            framework = get_framework(model)
            known = dict(framework.named_layers(model))
            undo.enter_context(framework.watching({name: known[name] for name in self._names}, note))

    def _note_own(self, name: str, x: Any, output: Any) -> None:
        if self._adapter.learns():
            self._own[name] = output

    def _note_wanted(self, name: str, x: Any, output: Any) -> None:
        if self._asks:
            self._wanted[name] = output

    def _forget(self) -> None:
        self._own.clear()
        self._wanted.clear()

    def decide(self, x: Any) -> None:
        """Tell by the scores of both models for the inputs ``x``, once and for all, whether they are probabilities."""
        for model, logits in ((self._model, self._logits), (self.teacher, self._teachers_logits)):
            self._adapter.as_logits(self._adapter.infer(model, x), logits)

    def __call__(self, x: Any, output: Any) -> Any:
        """Return the loss of one batch, whose ``output`` the model has just computed from ``x``.

        Raises `InputError` with ``features`` unless it was open in that forward pass.
        """
        if self._names and not self.is_open:
            raise InputError(
                "expected a distillation with features that was opened before the forward pass, received one that is "
                "not open; make it `with Distillation(...) as distillation:`, or call its open()"
            )
        adapter = self._adapter
        self._asks = True
        try:
            wanted = adapter.infer(self.teacher, x)
        finally:
            self._asks = False
        loss = adapter.divergence(
            adapter.as_logits(scores(output), self._logits),
            adapter.as_logits(wanted, self._teachers_logits),
            self.temperature,
        )
        if self._names:
            if unseen := sorted(self._wanted.keys() - self._own.keys()):
                raise InputError(
                    "expected a forward pass of the model before its loss, received none that reached "
                    f"{', '.join(unseen)}; open the distillation before compiling the model"
                )
            distances = [adapter.distance(self._own[name], theirs) for name, theirs in self._wanted.items()]
            loss = loss + self.features * sum(distances) / len(distances)
            self._forget()
        return loss
