"""What an experiment is, and how one is run: a training a curve, each gone on with where it was left."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..bundles.bundle import unpatched
from ..bundles.manifest import is_bundle
from ..data.dataset import Data
from ..data.preprocessing import Preprocessing
from ..errors import InputError, UsageError
from ..finetune.run.history import History
from ..finetune.run.interruption import StoppedError
from ..finetune.run.run import finetune
from ..finetune.run.settings import Settings
from ..formats.place import Place
from ..formats.text import json_object
from ..sources.outputs import require_name, staged
from .processes import GOES_ON, launch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Scale = Literal["small", "full"]

RUNS, SETTINGS, RESULTS, PICTURE = "runs", "experiment.json", "results.json", "curves.png"


@dataclass(frozen=True)
class Curve:
    """One training: how its network is built, weights drawn by a seed, and how it is trained.

    ``images`` are how many of the training images it sees in each of its ``epochs``, None for all, ``batch_size`` of
    them a step in ``processes`` together; ``settings`` are further ones of a run (see `Settings`).
    """

    name: str
    build: Callable[[int], Any]
    epochs: int
    batch_size: int
    images: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    processes: int = 1

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
    write into the folder it is given. ``differs`` says at which points a scale is not as published. ``picture`` draws
    what came of it, in place of all curves over each other.
    """

    name: str
    title: str
    source: str
    preprocessing: Preprocessing
    data: Callable[[str | None, Preprocessing, Path], tuple[Data, Data]]
    curves: Callable[[Scale], Sequence[Curve]]
    judge: Callable[[Outcomes, Scale], list[Finding]]
    differs: Mapping[Scale, Sequence[str]]
    picture: Callable[[Outcomes], "Figure"] | None = None


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

    A training that is done is not repeated, and one that was interrupted goes on as if it had not been. Processes are
    started for those that take several; each of them calls this again, for the trainings that take as many and nothing
    else, and has no results.

    Raises `InputError` if there are no such images, or the runs there are of other settings, `UsageError` in as many
    processes as no training takes.
    """
    require_name(output)
    curves, world = experiment.curves(scale), int(os.environ.get("WORLD_SIZE", "1"))
    if world not in (1, *(curve.processes for curve in curves)):
        raise UsageError(
            f"expected one process, which starts what it needs, received {world}; give the command without torchrun"
        )
    train, test = experiment.data(data, experiment.preprocessing, output)
    told = {"experiment": experiment.name, "scale": scale, "seed": seed, "data": _hash(train, test)}
    _settle(output, told, writes=world == 1)
    runs = {curve.name: output / RUNS / curve.folder for curve in curves}
    for number, curve in enumerate(curves):
        if curve.processes == world:
            if os.environ.get("RANK", "0") == "0":
                on_curve(curve, number, len(curves))
            _train(experiment, curve, runs[curve.name], train, test, seed)
        elif world == 1 and not is_bundle(runs[curve.name]):
            launch(curve.processes, ["reproduce", *_arguments(experiment, output, data, scale, seed)], runs.values())
    if world > 1:
        return {}
    histories = {name: History.of(path) for name, path in runs.items()}
    outcomes = {curve.name: _outcome(curve, histories[curve.name]) for curve in curves}
    results = _results(experiment, curves, outcomes, scale, seed)
    with staged(output / RESULTS, overwrite=True) as temporary:
        temporary.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    if draw:
        from ..finetune.run.overlay import overlay  # needs matplotlib
        from ..finetune.run.plots import save

        with staged(output / PICTURE, overwrite=True) as temporary:
            picture = overlay([*histories.values()]) if experiment.picture is None else experiment.picture(outcomes)
            save(picture, temporary)
    return results


def _hash(*parts: Data) -> str:
    return hashlib.sha256(" ".join(part.identity() for part in parts).encode()).hexdigest()[:16]


def _arguments(experiment: Experiment, output: Path, data: str | None, scale: Scale, seed: int) -> list[str]:
    """Return how the command line is told of an experiment."""
    told = [experiment.name, "--scale", scale, "--seed", str(seed), "-o", str(output)]
    return told if data is None else [*told, "--data", data]


def _settle(output: Path, told: Mapping[str, Any], *, writes: bool) -> None:
    """Note what an experiment's folder is of; raises `InputError` if it is of something else."""
    path = output / SETTINGS
    if path.exists():
        found = json_object(path.read_bytes(), Place(str(path)))
        if others := [name for name, value in told.items() if found.get(name) != value]:
            raise InputError(
                f"expected {output} to hold {', '.join(f'{name}={told[name]}' for name in others)}, received "
                f"{', '.join(f'{name}={found.get(name)}' for name in others)}; give another folder with -o"
            )
        return
    if not writes:
        return
    output.mkdir(parents=True, exist_ok=True)
    with staged(path) as temporary:
        temporary.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")


def _train(experiment: Experiment, curve: Curve, output: Path, train: Data, test: Data, seed: int) -> None:
    """Train what is left of a curve."""
    if is_bundle(output):
        return
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
        raise StoppedError(error.number, error.step, GOES_ON) from None


def _outcome(curve: Curve, history: History) -> Outcome:
    evaluated = [row for row in history.steps if row["eval_top1"] is not None and row["step"]]
    return Outcome(
        curve.name,
        [row["loss"] for row in history.steps if row["loss"] is not None],
        [row["eval_loss"] for row in evaluated],
        [row["eval_top1"] for row in evaluated],
        history.summary()["seconds_per_epoch"],
    )


def _results(
    experiment: Experiment, curves: Sequence[Curve], outcomes: Outcomes, scale: Scale, seed: int
) -> dict[str, Any]:
    firsts: dict[Any, float] = {}  # the seconds of the first curve of as many images, by which others are told
    for curve in curves:
        firsts.setdefault((curve.processes, curve.batch_size), outcomes[curve.name].seconds)
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
                "ratio": round(each.seconds / firsts[curve.processes, curve.batch_size], 2),
            }
            for curve, each in zip(curves, outcomes.values(), strict=True)
        ],
        "findings": [str(finding) for finding in experiment.judge(outcomes, scale)],
    }
