"""A fine-tuning run from bundle to bundle: training, evaluation, checkpoints and resuming."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.numpy

from ..errors import InputError
from ..layers.schedules import Schedule
from ..patchers import bundle as bundles
from ..sources.data import Data
from ..sources.files import require_absent
from .accuracy import Accuracy, accuracy
from .hooks import RenormLimits

STATE = "training.safetensors"
LOG = "training.json"


@dataclass(frozen=True)
class Settings:
    """How a run trains; a resumed run must use the same, but for a larger number of steps."""

    steps: int = 100
    batch_size: int = 64
    lr: float = 0.05
    train: Literal["all", "norm"] = "all"
    distill: bool = False
    limits: Schedule = "pretrained"
    seed: int = 0
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "lr", "checkpoint_every"):
            if not getattr(self, name) > 0:
                raise InputError(f"expected `{name}` above 0, received {name}={getattr(self, name)}")


@dataclass(frozen=True)
class Result:
    """What a run came to: steps taken, the mean loss of the last ten, and the accuracy of the model kept."""

    output: Path
    steps: int
    loss: float | None
    evaluation: Accuracy | None

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain data."""
        evaluation = None if self.evaluation is None else self.evaluation.to_dict()
        return {"output": str(self.output), "steps": self.steps, "loss": self.loss, "eval": evaluation}


def finetune(
    source: str | Path,
    output: str | Path,
    data: Data,
    settings: Settings,
    *,
    eval_data: Data | None = None,
    resume: bool = False,
    overwrite: bool = False,
    trust: bool = False,
    on_step: Callable[[int, float], None] | None = None,
) -> Result:
    """Fine-tune the bundle ``source`` on ``data`` and write the bundle ``output``.

    The output is written at every checkpoint and at the end. Its model is the best one seen on ``eval_data``, or
    the last where there is none; the last one is always kept for resuming. With ``resume`` a run found in
    ``output`` goes on, and one is started where there is none. ``trust`` is that of `normswap.load`.

    Raises `InputError` if there is no original to distill from or the run found used other settings,
    `OutputExistsError` if ``output`` exists, `VerificationError` if the loss is not finite; the last checkpoint
    then remains.
    """
    output = Path(output)
    bundle = bundles.read(source, trust=trust)
    run = _Run(bundle, output, settings, eval_data)
    if resume and output.exists():
        run.resume()
    else:
        require_absent(output, overwrite=overwrite)
    engine = run.engine

    def after_step(step: int, loss: float, state: Callable[[], dict[str, Any]]) -> None:
        run.losses.append(loss)
        if on_step is not None:
            on_step(step, loss)
        if step % settings.checkpoint_every == 0 or step == settings.steps:
            run.checkpoint(step, state())

    engine.train(
        bundle.model,
        data,
        steps=settings.steps,
        batch_size=settings.batch_size,
        lr=settings.lr,
        teacher=bundle.original() if settings.distill else None,
        train=settings.train,
        schedule=RenormLimits(engine.layers(bundle.model), settings.steps, settings.limits),
        seed=settings.seed,
        state=run.state,
        start=run.step,
        on_step=after_step,
    )
    loss = float(np.mean(run.losses[-10:])) if run.losses else None
    return Result(output, settings.steps, loss, run.best)


class _Run:
    """The state of a run beside the model's: what a checkpoint holds."""

    def __init__(self, bundle: bundles.Bundle, output: Path, settings: Settings, eval_data: Data | None) -> None:
        self.bundle, self.output, self.settings, self.eval_data = bundle, output, settings, eval_data
        self.engine = import_module(f".{bundle.recipe.framework}", __package__)
        self.step = 0
        self.state: dict[str, Any] | None = None
        self.best: Accuracy | None = None
        self.losses: list[float] = []
        suffix = ".keras" if bundle.recipe.framework == "keras" else ".safetensors"
        self.model_file, self.last_file = f"model{suffix}", f"last{suffix}"

    def resume(self) -> None:
        log = _read_log(self.output)
        before, now = Settings(**log["settings"]), self.settings
        if replace(before, steps=now.steps) != now or before.steps > now.steps:
            raise InputError(
                f"expected the settings of the run in {self.output}, {asdict(before)}, received {asdict(now)}; "
                "repeat them, with as many steps or more"
            )
        last = self.output / self.last_file
        bundles.load_weights(self.bundle, last if last.exists() else self.output / self.model_file)
        self.state = safetensors.numpy.load_file(self.output / STATE)
        self.step, self.losses = log["step"], log["losses"]
        self.best = None if log["best"] is None else Accuracy(**log["best"])

    def checkpoint(self, step: int, state: dict[str, Any]) -> None:
        """Write the output anew; its model stays the old one if that was better."""
        better = True
        if self.eval_data is not None:
            found = accuracy(lambda x: self.engine.predict(self.bundle.model, x), self.eval_data)
            better = self.best is None or found.top1 > self.best.top1
            self.best = found if better else self.best
        log = {
            "settings": asdict(self.settings),
            "step": step,
            "losses": self.losses,
            "best": None if self.best is None else self.best.to_dict(),
        }

        def add(folder: Path) -> None:
            if not better:
                (folder / self.model_file).rename(folder / self.last_file)
                shutil.copy2(self.output / self.model_file, folder / self.model_file)
            if self.bundle.has_original:
                original = self.model_file.replace("model", "original")
                shutil.copy2(self.bundle.directory / original, folder / original)
            safetensors.numpy.save_file({k: np.asarray(v, order="C") for k, v in state.items()}, folder / STATE)
            (folder / LOG).write_text(json.dumps(log))

        bundles.save(
            self.bundle,
            self.output,
            source=self.bundle.source,
            preprocessing=self.bundle.preprocessing,
            overwrite=True,
            add=add,
        )


def _read_log(directory: Path) -> dict[str, Any]:
    try:
        log: dict[str, Any] = json.loads((directory / LOG).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"expected a fine-tuning run to resume in {directory}, received none: {error}") from None
    return log
