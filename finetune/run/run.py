"""A fine-tuning run from bundle to bundle: stages, evaluation, checkpoints and resuming."""

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from ...bundles import bundle as bundles
from ...data.dataset import Data
from ...data.labels import check_labels, same_classes, several_classes
from ...errors import InputError, NormswapWarning, UnsupportedError, UsageError, VerificationError, named, option
from ...frameworks.detect import get_framework
from ...sources.tensors import read_arrays
from ...sources.weights import SUFFIX, load_weights, write_weights
from ..calibration.calibrate import calibrate, site_layers, split
from ..hooks.blend import Blend
from ..hooks.contract import adapter_of
from ..hooks.gate_schedule import GateSchedule
from ..hooks.hook import Hook, Hooks
from ..hooks.momentum import Momentum
from ..hooks.renorm_limits import RenormLimits
from ..hooks.scores import class_count
from ..hooks.statistics import Statistics
from .accuracy import Accuracy
from .contract import trainer_of
from .evaluation import Evaluation, first_scores
from .figures import Clipping, gates
from .folder import RETIRED, Progress, RunFolder
from .history import EPOCHS, History
from .interruption import StoppedError, signals
from .journal import ORIGINAL, Journal
from .rate import Plateau
from .result import Result
from .settings import Settings
from .stages import Stage
from .training import Taken, default_rate

STATE = "state.safetensors"
PICTURE = "curves.png"

Figures = dict[str, float | None]
OnStep = Callable[[int, Mapping[str, float | None]], None]


def finetune(
    source: str | Path | bundles.Bundle,
    output: str | Path,
    data: Data,
    settings: Settings,
    *,
    eval_data: Data | None = None,
    resume: bool = False,
    overwrite: bool = False,
    trust: bool = False,
    trust_code: bool = False,
    record: Mapping[str, Any] | None = None,
    draw: bool = True,
    on_step: OnStep | None = None,
) -> Result:
    """Fine-tune the bundle ``source`` on ``data`` and write the bundle ``output``.

    A model that was not patched is trained as it is, as `unpatched` has it.
    Its model is the best one seen on ``eval_data``, or the last where there is none or its gates are hardened. The
    folder ``run`` in the output has the settings as ``run.toml`` with ``record`` beside them, the curves as
    ``metrics.csv`` and ``epochs.csv``, for TensorBoard and (unless ``draw=False``, or without matplotlib) as
    ``curves.png``, and checkpoints. With ``resume`` a run found there goes on, bit for bit as if it had not stopped,
    and one is started where there is none. ``trust`` and ``trust_code`` are those of `normswap.load`. ``on_step`` is
    told the number of steps taken and their figures, in the process of rank 0.

    Raises `InputError` if there is no original to distil from, if the run found used other settings or data, or if
    processes that train together disagree; `OutputExistsError` if ``output`` exists or another run is writing it;
    `VerificationError` if the loss is not finite, in which case the last checkpoint's model is the output;
    `StoppedError` after Ctrl-C or SIGTERM, once the step is done and saved.
    """
    if not isinstance(source, bundles.Bundle):
        source = bundles.read(source, trust=trust, trust_code=trust_code)
    run = _Run(source, Path(output), data, settings, eval_data, on_step, draw)
    run.check(resume=resume, overwrite=overwrite)
    with run.folder.locked(expected_empty=not (resume or overwrite)):
        run.begin(record or {}, resume=resume)
        return run.go()


class _Run:
    """A run's model, with all that is known of it besides."""

    def __init__(
        self,
        bundle: bundles.Bundle,
        output: Path,
        data: Data,
        settings: Settings,
        eval_data: Data | None,
        on_step: OnStep | None,
        draw: bool,
    ) -> None:
        self.draws = draw and find_spec("matplotlib") is not None
        self.bundle, self.model = _trained_on(bundle, data), bundle.model
        self.settings = settings = replace(settings, batch_size=min(settings.batch_size, len(data)))
        self.data, self.eval_data, self.tell = data, eval_data, on_step
        self.trainer = trainer_of(self.model)
        self.rank, self.world = self.trainer.processes()
        self.folder = RunFolder(output, writes=self.rank == 0)
        self.suffix = SUFFIX[bundle.recipe.framework]
        self.calibrates, self.stages = settings.plan()
        distils = settings.teacher == "original"
        wanted = distils or self.calibrates or settings.blend or (eval_data is not None and bundle.has_original)
        self.original = bundle.original() if wanted else None
        for each in (self.model, self.original):
            if each is not None:
                self.trainer.place(each)
        self.teacher = self.original if distils else None
        seen = [part.identity() for part in (data, eval_data) if part is not None]
        onto_itself = bundle.directory.resolve() == output.resolve()  # where the source is gone in the end
        self.new = Progress(data=" ".join(seen), model="" if onto_itself else bundle.identity())
        # Until the gates are hardened, what is evaluated is not what the bundle will hold.
        self.tracks_best = eval_data is not None and not (settings.harden and gates(self.model))
        self.progress: Progress | None = None
        self.saved = 0
        self.state: dict[str, Any] = {}
        self.journal: Journal | None = None
        self.clipping = Clipping(self.model, passes=settings.accumulate)
        self.hooks = Hooks()
        self.stopped: Callable[[], int] = int
        self.signal = 0
        self.clock = time.perf_counter()

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """Raise before anything is written if the run could not begin, or could only fail later."""
        self.folder.require_free(resume=resume, overwrite=overwrite)
        self._check_schedule()
        self._check_data()
        self.evaluation = Evaluation(
            self.trainer, self.model, self.original, self.data, self.eval_data, self.settings.batch_size
        )
        for stage in self.stages:
            adapter_of(self.model).check_part(self.model, stage.train)
        self._agree()

    def begin(self, record: Mapping[str, Any], *, resume: bool) -> None:
        """Make room for the run, or take up the one that is there."""
        found = self.folder.begin(self.settings, record, self.new, resume=resume)
        if found is not None:
            self.progress, checkpoint = found
            self.saved = self.progress.step
            load_weights(self.model, checkpoint.folder / f"model{self.suffix}")
            self.state = read_arrays(checkpoint.folder / STATE)

    def _check_schedule(self) -> None:
        """Raise `UsageError` for a schedule that could never lower the rate."""
        if self.settings.schedule == "plateau" and self.eval_data is None:
            raise UsageError(
                f"expected {named('eval_data')} with {option('schedule', 'plateau')}, which goes by the loss on it, "
                "received none"
            )
        last = max(self.settings.milestones or (0,))
        longest = self._epochs(max((stage.steps for stage in self.stages), default=0))
        if last >= 1 and self.stages and last >= longest:
            raise UsageError(
                f"expected {named('milestones')} before the end of the longest stage, after {longest:g} epochs, "
                f"received {last:g}; name shares of the steps, below 1, or train for longer"
            )

    def _epochs(self, steps: int) -> float:
        """Return how many passes over the data so many steps are."""
        return steps * self.settings.step_images / len(self.data)

    def _check_data(self) -> None:
        """Raise `InputError` for data that could only fail later, or teach nothing."""
        parts = [part for part in (self.data, self.eval_data) if part is not None]
        for part in parts:
            part.check()
        if self.teacher is None:
            several_classes(self.data)
            if self.eval_data is not None:
                same_classes(self.data, self.eval_data)
        scores = first_scores(self.trainer, self.model, self.data)
        for part in parts:
            if self.teacher is None or part is self.eval_data:
                check_labels(part, class_count(scores))

    def _agree(self) -> None:
        """Raise `InputError` on every process unless all train the same model in the same way on the same data."""
        shapes = {name: list(shape) for name, shape in self.trainer.shapes(self.model).items()}
        said = [asdict(self.settings), asdict(self.new), shapes]
        own = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
        if len(set(found := self.trainer.gathered(own))) > 1:
            raise InputError(
                f"expected the same model, settings and data in all {len(found)} processes, "
                f"received {len(set(found))} different ones; start all with one command"
            )

    def go(self) -> Result:
        """Train what is left of the stages and write the output; the model has no hooks when this is left."""
        with (
            signals() as self.stopped,
            self.folder.journal(self.progress) as self.journal,
            self._hooks() as self.hooks,
        ):
            try:
                self._train()
            except Exception as error:
                if not self.saved:
                    self.folder.discard()
                    raise
                if not isinstance(error, VerificationError):
                    raise
                self._finish()
                raise VerificationError(f"{error}; the model of step {self._kept} is in {self.folder.output}") from None
            return self._finish()

    def _hooks(self) -> Hooks:
        settings = self.settings
        limits = RenormLimits(self.model, settings.steps, settings.limits)
        found: list[Hook] = [limits]
        if settings.steady_statistics:
            alone = 1 if settings.sync_statistics else self.world
            found.append(Momentum(self.model, -(-settings.batch_size // alone)))
        if settings.harden:
            found.append(GateSchedule(self.model, settings.steps, temperature=(1.0, 0.1), harden=True))
        if settings.blend:
            found.append(Blend(self.model, self.original, max(1, round(settings.blend * settings.steps))))
        if settings.reestimate:
            found.append(Statistics(self.model, self.data.batches(64, self.data.sample(settings.reestimate))))
        return Hooks(*found)

    def _train(self) -> None:
        progress = self._start() if self.progress is None else self.progress
        for stage in self.stages:
            if progress.step >= stage.end or progress.done:
                continue
            if progress.step == stage.first:
                progress.plateau = Plateau()
            self.clock = time.perf_counter()
            self.trainer.train(
                self.model,
                self.data,
                self.settings.training(stage, progress.lr),
                teacher=self.teacher,
                hooks=[self.hooks, _Before(self._saves_after, self.clipping)],
                first=stage.first,
                start=progress.step - stage.first,
                state=self.state if progress.step > stage.first else None,
                reductions=lambda: progress.plateau.reductions,
                on_step=partial(self._after_step, progress, stage),
            )
            if self.signal:
                raise StoppedError(self.signal, progress.step)

    def _start(self) -> Progress:
        """Do what comes before the first step: see how good the original is, and calibrate."""
        progress = self.progress = self.new
        if self.eval_data is not None and self.original is not None:
            found = self.evaluation.accuracy(self.original)
            progress.original = found
            if self.journal is not None:
                self.journal.row(0, stage=ORIGINAL, epoch=0, **_told(found))
        if self.calibrates:
            self._calibrate()
        progress.lr = self.settings.lr or self._default_rate()
        self._checkpoint(progress, "start")
        return progress

    def _default_rate(self) -> float:
        loss = None if self.teacher is None else self.evaluation.divergence(self.settings.temperature)
        return default_rate(self.settings.step_images, loss, self.settings.optimizer)

    def _calibrate(self) -> None:
        """Calibrate, unless that takes the model further from the original, as it can one that starts there."""
        if not site_layers(self.model):
            return
        batches, others = split(self.data, self.settings.calibration_size)
        before, restore = self.evaluation.drift(others), get_framework(self.model).snapshot(self.model)
        if before > 0:
            try:
                calibrate(self.model, self.original, batches)
            except (InputError, UnsupportedError) as error:  # a few images, or a model that was trained before
                warnings.warn(f"training starts without calibration: {error}", NormswapWarning, stacklevel=2)
                return
            if not (after := self.evaluation.drift(others)) < before:
                restore()
                warnings.warn(
                    f"expected calibration to bring the model nearer to the original, received a drift of {after:.3g} "
                    f"after {before:.3g} on other images; it is undone",
                    NormswapWarning,
                    stacklevel=2,
                )

    def _after_step(self, progress: Progress, stage: Stage, taken: Taken) -> bool:
        """Note a step, save where one is to be saved, and return whether training ends here."""
        progress.step = stage.first + taken.step
        progress.losses = [*progress.losses, taken.loss][-10:]
        now = time.perf_counter()
        figures: Figures = {"loss": taken.loss, "accuracy": taken.accuracy, "learning_rate": taken.lr}
        figures["seconds"] = now - self.clock
        figures["images_per_second"] = self.settings.step_images / (now - self.clock)
        self.signal = max(self.trainer.gathered(self.stopped()))
        if self._saves_after(progress.step):
            figures["clipped"] = self.clipping.share()
            self._checkpoint(progress, stage.train, figures, taken)
        elif self.signal:
            self._checkpoint(progress, stage.train, figures, taken, evaluate=False)  # else a stopped run would differ
        elif self.journal is not None:
            self.journal.row(progress.step, stage=stage.train, epoch=self._epochs(progress.step), **figures)
        if self.tell is not None and self.rank == 0:
            self.tell(progress.step, figures)
        self.clock = time.perf_counter()
        return bool(self.signal or progress.done)

    def _saves_after(self, step: int) -> bool:
        return step % self.settings.checkpoint_every == 0 or any(step == stage.end for stage in self.stages)

    def _checkpoint(
        self,
        progress: Progress,
        stage: str,
        figures: Figures | None = None,
        taken: Taken | None = None,
        *,
        evaluate: bool = True,
    ) -> None:
        """Save the model and what going on needs, and measure and save it as it would be deployed.

        Its row, to which ``figures`` is the beginning, is written before the checkpoint appears: of one that is there
        nothing is missing.
        """
        checkpoints, figures = self.folder.checkpoints, {} if figures is None else figures
        self.trainer.agree(self.model)
        with checkpoints.writing(progress.step, progress) if self.folder.writes else nullcontext() as folder:
            self.evaluation.require_finite(progress.step)
            if folder is not None:
                write_weights(self.model, folder / f"model{self.suffix}")
                state = {} if taken is None else taken.state()
                safetensors.numpy.save_file({k: np.asarray(v, order="C") for k, v in state.items()}, folder / STATE)
            if evaluate:
                with self._deployed(taken):
                    figures.update(self._evaluate(progress, waits=taken is not None))
                    if folder is not None and self._deploys_others:
                        write_weights(self.model, folder / f"deployed{self.suffix}")
            if self.journal is not None:
                self.journal.row(progress.step, stage=stage, epoch=self._epochs(progress.step), **figures)
                self.journal.flush()
        self.saved = progress.step
        if self.folder.writes:
            checkpoints.prune(keep=progress.best_step)

    @property
    def _deploys_others(self) -> bool:
        """Whether the weights to deploy are not those that are trained on."""
        return bool(self.settings.ema or self.settings.reestimate)

    @contextmanager
    def _deployed(self, taken: Taken | None) -> Iterator[None]:
        """Give the model the weights to deploy for a while: averaged, its statistics re-estimated."""
        with nullcontext() if taken is None else taken.averaged():
            restore = get_framework(self.model).snapshot(self.model)
            try:
                self.hooks.on_evaluate()
                yield
            finally:
                restore()

    def _evaluate(self, progress: Progress, *, waits: bool) -> Figures:
        """Measure the model as it is, note whether it is the best so far and whether it is good enough.

        The schedule ``"plateau"`` goes by what was measured after a step (``waits``).
        """
        figures: Figures = {}
        if self.original is not None:
            figures["drift"] = self.evaluation.drift()
        if self.journal is not None and (layers := gates(self.model)):
            self.journal.gates(progress.step, layers)
        if self.eval_data is None:
            return figures
        found = self.evaluation.accuracy(self.model)
        if self.tracks_best and (progress.best is None or found.top1 > progress.best.top1):
            progress.best, progress.best_step = found, progress.step
        if self.settings.early_stop and self.teacher is not None and self.tracks_best:
            assert progress.original is not None
            progress.done = found.top1 >= progress.original.top1
        if waits and found.loss is not None and self.settings.schedule == "plateau":
            progress.plateau = progress.plateau.after(found.loss, self.settings.setting("patience"))
        return {**figures, **_told(found)}

    @property
    def _kept(self) -> int:
        assert self.progress is not None
        best = self.progress.best_step
        return best if self.tracks_best and best is not None else self.saved

    def _finish(self) -> Result:
        """Write the output's bundle from a checkpoint, so that a run killed here can do it again."""
        assert self.progress is not None
        self.trainer.gathered(None)  # until the process that writes has done so
        chosen, best = self.folder.checkpoints.at(self._kept).folder, self.progress.best
        deployed = chosen / f"deployed{self.suffix}"
        load_weights(self.model, deployed if deployed.exists() else chosen / f"model{self.suffix}")
        self.hooks.on_end()
        if self.eval_data is not None and not self.tracks_best:
            best = self.evaluation.accuracy(self.model)
        if self.folder.writes:
            bundles.save_into(self.bundle, self.folder.output, without=[RETIRED])
            self.folder.finish()
            History.of(self.folder.output).write(self.folder.path / EPOCHS)
            if self.draws:
                from . import plots  # needs matplotlib

                plots.save(plots.picture(self.folder.output, gates(self.model)), self.folder.path / PICTURE)
        self.trainer.gathered(None)
        losses, original = self.progress.losses, self.progress.original
        return Result(
            self.folder.output,
            self.progress.step,
            float(np.mean(losses)) if losses else None,
            best,
            original,
            self._kept,
            self.progress.done,
        )


class _Before(Hook):
    """Lets `Clipping` look before each step after which its share is asked for."""

    def __init__(self, asked_after: Callable[[int], bool], clipping: Clipping) -> None:
        self.asked_after, self.clipping = asked_after, clipping

    def on_step(self, step: int) -> None:
        if self.asked_after(step + 1):
            self.clipping.on_step(step)


def _told(found: Accuracy) -> Figures:
    """Return the figures of an evaluation."""
    return {"eval_loss": found.loss, "eval_top1": found.top1, "eval_top5": found.top5}


def _trained_on(bundle: bundles.Bundle, data: Data) -> bundles.Bundle:
    """Return the bundle with the preprocessing it is trained with, but for the crop, which arrays do not tell."""
    known, used = bundle.preprocessing, data.preprocessing
    return replace(bundle, preprocessing=used if known is None else replace(used, crop=known.crop))
