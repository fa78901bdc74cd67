"""The command that replaces a model's norms: patch."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..console import groups, plan_table, show
from ..errors import UnsupportedError
from .options import json_option, model_options, overwrite_option, weights_option

if TYPE_CHECKING:
    from ..bundles.opening import Opened


@click.command()
@click.argument("model")
@click.option("--to", "target", type=click.Choice(["sn", "brn", "gn", "ln", "in"]), help="What BatchNorms become.")
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
@click.option("--data", metavar="DATA", help="Measure the drift on 16 images; labels are not used.")
@click.option("--calibrate", metavar="DATA", help="Re-solve layers on images; labels are not used.")
@click.option("--calibration-size", default=256, show_default=True, help="Number of images --calibrate uses.")
@click.option("--refit/--no-refit", default=True, help="Let --calibrate change convolutions too; default yes.")
@click.option("--dry-run", is_flag=True, help="Show the plan; write nothing.")
@weights_option
@model_options
@overwrite_option
@json_option
def patch(model: str, target: str | None, output: Path | None, **options: Any) -> None:
    """Replace the BatchNorms of MODEL, weights carried over, and write a bundle.

    \b
    Examples:
      normswap patch timm:resnet50 --to gn -o resnet50-gn
      normswap patch net.py:build --weights net.pth --to sn --input-shape 3,32,32 -o net-sn
      normswap patch face.hdf5 --to brn -o face-brn --dry-run
    """
    from ..bundles import bundle
    from ..bundles.manifest import require_replaceable
    from ..bundles.opening import Opened
    from ..bundles.source import load_model
    from ..convert.recipe import recipe_from_json
    from ..patchers import patch as patchers
    from ..sources.files import require_file

    if (target is None) == (options["recipe"] is None):
        raise click.UsageError("expected one of --to and --recipe")
    if output is None and not options["dry_run"]:
        raise click.UsageError("expected -o BUNDLE, or --dry-run")
    wanted: Any = _target(target, options) if target else None
    if options["recipe"] is not None:
        require_file(options["recipe"])
        wanted = recipe_from_json(options["recipe"].read_bytes())
    if output is not None:
        require_replaceable(output, overwrite=options["overwrite"])
    opened = Opened(model, options["weights"], options)
    selection = {"include": options["include"], "exclude": options["exclude"], "example": opened.example}
    report = None if options["dry_run"] else patchers.patch(opened.model, wanted, **selection)
    plan = patchers.plan(opened.model, wanted, **selection) if report is None else report.plan
    result: dict[str, Any] = {
        "replaced": [d.site.name for d in plan.having("replace")],
        "skipped": [d.site.name for d in plan.having("skip")],
        "output": None if report is None else str(output),
        "plan": [decision.to_dict() for decision in plan.decisions],
        "recipe": plan.recipe().to_dict(),
    }
    if report is None:
        if problem := plan.problem():
            result |= {"error": problem, "exit_code": UnsupportedError.exit_code}
        show(options["as_json"], result, plan_table(f"plan for {model}", plan.decisions))
        if problem:
            click.echo(f"error: {problem}", err=True)
            raise click.exceptions.Exit(UnsupportedError.exit_code)
        return
    assert output is not None
    if opened.bundle is not None and not report.replaced:
        raise UnsupportedError(f"expected a model to patch, received a bundle patched already: {model}")
    original = (
        opened.bundle.original() if opened.bundle else load_model(model, options["weights"], trust=options["trust"])
    )
    if options["calibrate"] is not None:
        result["calibration"] = _calibrate(opened, original, options)
    data = options["calibrate"] if options["data"] is None else options["data"]
    if data is not None:
        result["drift"] = _drift(opened, original, result["replaced"], data)
    bundle.save(
        report,
        output,
        source=opened.bundle.source if opened.bundle else model,
        original=original,
        preprocessing=opened.preprocessing,
        overwrite=options["overwrite"],
    )
    title = f"{report}; bundle written to {output}"
    show(options["as_json"], result, plan_table(title, plan.decisions, result.get("drift", ())))


def _target(name: str, options: Mapping[str, Any]) -> Any:
    """Return the configuration that --to and the options beside it name."""
    from ..convert.targets import GroupNorm, SwitchNorm, as_target

    groups = options["groups"]
    switch = {key: options[key] for key in ("start", "batch_statistics") if options[key] is not None}
    if groups is not None and name != "gn":
        raise click.UsageError(f"--groups belongs to --to gn, received --to {name}")
    if switch and name != "sn":
        raise click.UsageError(f"--start and --batch-statistics belong to --to sn, received --to {name}")
    if groups is not None:
        return GroupNorm(groups=groups)
    return SwitchNorm(**switch) if switch else as_target(name)


def _calibrate(opened: "Opened", original: Any, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    from ..data.dataset import open_data
    from ..finetune.calibration.calibrate import calibrate, sample

    data = open_data(options["calibrate"], opened.require_preprocessing(), labelled=False)
    batches = sample(data, options["calibration_size"])
    residuals = calibrate(opened.model, original, batches, refit=options["refit"])
    return [vars(residual) for residual in residuals]


def _drift(opened: "Opened", original: Any, names: list[str], spec: str) -> list[dict[str, Any]]:
    from ..data.dataset import open_data
    from ..patchers.measured_drift import drift_between

    data = open_data(spec, opened.require_preprocessing(), labelled=False)
    chosen = data.sample(len(data))[-16:]  # the last that --calibrate would take
    return [vars(found) for found in drift_between(opened.model, original, names, data.batch(chosen)[0])]
