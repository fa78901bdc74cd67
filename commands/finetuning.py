"""The command that trains a patched model: finetune."""

import tomllib
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..console import option_set, progress, show
from .options import json_option, model_options, overwrite_option

if TYPE_CHECKING:
    from ..finetune.settings import Settings
    from ..patchers.opening import Opened
    from ..sources.data import Data

RECIPE = "calibrate,norm,all"
RATE, RATE_BATCH = 0.05, 64


def _read_config(context: click.Context, parameter: click.Parameter, path: Path | None) -> None:
    """Take the options in a TOML file where the command line gives none."""
    if path is None:
        return
    try:
        found = {name.replace("-", "_"): value for name, value in tomllib.loads(path.read_text()).items()}
    except (OSError, ValueError) as error:
        raise click.BadParameter(f"expected a TOML file, received {path}: {error}") from None
    known = {each.name for each in context.command.params if each.name} - {"config"}
    if unknown := sorted(found.keys() - known):
        raise click.BadParameter(f"expected options of this command in {path}, received {', '.join(unknown)}")
    context.default_map = {name: _as_text(value) for name, value in found.items()}


def _as_text(value: Any) -> Any:
    return ",".join(map(str, value)) if isinstance(value, list) else value


def _batch_size(context: click.Context, parameter: click.Parameter, value: str) -> int | str:
    if value == "auto":
        return value
    if not value.isdecimal() or int(value) < 1:
        raise click.BadParameter(f"expected 'auto' or a positive number, received {value!r}")
    return int(value)


option = partial(click.option, show_default=True)
what_learns = option_set(
    option(
        "--stages",
        help="What learns when: norm, all and last:N, each with =STEPS if not its share of the "
        f"steps, after calibrate or not; default {RECIPE}.",
    ),
    option("--train", help="One stage instead: norm, all or last:N, the last N blocks."),
    option(
        "--teacher",
        type=click.Choice(["original", "none"]),
        help="Learn from the model before the patch, "
        "which needs no labels, or from the labels; default original, if the bundle has it.",
    ),
    option("--distill", "teacher", flag_value="original", help="The same as --teacher original."),
    option("--temperature", default=2.0, help="Softens what the teacher says."),
    option(
        "--features",
        default=0.0,
        help="Weight of the distance of the replaced layers' outputs from the teacher's.",
    ),
    option(
        "--early-stop/--no-early-stop",
        default=True,
        help="End when as accurate as the teacher on --eval-data.",
    ),
    option("--calibration-size", default=256, help="Images for the stage calibrate."),
)
how_it_learns = option_set(
    option("--steps", type=int, help="Training steps; default 100."),
    option("--epochs", type=float, help="Passes over the data, instead of --steps."),
    option(
        "--batch-size",
        default="64",
        callback=_batch_size,
        help="Images at a time over all processes, or auto for what memory allows.",
    ),
    option("--accumulate", default=1, help="Batches to a step."),
    option(
        "--lr",
        type=float,
        help=f"Peak learning rate of SGD with momentum 0.9; default {RATE} for "
        f"{RATE_BATCH} images a step, in proportion for fewer.",
    ),
    option(
        "--decay",
        type=click.Choice(["cosine", "constant"]),
        default="cosine",
        help="What the rate does after --warmup.",
    ),
    option("--warmup", default=0.05, help="Share of the steps in which the rate rises."),
    option("--weight-decay", default=0.0, help="Of all but norms, biases and gates."),
    option("--gate-lr", default=1.0, help="Rate of SN's gates, as a multiple."),
    option(
        "--precision",
        type=click.Choice(["no", "bf16", "fp16"]),
        default="no",
        help="Automatic mixed precision.",
    ),
    option(
        "--ema",
        default=0.0,
        help="Deploy a moving average of the weights, with this weight of the old value, such as 0.99.",
    ),
    option("--seed", default=0),
)
what_norms_do = option_set(
    option(
        "--limits",
        type=click.Choice(["pretrained", "paper", "sigmoid"]),
        default="pretrained",
        help="Schedule of Batch Renormalization's limits.",
    ),
    option(
        "--blend",
        default=0.0,
        help="Lead over from BatchNorm to what replaced it, in this share of the steps.",
    ),
    option("--harden", is_flag=True, help="End with SN's gates one-hot, which export folds."),
    option(
        "--reestimate",
        default=0,
        help="Re-estimate running statistics on so many images before each evaluation and at the end.",
    ),
)
how_it_goes = option_set(
    option("--augment", default="none", help="Change images: crop or resized-crop, flip, or one of the two and flip."),
    option("--workers", default=0, help="Processes (Keras: threads) that read images ahead."),
    option("--checkpoint-every", default=100, help="Steps between checkpoints, each with an evaluation."),
)


@click.command()
@click.argument("bundle")
@click.option(
    "-c",
    "--config",
    type=Path,
    is_eager=True,
    expose_value=False,
    callback=_read_config,
    help="TOML file with options, such as a run's run.toml; the command line comes first.",
)
@click.option("--data", required=True, help="Images to train on.")
@click.option("--eval-data", help="Images to evaluate on; the best model on them is kept.")
@click.option("-o", "--output", type=Path, required=True, help="Folder of the bundle to write.")
@what_learns
@how_it_learns
@what_norms_do
@how_it_goes
@click.option("--resume", is_flag=True, help="Go on with the run in the output folder, if there is one.")
@model_options
@overwrite_option
@json_option
def finetune(bundle: str, output: Path, **options: Any) -> None:
    """Fine-tune the model in BUNDLE and write another bundle.

    The output's folder `run` has the settings, curves, TensorBoard events and checkpoints. Ctrl-C and SIGTERM finish
    the step and save; --resume goes on. `accelerate launch -m normswap finetune ...` trains in several processes.

    \b
    Examples:
      normswap finetune net-gn --data train/ --eval-data val/ -o net-gn-tuned
      normswap finetune net-sn --data train/ --teacher none --train all --epochs 3 --batch-size 2 -o net-sn-tuned
      normswap finetune net-sn -c net-sn-tuned/run/run.toml --seed 1 -o net-sn-again
    """
    from ..finetune import run
    from ..patchers.opening import Opened
    from ..sources.data import open_data

    if options["steps"] is not None and options["epochs"] is not None:
        raise click.UsageError("expected one of --steps and --epochs")
    if _given("train") and not _given("stages"):
        options["stages"] = ""
    opened = Opened(bundle, None, options, need_bundle=True)
    preprocessing = opened.require_preprocessing()
    if options["teacher"] is None:
        options["teacher"] = "original" if opened.bundle and opened.bundle.has_original else "none"
    data = open_data(options["data"], preprocessing, labelled=options["teacher"] == "none")
    eval_data = open_data(options["eval_data"], preprocessing) if options["eval_data"] else None
    settings = _settings(options, opened, data, output)
    record = {"bundle": bundle, "output": str(output)} | {
        name: _as_text(list(value) if isinstance(value, tuple) else value)
        for name in ("data", "eval_data", "input_shape", "size", "mean", "std")
        if (value := options[name]) is not None
    }
    with progress("fine-tuning", settings.steps) as advance:
        result = run.finetune(
            bundle,
            output,
            data,
            settings,
            eval_data=eval_data,
            resume=options["resume"],
            overwrite=options["overwrite"],
            trust=options["trust"],
            record=record,
            on_step=_telling(advance),
        )
    if result.rank == 0:
        show(options["as_json"], result.to_dict(), f"{result}; bundle written to {output}")


def _settings(options: dict[str, Any], opened: "Opened", data: "Data", output: Path) -> "Settings":
    """Return the run's settings, with what depends on bundle and data filled in."""
    from ..finetune.settings import Settings

    assert opened.bundle is not None
    chosen = {field.name: options[field.name] for field in fields(Settings) if options.get(field.name) is not None}
    if "stages" not in chosen and "train" not in chosen:
        chosen["stages"] = RECIPE if opened.bundle.has_original else RECIPE.partition(",")[2]
    if chosen["batch_size"] == "auto":
        chosen["batch_size"] = _largest_batch(chosen, opened, data, output, resume=options["resume"])
    batch = chosen["batch_size"] * chosen["accumulate"]
    chosen.setdefault("lr", RATE * min(1.0, batch / RATE_BATCH))
    chosen.setdefault("steps", 100)
    if options["epochs"] is not None:
        chosen["steps"] = max(1, round(options["epochs"] * len(data) / min(batch, len(data))))
    return Settings(**chosen)


def _largest_batch(chosen: dict[str, Any], opened: "Opened", data: "Data", output: Path, *, resume: bool) -> int:
    """Return the batch size that memory allows, or that of the run to resume."""
    from importlib import import_module

    from ..finetune.batch_size import largest_batch
    from ..finetune.folder import SETTINGS
    from ..finetune.settings import Settings
    from ..finetune.training import Training
    from ..patchers.bundle import RUN

    assert opened.bundle is not None
    before = output / RUN / SETTINGS
    if resume and before.exists():
        return Settings.from_toml(before).batch_size
    engine = import_module(f"..finetune.{opened.framework}.engine", __package__)
    known = {field.name for field in fields(Training)} - {"steps", "batch_size", "train"}
    training = Training(**{name: value for name, value in chosen.items() if name in known})
    teacher = opened.bundle.original() if chosen["teacher"] == "original" else None
    return largest_batch(engine, opened.model, data, training, teacher)


def _given(name: str) -> bool:
    return click.get_current_context().get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE


def _telling(advance: Callable[..., None]) -> Callable[[int, Any], None]:
    def tell(step: int, figures: Any) -> None:
        advance(step, **figures)

    return tell
