"""The stages of a run, such as ``calibrate,norm,all``, and the steps each takes."""

from collections.abc import Sequence
from dataclasses import dataclass

from ...errors import InputError
from ..hooks.freeze import LAST

CALIBRATE = "calibrate"

_NORM_WEIGHT, _OTHER_WEIGHT = 1, 4  # `norm` brings most of what it can in few steps


@dataclass(frozen=True)
class Stage:
    """What learns (see `Training`) from step ``first`` of the run on, for ``steps`` steps."""

    train: str
    first: int
    steps: int

    @property
    def end(self) -> int:
        """The step at which the next stage begins."""
        return self.first + self.steps


def parse(text: str, steps: int) -> tuple[bool, list[Stage]]:
    """Return whether to calibrate first, and the stages that train, out of ``text``.

    ``text`` lists what learns, separated by commas: ``norm``, ``all`` or ``last:N``, each with ``=STEPS`` if it is to
    take just so many; the others share what is left of ``steps``, of which ``norm`` takes a part and any other four, or
    none of very few.
    ``calibrate`` may come first and takes none.

    Raises `InputError` for any other text, or if a stage is left without steps.
    """
    names = [part.strip() for part in text.split(",")] if isinstance(text, str) else [""]
    calibrates = names[0] == CALIBRATE
    asked = [_asked(name, text) for name in names[calibrates:]]
    left = steps - sum(count for _, count in asked if count is not None)
    shares = _shares([name for name, count in asked if count is None], left)
    stages: list[Stage] = []
    for name, count in asked:
        taken = shares.pop(0) if count is None else count
        if taken or count is not None or not shares:  # a share too small for a step is left out
            stages.append(Stage(name, stages[-1].end if stages else 0, taken))
    if (total := sum(stage.steps for stage in stages)) != steps * bool(stages) or any(s.steps < 1 for s in stages):
        raise InputError(
            f"expected stages of one step or more that take {steps} together, received stages={text!r}, which take "
            f"{' + '.join(str(stage.steps) for stage in stages)} = {total}"
        )
    return calibrates, stages


def _asked(name: str, text: str) -> tuple[str, int | None]:
    name, given, count = name.partition("=")
    if (name not in ("norm", "all") and not LAST.fullmatch(name)) or (given and not count.isdecimal()):
        raise InputError(
            "expected stages out of norm, all and last:N, each with =STEPS or not, after calibrate or not, "
            f"received stages={text!r}"
        )
    return name, int(count) if given else None


def _shares(names: Sequence[str], steps: int) -> list[int]:
    """Divide ``steps`` by weight; the last takes what rounding leaves."""
    weights = [_NORM_WEIGHT if name == "norm" else _OTHER_WEIGHT for name in names]
    shares = [steps * weight // sum(weights) for weight in weights[:-1]]
    return [*shares, steps - sum(shares)] if names else []
