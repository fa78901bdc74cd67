"""What the command patch does for --to bn: fit BatchNorms to the norms of a model on images, and write a bundle."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import NormswapWarning
from .options import command, trusting

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ..bundles.opening import ModelOptions, Opened
    from ..convert.recipe import Recipe, Rules
    from ..convert.targets import Target

ASIDE = 16
"""Images kept to measure the drift on, or a quarter of all if there are few."""


def patch_back(
    opened: "Opened",
    wanted: "Target | Recipe | Rules",
    output: Path,
    *,
    selection: dict[str, Any],
    calibrate: str | None,
    count: int,
    data: str | None,
    overwrite: bool,
    every: bool,
    weights: Path | None,
) -> tuple[Any, dict[str, Any], "RenderableType"]:
    """Make BatchNorms of the norms of an opened model, write the bundle, and return report, figures and table.

    ``selection`` is what `normswap.patch` is told beside target and data; ``weights`` are those of a patched network,
    which have no model to go back from.
    """
    from ..patchers.patch import patch
    from ..patchers.table import plan_table

    if weights is not None:
        raise click.UsageError(
            f"expected a bundle or a model's own weights with --to bn, received those of a patched network: {weights}; "
            "patch the model with them first"
        )
    if opened.bundle is None:
        original = opened.copy()
    else:
        original = opened.bundle.original() if opened.bundle.has_original else None
    images, aside = _images(opened, calibrate, count)
    report = patch(opened.model, wanted, data=images, **selection)
    if opened.bundle is not None:
        report.recipe = report.recipe.after(opened.bundle.recipe)
    if data is not None:
        found = opened.unlabelled(data)
        aside = found.batch(found.sample(len(found))[-ASIDE:])[0]
    drops = [vars(drop) for drop in getattr(report, "drops", ())]
    drift = [] if aside is None else [vars(each) for each in report.drift(aside)]
    measured = {found["name"]: found["rms"] for found in drift}
    opened.save(
        report, output, original=original, overwrite=overwrite, measured=measured, calibrated=images is not None
    )
    title = f"{report.summary}; bundle written to {output}"
    told = {"drops": drops} | ({"drift": drift} if drift else {})
    return report, told, plan_table(title, report.plan.decisions, drift, drops=drops, every=every)


def next_of_bundle(output: Path, known: "ModelOptions") -> list[str]:
    """Return what such a bundle is for: to be evaluated where it takes images, and to become a file without norms."""
    trusted = trusting(known)
    if known.example is not None:
        return [command("export", output, *trusted, "--example", known.example, "-o", f"{output}.onnx")]
    return [
        command("evaluate", output, "--data", "DATA", *trusted),
        command("export", output, *trusted, "-o", f"{output}.onnx"),
    ]


def _images(opened: "Opened", spec: str | None, count: int) -> tuple[list[Any] | None, Any]:
    """Return batches of images to fit to and others to judge by, None without DATA; warns if there are few."""
    if spec is None:
        return None, None
    data = opened.unlabelled(spec)
    order = data.sample(len(data))
    aside = order[len(order) - min(ASIDE, len(order) // 4) :]
    taken = order[: min(count, len(order) - len(aside))]
    if len(taken) < count:
        warnings.warn(
            f"expected {count} {data.what} to fit BatchNorms to, received {len(taken)} beside {len(aside)} to judge "
            "them by",
            NormswapWarning,
            stacklevel=2,
        )
    batches = [images for images, _ in data.batches(64, taken)]
    return batches, data.batch(aside)[0] if len(aside) else None
