"""The settings of a whole run, which are saved with it and can be given again."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import tomli_w

from ...errors import InputError
from ...formats.fields import read
from ...formats.place import Place
from ...formats.text import from_toml
from ...layers.limits import Schedule
from .stages import Stage, parse
from .training import Training

NORM_RATE = 0.2
"""The share of the rate at which norms learn by themselves before others do: calibrated, they have more to lose."""


@dataclass(frozen=True)
class Settings(Training):
    """How a run trains; a resumed run must use the same.

    ``lr`` None is `default_rate`. ``stages`` lists what learns when (see `normswap.finetune.run.stages`); left empty,
    ``train`` learns all along. ``teacher="original"`` distils from the model before the patch, without labels. With
    ``early_stop`` such a run ends when it is as accurate as its teacher on the data to evaluate on. ``limits`` is the
    preset of Batch Renormalization's limits. The first ``blend`` of the steps, a share, lead over from BatchNorm to
    what replaced it (see `Blend`). ``harden`` ends with SN's gates one-hot (see `GateSchedule`). Running statistics
    are re-estimated on ``reestimate`` images before each evaluation and at the end; with ``steady_statistics`` they
    average over as many images however small the batches (see `Momentum`). ``calibration_size`` images serve
    `calibrate`.
    """

    lr: float | None = None  # type: ignore[assignment]
    stages: str = ""
    teacher: Literal["original", "none"] = "none"
    early_stop: bool = True
    limits: Schedule = "pretrained"
    blend: float = 0.0
    harden: bool = False
    reestimate: int = 0
    steady_statistics: bool = True
    calibration_size: int = 256
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("checkpoint_every", "calibration_size"):
            if not getattr(self, name) > 0:
                raise InputError(f"expected `{name}` above 0, received {name}={getattr(self, name)}")
        if not 0 <= self.blend <= 1:
            raise InputError(f"expected `blend` from 0 to 1, received blend={self.blend}")
        if self.reestimate < 0:
            raise InputError(f"expected `reestimate` of at least 0, received reestimate={self.reestimate}")
        for name, known in (("teacher", ("original", "none")), ("limits", get_args(Schedule))):
            if getattr(self, name) not in known:
                raise InputError(f"expected `{name}` out of {', '.join(known)}, received {getattr(self, name)!r}")
        if self.stages and self.train != "all":
            raise InputError(
                f"expected one of `stages` and `train`, received stages={self.stages!r} and train={self.train!r}"
            )
        self.plan()

    def plan(self) -> tuple[bool, list[Stage]]:
        """Return whether the run calibrates first, and the stages that train."""
        return parse(self.stages or self.train, self.steps)

    @property
    def step_images(self) -> int:
        """How many images a step takes."""
        return self.batch_size * self.accumulate

    def training(self, stage: Stage, lr: float) -> Training:
        """Return how one stage trains in a run at the rate ``lr``."""
        chosen = {field.name: getattr(self, field.name) for field in fields(Training)}
        leads = stage.train == "norm" and stage.end < self.steps
        return Training(
            **{**chosen, "steps": stage.steps, "train": stage.train, "lr": lr * (NORM_RATE if leads else 1)}
        )

    def to_toml(self, record: Mapping[str, Any]) -> str:
        """Return the settings as TOML, with what else is to be recorded of the run before them."""
        values = {**record, **asdict(self)}
        return tomli_w.dumps({name: value for name, value in values.items() if value is not None})

    @classmethod
    def from_toml(cls, path: Path) -> "Settings":
        """Return the settings in a file `to_toml` wrote; raises `InputError` if it cannot be read."""
        place = Place(str(path))
        try:
            found = from_toml(path.read_bytes(), place)
        except OSError as error:
            raise InputError(f"expected the settings of a fine-tuning run in {path}, received none: {error}") from None
        known = {field.name for field in fields(cls)}
        return read(cls, {name: value for name, value in found.items() if name in known}, place)
