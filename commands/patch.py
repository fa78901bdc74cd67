"""The command that replaces a model's norms: patch."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..console import groups, progress, show
from ..errors import InputError, UnsupportedError
from .options import (
    all_option,
    command,
    given,
    json_option,
    model_options,
    overwrite_option,
    positive,
    require_none,
    short_name,
    trusting,
    typed,
)
from .way_back import next_of_bundle, patch_back

if TYPE_CHECKING:
    from ..bundles.opening import ModelOptions, Opened
    from ..convert.recipe import Recipe, Rules
    from ..convert.targets import Target
    from ..finetune.calibration.calibrate import Residuals


_TO = "What BatchNorms become; bn: other norms become BatchNorms, with --calibrate."


@click.command()
@click.argument("model")
@click.option("--to", "target", type=click.Choice(["sn", "brn", "gn", "ln", "in", "bn"]), help=_TO)
@click.option("-o", "--output", type=Path, help="Folder of the bundle to write.")
@click.option("--groups", callback=groups, help="Groups of --to gn: auto (default) or a number.")
@click.option("--start", type=click.Choice(["warm", "exact", "even"]), help="Gates of --to sn; default warm.")
@click.option(
    "--batch-statistics",
    type=click.Choice(["moving", "frozen", "none"]),
    help="Batch component of --to sn: moving (default), frozen (no sample sees another), none.",
)
@click.option("--include", multiple=True, metavar="PATTERN", help="Replace only these: a glob, or re:REGEX.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Leave these alone: a glob, or re:REGEX.")
@click.option("--recipe", type=Path, help="Rules by name, depth or stage, or the output of --dry-run --json.")
@click.option("--data", metavar="DATA", help="Measure the drift on 16 images, or inputs of an .npz.")
@click.option("--calibrate", metavar="DATA", help="Re-solve layers, or fit --to bn, on images, or inputs of an .npz.")
@click.option("--calibration-size", default=256, show_default=True, callback=positive, help="Inputs --calibrate uses.")
@click.option(
    "--equalize",
    type=click.Choice(["full", "scale"]),
    help="What layers in front of norms take: a scale and a shift (default), or a scale, which adds no bias.",
)
@click.option("--no-equalize", is_flag=True, help="Leave all layers but the norms as they are.")
@click.option("--refit/--no-refit", default=True, help="Let --calibrate change convolutions too; default yes.")
@click.option("--dry-run", is_flag=True, help="Show the plan; write nothing.")
@all_option
@model_options()
@overwrite_option
@json_option
def patch(
    model: str,
    target: str | None,
    output: Path | None,
    groups: int | str | None,
    start: str | None,
    batch_statistics: str | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    recipe: Path | None,
    data: str | None,
    calibrate: str | None,
    calibration_size: int,
    equalize: str | None,
    no_equalize: bool,
    refit: bool,
    dry_run: bool,
    every: bool,
    known: "ModelOptions",
    overwrite: bool,
    as_json: bool,
) -> None:
    """Replace the BatchNorms of MODEL, weights carried over, and write a bundle; with --to bn go the way back.

    \b
    Examples:
      normswap patch timm:resnet50 --to gn -o resnet50-gn
      normswap patch net.py:build --weights net.pth --to sn --input-shape 3,32,32 -o net-sn
      normswap patch face.hdf5 --to brn -o face-brn --dry-run
      normswap patch net-gn-tuned --to bn --calibrate images -o net-bn
      normswap patch net.py:bert --to gn --example tokens.npz --calibrate more.npz -o bert-gn
    """
    from ..bundles.manifest import require_replaceable
    from ..convert.recipe import Recipe
    from ..patchers import patch as patchers
    from ..patchers.table import plan_table
    from ..patchers.way_back import is_way_back

    if (target is None) == (recipe is None):
        raise click.UsageError("expected one of --to and --recipe")
    if output is None and not dry_run:
        raise click.UsageError("expected -o BUNDLE, or --dry-run")
    if calibrate is None:
        require_none(["calibration_size", "refit"], "--calibrate DATA beside what is said of it")
    if equalize and no_equalize:
        raise click.UsageError("expected one of --equalize and --no-equalize")
    if target in ("brn", "bn"):
        require_none(["equalize", "no_equalize"], f"no word on layers in front, which --to {target} leaves as they are")
    wanted = _target(target, groups, start, batch_statistics) if target else _recipe(recipe)
    if output is not None:
        require_replaceable(output, overwrite=overwrite)
    opened, patched_weights = _opened(model, known)
    selection: dict[str, Any] = {"include": include, "exclude": exclude, "example": opened.example}
    # The weights of a patched network know nothing of layers in front, unless they are said to.
    plain = no_equalize or (patched_weights is not None and equalize is None and not isinstance(wanted, Recipe))
    selection["equalize"] = False if plain else equalize or True
    if dry_run:
        patchers.require_usable(opened.model)
        plan = patchers.plan(opened.model, wanted, **selection)
        problem = plan.problem()
        result = _told(plan, None) | ({"error": problem, "exit_code": UnsupportedError.exit_code} if problem else {})
        then = [] if problem else [_again(model, target)]
        show(as_json, result, plan_table(f"plan for {model}", plan.decisions, every=every), then)
        if problem:
            click.echo(f"error: {problem}", err=True)
            raise click.exceptions.Exit(UnsupportedError.exit_code)
        return
    assert output is not None
    if is_way_back(wanted):
        require_none(["refit"], "no word on convolutions, which --to bn leaves as they are")
        report, figures, text = patch_back(
            opened,
            wanted,
            output,
            selection=selection,
            calibrate=calibrate,
            count=calibration_size,
            data=data,
            overwrite=overwrite,
            every=every,
            weights=patched_weights,
        )
        show(
            as_json,
            _told(report.plan, output, report.recipe) | figures,
            text,
            next_of_bundle(output, known),
        )
        return
    original = None if opened.bundle or patched_weights else opened.copy()
    report = patchers.patch(opened.model, wanted, **selection)
    if opened.bundle is not None:
        if not report.replaced:
            raise UnsupportedError(f"expected a model to patch, received a bundle patched already: {model}")
        report.recipe = report.recipe.after(opened.bundle.recipe)
        if opened.bundle.has_original or calibrate is not None or data is not None:
            original = opened.bundle.original()
    result = _told(report.plan, output)
    if patched_weights is not None:
        if calibrate is not None or data is not None:
            raise click.UsageError(
                "--calibrate and --data compare with the original, received the weights of a patched network: "
                f"{patched_weights}"
            )
        result["weights"] = _load_patched(opened, wanted, patched_weights)
    if calibrate is not None:
        found = _calibrate(opened, original, calibrate, calibration_size, refit)
        result |= {"calibration": [vars(residual) for residual in found], "not_refitted": dict(found.left)}
    if (images := calibrate if data is None else data) is not None:
        result["drift"] = _drift(opened, original, result["replaced"], images)
    measured = {found["name"]: found["rms"] for found in result.get("drift", ())}
    opened.save(
        report,
        output,
        original=original,
        overwrite=overwrite,
        measured=measured,
        calibrated=calibrate is not None,
    )
    told = [report.summary, *([result["weights"]] if patched_weights else [])]
    if left := result.get("not_refitted"):
        told.append(f"{len(left)} layer{'' if len(left) == 1 else 's'} not refitted (first: {_first(left)})")
    told.append(f"bundle written to {output}")
    title = "; ".join(told)
    text = plan_table(title, report.plan.decisions, result.get("drift", ()), every=every)
    show(as_json, result, text, _next(output, known))


def _opened(model: str, known: "ModelOptions") -> tuple["Opened", Path | None]:
    """Return the model with its weights, or without and the weights apart if they are those of the patched network."""
    from ..bundles.opening import Opened
    from ..interop.checkpoint import is_patched_checkpoint
    from ..sources.misfit import PatchedWeightsError

    try:
        return Opened(model, known), None
    except InputError as error:
        patched = isinstance(error, PatchedWeightsError)
        if not patched and (known.weights is None or not is_patched_checkpoint(known.weights)):
            raise  # any other file, whatever it is called
    return Opened(model, replace(known, weights=None), pretrained=False), known.weights


def _load_patched(opened: "Opened", wanted: "Target | Recipe | Rules", weights: Path) -> str:
    """Give the patched model weights of its own kind, and return what they were."""
    from ..convert.targets import GroupNorm
    from ..interop.load_weights import load_weights

    loaded = load_weights(opened.model, weights)
    if isinstance(wanted, GroupNorm) and wanted.groups == "auto" and wanted.channels_per_group is None:
        raise click.UsageError(
            f"expected --groups with the weights of a patched network, which the network in {weights} was trained with"
        )
    return str(loaded)


def _target(name: str, groups: int | str | None, start: str | None, batch_statistics: str | None) -> "Target":
    """Return the configuration that --to and the options beside it name."""
    from ..convert.targets import GroupNorm, SwitchNorm, as_target

    if groups is not None and name != "gn":
        raise click.UsageError(f"--groups belongs to --to gn, received --to {name}")
    switch: dict[str, Any] = {"start": start, "batch_statistics": batch_statistics}
    switch = {key: value for key, value in switch.items() if value is not None}
    if switch and name != "sn":
        raise click.UsageError(f"--start and --batch-statistics belong to --to sn, received --to {name}")
    if groups is not None:
        return GroupNorm(groups=groups)  # type: ignore[arg-type]
    return SwitchNorm(**switch) if switch else as_target(name)


def _recipe(path: Path | None) -> "Recipe | Rules":
    """Return what the file of --recipe says."""
    from ..convert.recipe import recipe_from_json
    from ..formats.place import Place
    from ..sources.files import require_file

    require_none(["groups", "start", "batch_statistics"], "a recipe that says what layers become")
    assert path is not None
    require_file(path, "a recipe")
    return recipe_from_json(path.read_bytes(), Place(str(path)))


def _told(plan: Any, output: Path | None, recipe: Any = None) -> dict[str, Any]:
    """Return what --json tells of a plan, and of the bundle and its recipe if it was carried out."""
    return {
        "replaced": [decision.site.name for decision in plan.having("replace")],
        "skipped": [decision.site.name for decision in plan.having("skip")],
        "output": None if output is None else str(output),
        "plan": [decision.to_dict() for decision in plan.decisions],
        "recipe": (recipe or plan.recipe()).to_dict(),
    }


def _again(model: str, target: str | None) -> str:
    """Return the command that carries out what a dry run showed."""
    output = [] if given("output") else ["-o", f"{short_name(model)}-{target or 'patched'}"]
    images = ["--calibrate", "DATA"] if target == "bn" and not given("calibrate") else []
    return command("patch", *typed("dry_run", "every"), *images, *output)


def _next(output: Path, known: "ModelOptions") -> list[str]:
    """Return what a bundle is for: to be trained where it takes images, and to become a file."""
    trust = trusting(known)
    if known.example is not None:  # of a model that may take no images, which are what `finetune` reads
        return [command("export", output, *trust, "--example", known.example, "-o", f"{output}.onnx")]
    return [
        command("finetune", output, "--data", "DATA", *trust, "-o", f"{output}-tuned"),
        command("export", output, *trust, "-o", f"{output}.onnx"),
    ]


def _first(left: dict[str, str]) -> str:
    name, why = next(iter(left.items()))
    return f"{name}, since {why}"


def _calibrate(opened: "Opened", original: Any, spec: str, count: int, refit: bool) -> "Residuals":
    from ..finetune.calibration.calibrate import calibrate, sample

    batches = sample(opened.unlabelled(spec), count)
    with progress("calibrating", len(batches)) as advance:
        return calibrate(opened.model, original, batches, refit=refit, advance=advance)


def _drift(opened: "Opened", original: Any, names: list[str], spec: str) -> list[dict[str, Any]]:
    from ..patchers.measured_drift import drift_between

    data = opened.unlabelled(spec)
    chosen = data.sample(len(data))[-16:]  # the last that --calibrate would take
    return [vars(found) for found in drift_between(opened.model, original, names, data.batch(chosen)[0])]
