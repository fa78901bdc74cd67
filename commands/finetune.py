"""The command that trains a patched model: finetune."""

import json
import warnings
from contextlib import nullcontext
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..console import numbers, option_set, progress, show
from ..errors import InputError, NormswapWarning
from .options import command, decide, given, json_option, model_options, overwrite_option, positive, trusting

if TYPE_CHECKING:
    from ..bundles.bundle import Bundle
    from ..bundles.opening import ModelOptions, Opened
    from ..data.dataset import Data
    from ..finetune.run.contract import Trainer
    from ..finetune.run.settings import Settings

TAUGHT, LABELS, UNCALIBRATED, UNPATCHED = "calibrate,all", "calibrate,norm,all", "norm,all", "all"
"""The stages of what is taught, of what learns from labels, without its original too, and of what no patch made."""

_TYPES: dict[str, tuple[set[type], str]] = {
    "boolean": ({bool}, "true or false"),
    "integer": ({int}, "an integer"),
    "float": ({int, float}, "a number"),
}
"""What a TOML file must have for an option of each of click's types, which would convert it without a word."""
_TEXT = {str, int, float}, "text or a number"
_LISTS = {"stages", "augment", "milestones", "input_shape", "size", "mean", "std"}

_EXCLUSIVE = (("steps", "epochs"), ("stages", "train"), ("teacher", "distill"))
_SAYS_NOTHING = {"stages": "", "train": "all", "teacher": "original", "distill": False}
"""What an option in a file may be beside the one that excludes it, as a run's run.toml has both of some."""

_TRUST = ("trust", "trust_code")
"""Options that no file has: it may be another's, such as the run.toml of a bundle, and they answer for others' code."""

_NEEDS = {
    "temperature": "a teacher",
    "features": "a teacher",
    "gate_lr": "layers with gates",
    "harden": "layers with gates",
    "limits": "BRN layers",
    "early_stop": "a teacher and --eval-data",
    "calibration_size": "a stage calibrate",
}
"""What has to be there for an option to have an effect."""


def _read_config(context: click.Context, parameter: click.Parameter, path: Path | None) -> None:
    """Take the options in a TOML file where the command line gives none."""
    if path is None:
        return
    from ..formats.place import Place
    from ..formats.text import from_toml

    try:
        said = from_toml(path.read_bytes(), Place(str(path)))
    except InputError as error:
        raise click.BadParameter(str(error)) from None
    except (OSError, ValueError) as error:  # of a NUL in its name
        raise click.BadParameter(f"expected a TOML file, received {path}: {error}") from None
    found = {name.replace("-", "_"): value for name, value in said.items()}
    unread = (None, "config", *_TRUST)
    known = {each.name: each.type for each in context.command.params if each.name not in unread}
    if unknown := sorted(found.keys() - known.keys()):
        raise click.BadParameter(
            f"expected options of this command in {path}, received {', '.join(unknown)}; "
            f"there are {', '.join(sorted(known))}"
        )
    for name, value in found.items():
        types, expected = _TYPES.get(known[name].name, _TEXT)
        if name in _LISTS:
            expected = "text, a number or a list of these"
        parts = value if isinstance(value, list) and name in _LISTS else [value]
        if any(type(part) not in types for part in parts):
            shown = json.dumps(value, default=str)
            raise click.BadParameter(f"expected {expected} in {path}, received {name}={shown}")
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
        f"steps, after calibrate or not; default {TAUGHT}, or {LABELS} from labels.",
    ),
    option("--train", help="One stage instead: norm, all or last:N, the last N blocks."),
    option(
        "--teacher",
        type=click.Choice(["original", "none"]),
        help="Learn from the model before the patch, "
        "which needs no labels, or from the labels; default original, if the bundle has it.",
    ),
    option("--distill", is_flag=True, help="The same as --teacher original."),
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
    option("--epochs", type=float, callback=positive, help="Passes over the data, instead of --steps."),
    option(
        "--batch-size",
        default="64",
        callback=_batch_size,
        help="Images at a time over all processes, or auto for what memory allows.",
    ),
    option("--accumulate", default=1, callback=positive, help="Batches to a step."),
    option(
        "--optimizer",
        type=click.Choice(["sgd", "adam", "adamw", "amsgrad"]),
        default="sgd",
        help="Rule by which it learns.",
    ),
    option("--momentum", type=float, help="Of --optimizer sgd; default 0.9."),
    option(
        "--lr",
        type=float,
        help="Peak learning rate; default 0.05 for 64 images a step, 0.001 of optimizers other than sgd, in proportion "
        "for fewer, and less the nearer a model is to the original that teaches it.",
    ),
    option(
        "--schedule",
        type=click.Choice(["cosine", "constant", "step", "poly", "plateau"]),
        default="cosine",
        help="What the rate does after --warmup; plateau goes by the loss on --eval-data.",
    ),
    option("--warmup", default=0.05, help="Share of the steps in which the rate rises."),
    option(
        "--milestones",
        callback=numbers(float, above=0),
        help="Where --schedule step lowers the rate: shares of the steps, or from 1 on epochs; default 0.3,0.6,0.9.",
    ),
    option("--factor", type=float, help="What step and plateau multiply the rate by; default 0.1."),
    option("--power", type=float, help="Of --schedule poly; default 1, a straight line to 0."),
    option(
        "--patience",
        type=int,
        help="Evaluations in a row, one each --checkpoint-every, without a better loss, after which plateau lowers the "
        "rate; default 10.",
    ),
    option("--min-lr", type=float, help="What plateau does not go below; default 0."),
    option(
        "--max-grad-norm",
        default=1.0,
        help="Length to which longer gradients are scaled down, 0 for none; the default --lr is for 1.",
    ),
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
    option(
        "--steady-statistics/--no-steady-statistics",
        default=True,
        help="At small batches let moving statistics average over as many images as at 64 a batch.",
    ),
    option(
        "--sync-statistics/--no-sync-statistics",
        default=True,
        help="Take SN's and BRN's batch statistics over all processes, or as BatchNorm does over each one's images.",
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
@model_options("example")
@overwrite_option
@json_option
def finetune(bundle: str, output: Path, known: "ModelOptions", **options: Any) -> None:
    """Fine-tune the model in BUNDLE and write another bundle.

    In place of a bundle any MODEL is trained as it is, from labels; --seed draws the weights of one that is new.

    The output's folder `run` has the settings, curves, TensorBoard events and checkpoints. Ctrl-C and SIGTERM finish
    the step and save; --resume goes on. `accelerate launch -m normswap finetune ...` trains in several processes.

    \b
    Examples:
      normswap finetune net-gn --data train/ --eval-data val/ -o net-gn-tuned
      normswap finetune net-sn --data train/ --teacher none --train all --epochs 3 --batch-size 2 -o net-sn-tuned
      normswap finetune net-sn -c net-sn-tuned/run/run.toml --seed 1 -o net-sn-again
      normswap finetune net.py:build --input-shape 3,32,32 --data train/ --epochs 30 --optimizer adam -o net-bn
    """
    from ..bundles.opening import Opened
    from ..data.dataset import open_data
    from ..finetune.run import run
    from ..finetune.run.contract import trainer_of

    for pair in _EXCLUSIVE:
        _require_one(options, *pair)
        decide(options, *pair)
    _leave_unread(options)
    _require_outside(output, options)
    _require_typed(bundle)
    opened = Opened(bundle, known)
    preprocessing = opened.require_preprocessing()
    found = _bundle(opened, options["seed"])
    if options["distill"] or (options["teacher"] is None and found.has_original):
        options["teacher"] = "original"
    options["teacher"] = options["teacher"] or "none"
    data = open_data(options["data"], preprocessing, labelled=options["teacher"] == "none")
    eval_data = None if options["eval_data"] is None else open_data(options["eval_data"], preprocessing)
    trainer = trainer_of(found.model)
    leads = trainer.processes()[0] == 0
    settings = _settings(options, found, trainer, data, output)
    if leads:
        _warn_of_no_effect(options, found, calibrates=settings.plan()[0])
    if options["batch_size"] == "auto":
        click.echo(f"--batch-size auto: {settings.batch_size} images", err=True)
    told = {name: options[name] for name in ("data", "eval_data")}
    told |= {name: getattr(known, name) for name in ("weights", "input_shape", "size", "mean", "std")}
    told["weights"] = known.weights and str(known.weights)
    record = {"bundle": bundle, "output": str(output)} | {
        name: _as_text(list(value) if isinstance(value, tuple) else value)
        for name, value in told.items()
        if value is not None
    }
    with progress("fine-tuning", settings.steps) if leads else nullcontext(lambda *_, **__: None) as advance:
        result = run.finetune(
            found,
            output,
            data,
            settings,
            eval_data=eval_data,
            resume=options["resume"],
            overwrite=options["overwrite"],
            record=record,
            on_step=lambda step, figures: advance(step, **figures),
        )
    if leads:
        outcome = {**result.to_dict(), "batch_size": settings.batch_size}
        show(options["as_json"], outcome, f"{result}; bundle written to {output}", _next(output, known))


def _require_one(options: dict[str, Any], one: str, other: str) -> None:
    """Raise `UsageError` if a file has two options that exclude each other, and the command line none of them."""
    said = [options[name] not in (None, _SAYS_NOTHING.get(name)) for name in (one, other)]
    if all(said) and not (given(one) or given(other)):
        raise click.UsageError(
            f"expected one of {one} and {other} in the file of --config, received {one}={options[one]} and "
            f"{other}={options[other]}; leave one out, or give one on the command line"
        )


def _require_typed(bundle: str) -> None:
    """Raise `InputError` for a MODEL in the file of --config that is code: the file may be another's."""
    from ..bundles.manifest import is_bundle, is_unfinished
    from ..sources.spec import runs_code

    if not given("bundle") and not is_bundle(bundle) and not is_unfinished(bundle) and runs_code(bundle):
        raise InputError(
            f"expected a MODEL that is code on the command line, received bundle={bundle!r} in the file of --config; "
            "if you trust that code, give it there"
        )


def _next(output: Path, known: "ModelOptions") -> list[str]:
    """Return what a trained bundle is for: to be measured, and to become a file."""
    trust = trusting(known)
    return [
        command("evaluate", output, "--data", "DATA", *trust),
        command("export", output, *trust, "-o", f"{output}.onnx"),
    ]


def _bundle(opened: "Opened", seed: int) -> "Bundle":
    """Return the bundle to train: that of a model which is in none, where it draws its weights from ``seed``."""
    from ..bundles.bundle import unpatched
    from ..finetune.run.contract import trainer_of

    if opened.bundle is not None:
        return opened.bundle
    if opened.draws_weights():
        trainer_of(opened.model).seed(seed)
        opened.build_again()
    return unpatched(opened.model, opened.spec, opened.preprocessing)


def _leave_unread(options: dict[str, Any]) -> None:
    """Forget what a file says for the optimizer or the schedule that another on the command line took the place of."""
    from ..finetune.run.training import unread

    replaced = [name for name in ("optimizer", "schedule") if given(name)]
    for name in unread({name: options[name] for name in replaced}):
        if not given(name):
            options[name] = None


def _require_outside(output: Path, options: dict[str, Any]) -> None:
    """Raise `InputError` if the output would lie among the images, where its pictures are some of them later."""
    from ..sources.outputs import require_name

    require_name(output)
    for name in ("data", "eval_data"):
        folder = options[name]
        if folder and Path(folder).is_dir() and output.resolve().is_relative_to(Path(folder).resolve()):
            raise InputError(
                f"expected an output outside of {_flag(name)} {folder}, whose pictures are read as images, "
                f"received output={output}"
            )


def _warn_of_no_effect(options: dict[str, Any], bundle: "Bundle", *, calibrates: bool) -> None:
    """Warn of options on the command line that change nothing for this model, learning from what it does."""
    from ..finetune.hooks.renorm_limits import RenormLimits
    from ..finetune.run.figures import gates

    there = {
        "a teacher": options["teacher"] == "original",
        "layers with gates": bool(gates(bundle.model)),
        "BRN layers": bool(RenormLimits(bundle.model, 1).layers),
        "a teacher and --eval-data": options["teacher"] == "original" and options["eval_data"] is not None,
        "a stage calibrate": calibrates,
    }
    for name, need in _NEEDS.items():
        if given(name) and not there[need]:
            message = f"expected {need} for {_flag(name)}, received none; it has no effect"
            warnings.warn(message, NormswapWarning, stacklevel=2)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _settings(options: dict[str, Any], bundle: "Bundle", trainer: "Trainer", data: "Data", output: Path) -> "Settings":
    """Return the run's settings, with what depends on bundle and data filled in."""
    from ..finetune.run.settings import Settings

    chosen = {field.name: options[field.name] for field in fields(Settings) if options.get(field.name) is not None}
    if "stages" not in chosen and "train" not in chosen:
        taught, patched = chosen["teacher"] == "original", bool(bundle.recipe.choices)
        chosen["stages"] = (
            TAUGHT if taught else LABELS if bundle.has_original else UNCALIBRATED if patched else UNPATCHED
        )
    if chosen["batch_size"] == "auto":
        chosen["batch_size"] = _largest_batch(chosen, bundle, trainer, data, output, resume=options["resume"])
    chosen["batch_size"] = min(chosen["batch_size"], len(data))
    chosen.setdefault("steps", 100)
    if options["epochs"] is not None:
        images = chosen["batch_size"] * chosen["accumulate"]
        chosen["steps"] = max(1, round(options["epochs"] * len(data) / images))
    return Settings(**chosen)


def _largest_batch(
    chosen: dict[str, Any], bundle: "Bundle", trainer: "Trainer", data: "Data", output: Path, *, resume: bool
) -> int:
    """Return the batch size that memory allows, or that of the run to resume."""
    from ..bundles.manifest import RUN, SETTINGS
    from ..finetune.run.batch_size import largest_batch
    from ..finetune.run.settings import Settings
    from ..finetune.run.training import Training

    before = output / RUN / SETTINGS
    if resume and before.exists():
        return Settings.from_toml(before).batch_size
    known = {field.name for field in fields(Training)} - {"steps", "batch_size", "train"}
    training = Training(**{name: value for name, value in chosen.items() if name in known})
    teacher = bundle.original() if chosen["teacher"] == "original" else None
    return largest_batch(trainer, bundle.model, data, training, teacher)
