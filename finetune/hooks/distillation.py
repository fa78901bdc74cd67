"""Learn from the original model instead of labels."""

from importlib import import_module
from types import ModuleType, TracebackType
from typing import Any, Self

from ...errors import InputError, UnsupportedError
from ...frameworks.detect import framework_of
from .scores import scores


class Distillation:
    r"""The distance of ``model`` from ``teacher``, the model before the patch, as a loss that needs no labels.

    .. math:: L = T^2\,\mathrm{KL}(p \,\Vert\, q) + w\,\frac1S \sum_s \frac{\overline{(y_s - t_s)^2}}{\mathrm{var}(t_s)}

    p and q are the softmax of teacher's and model's scores over T, the ``temperature``; the divergence is averaged over
    all but the classes, dimension 1 in PyTorch and the last in Keras. w is ``features``, and y and t are what the S
    replaced layers of model and teacher return in their last call. The scores may be probabilities, and they may be
    ``"logits"`` of a mapping or the first of several outputs.

    ``loss = distillation(x, output)`` follows ``output = model(x)``; in Keras it is what ``compute_loss`` returns. The
    teacher runs at inference, without gradients and under the autocast of the caller. It costs a forward pass each
    step, about a third of one more step, and its weights; ``features`` cost that the outputs of the replaced layers of
    both models are held until the backward pass, and a few passes over each. `close` takes the hooks for these away, as
    does leaving it as a context manager.

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
        self._adapter: ModuleType = import_module(f".{framework_of(model)}.distillation", __package__)
        self._asks = False
        self._own: dict[str, Any] = {}
        self._wanted: dict[str, Any] = {}
        self._undo: list[Any] = []
        if features > 0:
            self._record(model)

    def _record(self, model: Any) -> None:
        names = list(self._adapter.replaced(model))
        if not names:
            raise UnsupportedError("expected a patched model for features=, received one without replaced layers")
        known = self._adapter.all_layers(self.teacher)
        if missing := [name for name in names if name not in known]:
            raise InputError(
                "expected a teacher with the layers of the model, which it is before the patch, received one without "
                f"{', '.join(missing)}"
            )
        self._undo += self._adapter.record(model, names, self._note_own)
        self._undo += self._adapter.record(self.teacher, names, self._note_wanted)

    def _note_own(self, name: str, output: Any, learned_from: bool) -> None:
        if learned_from:
            self._own[name] = output

    def _note_wanted(self, name: str, output: Any, learned_from: bool) -> None:
        if self._asks:
            self._wanted[name] = output

    def __call__(self, x: Any, output: Any) -> Any:
        """Return the loss of one batch, whose ``output`` the model has just computed from ``x``."""
        adapter = self._adapter
        self._asks = True
        try:
            wanted = adapter.infer(self.teacher, x)
        finally:
            self._asks = False
        loss = adapter.divergence(scores(output), wanted, self.temperature)
        if self._undo:
            if unseen := sorted(self._wanted.keys() - self._own.keys()):
                raise InputError(
                    "expected a forward pass of the model before its loss, received none that reached "
                    f"{', '.join(unseen)}; make the loss before compiling the model"
                )
            distances = [adapter.distance(self._own[name], theirs) for name, theirs in self._wanted.items()]
            loss = loss + self.features * sum(distances) / len(distances)
            self._own.clear()
            self._wanted.clear()
        return loss

    def close(self) -> None:
        """Take the hooks away."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
