"""What a training loop tells its hooks: the base class of them all, and several as one.

Hooks are small objects that work in any loop, by hand too. Each is told the number of the step and sets everything
from that alone, so a resumed run needs no more than its step, and the processes of a distributed one agree. They take
the model as `normswap.patch` leaves it, and change it from the time they are opened until they are closed. What changes
from step to step is held in tensors or variables, so compiled code is not compiled again.
"""

from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

from ...errors import InputError


class Hook:
    """What a training loop tells its hooks, of which each overrides what it needs.

    Making a hook changes no model. `open` does, or where nobody called it the first `on_step`. Whatever a hook changes
    is undone on every way out: `on_end` finishes first, `close` does not. A hook is a context manager that ends with
    the one, or where an exception leaves it with the other::

        with GateSchedule(model, 1000, freeze=100, harden=True) as hook:
            for step, (x, y) in enumerate(loader):
                hook.on_step(step)
                ...

    A hook of your own changes the model in `change`, and calls ``super()`` where it overrides `on_step` or `on_end`.
    """

    _undo: ExitStack | None = None

    @property
    def is_open(self) -> bool:
        """Whether the model is changed."""
        return self._undo is not None

    def change(self, undo: ExitStack) -> None:
        """Change the model, and push what takes that back on ``undo``, each part as soon as it is made."""

    def open(self) -> Self:
        """Change the model, unless that is done, and return the hook; a change that fails half-way is undone."""
        if self._undo is None:
            with ExitStack() as undo:
                self.change(undo)
                self._undo = undo.pop_all()
        return self

    def close(self) -> None:
        """Undo the change, where there is one, and nothing else: what is left computes what the model computed."""
        undo, self._undo = self._undo, None
        if undo is not None:
            undo.close()

    def on_step(self, step: int) -> None:
        """Prepare the optimizer step of this number, from 0, before its first forward pass."""
        self.open()

    def on_loss(self, step: int, loss: float) -> None:
        """Look at the loss of a step."""

    def on_evaluate(self) -> None:
        """Prepare an evaluation; the next step is prepared by `on_step` as ever."""

    def on_end(self) -> None:
        """Leave a plain patched model behind, after the last step."""
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint has to hold beside the model and the step: nothing, for every hook here."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` returned."""

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None and self.is_open:  # else a loop has told of the end
                self.on_end()
        finally:
            self.close()


class Hooks(Hook):
    """Several hooks as one, told in their order, and once of a step however often the loop says its number.

    All are closed, the last one first, whatever one of them raises. Raises `InputError` for what is no hook::

        with Hooks(RenormLimits(model, 1000), Momentum(model, 2), StopAtNaN()) as hooks:
            for step, (x, y) in enumerate(loader):
                hooks.on_step(step)
                loss = loss_function(model(x), y)
                hooks.on_loss(step, loss)
                ...
    """

    def __init__(self, *hooks: Hook) -> None:
        if others := [type(each).__name__ for each in hooks if not isinstance(each, Hook)]:
            raise InputError(f"expected hooks, one by one, received {others[0]}; give several as Hooks(*hooks)")
        self.hooks = hooks
        self._listening = [hook for hook in hooks if type(hook).on_loss is not Hook.on_loss]
        self._step: int | None = None

    def change(self, undo: ExitStack) -> None:
        """Open each."""
        for hook in self.hooks:
            undo.callback(hook.close)
            hook.open()

    def close(self) -> None:
        """Close each, those that were opened one by one as well."""
        self._step = None
        with ExitStack() as undo:
            for hook in self.hooks:
                undo.callback(hook.close)
            super().close()

    def on_step(self, step: int) -> None:
        """Prepare a step that is not the one prepared last."""
        super().on_step(step)
        if step != self._step:
            for hook in self.hooks:
                hook.on_step(step)
            self._step = step

    def on_loss(self, step: int, loss: Any) -> None:
        """Look at the loss, a number or a tensor, which is waited for only if a hook wants it."""
        for hook in self._listening:
            hook.on_loss(step, loss.item() if hasattr(loss, "item") else float(loss))

    def on_evaluate(self) -> None:
        """Prepare an evaluation."""
        for hook in self.hooks:
            hook.on_evaluate()
        self._step = None  # the step under way is to be prepared again

    def on_end(self) -> None:
        """Leave a plain patched model behind."""
        try:
            for hook in self.hooks:
                hook.on_end()
        finally:
            self.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of each."""
        return {"hooks": [hook.state_dict() for hook in self.hooks]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Give each its state; raises `InputError` if it was saved with another number of hooks."""
        if len(state["hooks"]) != len(self.hooks):
            raise InputError(
                f"expected the state of {len(self.hooks)} hooks, received that of {len(state['hooks'])}; "
                "resume with the hooks of the run"
            )
        for hook, own in zip(self.hooks, state["hooks"], strict=True):
            hook.load_state_dict(own)
        self._step = None  # what was prepared is of another run


def above_zero(name: str, value: int) -> int:
    """Return ``value``; raises `InputError` unless it is above 0."""
    if not value > 0:
        raise InputError(f"expected `{name}` above 0, received {name}={value}")
    return value
