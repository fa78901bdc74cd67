"""What an experiment is, and how one is run: a training a curve, each gone on with where it was left."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..bundles.bundle import unpatched
from ..bundles.manifest import is_bundle
from ..data.dataset import Data
from ..data.preprocessing import Preprocessing
from ..errors import InputError
from ..finetune.run.history import History
from ..finetune.run.interruption import StoppedError
from ..finetune.run.run import finetune
from ..finetune.run.settings import Settings
from ..sources.files import staged

Scale = Literal["small", "full"]

RUNS, SETTINGS, RESULTS, PICTURE = "runs", "experiment.json", "results.json", "curves.png"


@dataclass(frozen=True)
class Curve:
    """One training: how its network is built, weights drawn by a seed, and how it is trained.

    ``images`` are how many of the training images it sees in each of its ``epochs``, None for all, ``batch_size`` of
    them a step; ``settings`` are further ones of a run (see `Settings`).
    """

    name: str
    build: Callable[[int], Any]
    epochs: int
    batch_size: int
    images: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """What its folder is called."""
        return re.sub(r"[^a-z0-9.]+", "-", self.name.lower()).strip("-")


@dataclass(frozen=True)
class Outcome:
    """What came of one training: the loss of each step, and after each epoch loss and accuracy (%) on other images.

    ``seconds`` are what an epoch takes.
    """

    name: str
    losses: list[float]
    eval_losses: list[float]
    accuracies: list[float]
    seconds: float

    @property
    def best(self) -> float:
        """The highest accuracy, in percent."""
        return max(self.accuracies)

    @property
    def last(self) -> float:
        """The accuracy after the last epoch, in percent."""
        return self.accuracies[-1]


@dataclass(frozen=True)
class Finding:
    """Something that was claimed, what was found, and whether that bears it out: None where the scale tells nothing."""

    claim: str
    found: str
    holds: bool | None

    def __str__(self) -> str:
        verdict = {True: "reproduced", False: "NOT reproduced", None: "not told by this scale"}[self.holds]
        return f"{self.claim}: {verdict} ({self.found})"


Outcomes = Mapping[str, Outcome]


@dataclass(frozen=True)
class Experiment:
    """A published experiment: who claimed what, the trainings that show it, and what is made of them.

    ``data`` opens training and test images of a specification, None for where they are found without one, and may
    write into the folder it is given. ``differs`` says at which points a scale is not as published.
    """

    name: str
    title: str
    source: str
    preprocessing: Preprocessing
    data: Callable[[str | None, Preprocessing, Path], tuple[Data, Data]]
    curves: Callable[[Scale], Sequence[Curve]]
    judge: Callable[[Outcomes, Scale], list[Finding]]
    differs: Mapping[Scale, Sequence[str]]


OnCurve = Callable[[Curve, int, int], None]


def reproduce(
    experiment: Experiment,
    output: Path,
    *,
    data: str | None,
    scale: Scale,
    seed: int,
    on_curve: OnCurve,
    draw: bool = True,
) -> dict[str, Any]:
    """Run what is left of an experiment in ``output``, write its results and its picture, and return the results.

    A training that is done is not repeated, and one that was interrupted goes on as if it had not been.

    Raises `InputError` if there are no such images, or the runs there are of other settings.
    """
    train, test = experiment.data(data, experiment.preprocessing, output)
    _settle(output, {"experiment": experiment.name, "scale": scale, "seed": seed, "data": _hash(train, test)})
    curves, histories = experiment.curves(scale), []
    for number, curve in enumerate(curves):
        on_curve(curve, number, len(curves))
        histories.append(_trained(experiment, curve, output / RUNS / curve.folder, train, test, seed))
    outcomes = {curve.name: _outcome(curve, history) for curve, history in zip(curves, histories, strict=True)}
    results = _results(experiment, outcomes, scale, seed)
    with staged(output / RESULTS, overwrite=True) as temporary:
        temporary.write_text(json.dumps(results, indent=2) + "\n")
    if draw:
        from ..finetune.run.overlay import overlay  # needs matplotlib
        from ..finetune.run.plots import save

        with staged(output / PICTURE, overwrite=True) as temporary:
            save(overlay(histories), temporary)
    return results


def _hash(*parts: Data) -> str:
    return hashlib.sha256(" ".join(part.identity() for part in parts).encode()).hexdigest()[:16]


def _settle(output: Path, told: Mapping[str, Any]) -> None:
    """Note what an experiment's folder is of; raises `InputError` if it is of something else."""
    path = output / SETTINGS
    if path.exists():
        try:
            found = json.loads(path.read_text())
        except ValueError as error:
            raise InputError(f"expected an experiment's settings in {path}, received none: {error}") from None
        if others := [name for name, value in told.items() if found.get(name) != value]:
            raise InputError(
                f"expected {output} to hold {', '.join(f'{name}={told[name]}' for name in others)}, received "
                f"{', '.join(f'{name}={found.get(name)}' for name in others)}; give another folder with -o"
            )
        return
    output.mkdir(parents=True, exist_ok=True)
    with staged(path) as temporary:
        temporary.write_text(json.dumps(told, indent=2) + "\n")


def _trained(experiment: Experiment, curve: Curve, output: Path, train: Data, test: Data, seed: int) -> History:
    """Train what is left of a curve and return its history."""
    if not is_bundle(output):
        part = train if curve.images is None else train.part(train.sample(curve.images, seed))
        steps = -(-len(part) // curve.batch_size)
        settings = Settings(
            steps=curve.epochs * steps,
            batch_size=curve.batch_size,
            checkpoint_every=steps,
            stages="all",
            seed=seed,
            **curve.settings,
        )
        model = unpatched(curve.build(seed), preprocessing=experiment.preprocessing)
        try:
            finetune(model, output, part, settings, eval_data=test, resume=True)
        except StoppedError as error:
            raise StoppedError(error.number, error.step, "the same command goes on") from None
    return History.of(output)


def _outcome(curve: Curve, history: History) -> Outcome:
    evaluated = [row for row in history.steps if row["eval_top1"] is not None and row["step"]]
    return Outcome(
        curve.name,
        [row["loss"] for row in history.steps if row["loss"] is not None],
        [row["eval_loss"] for row in evaluated],
        [row["eval_top1"] for row in evaluated],
        history.summary()["seconds_per_epoch"],
    )


def _results(experiment: Experiment, outcomes: Outcomes, scale: Scale, seed: int) -> dict[str, Any]:
    first = next(iter(outcomes.values()))
    return {
        "experiment": experiment.name,
        "title": experiment.title,
        "source": experiment.source,
        "scale": scale,
        "seed": seed,
        "differs": list(experiment.differs[scale]),
        "curves": [
            {
                "name": each.name,
                "best": round(each.best, 2),
                "last": round(each.last, 2),
                "eval_loss": round(each.eval_losses[-1], 4),
                "seconds an epoch": round(each.seconds, 1),
                "ratio": round(each.seconds / first.seconds, 2),
            }
            for each in outcomes.values()
        ],
        "findings": [str(finding) for finding in experiment.judge(outcomes, scale)],
    }
