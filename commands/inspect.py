"""The command that lists a model's BatchNorms: inspect."""

import warnings
from typing import TYPE_CHECKING, Any

import click

from ..console import show
from ..errors import NormswapWarning
from .options import all_option, command, json_option, model_options, short_name, typed

if TYPE_CHECKING:
    from ..bundles.opening import ModelOptions
    from ..patchers.plan import Decision, Site

TARGETS = ("sn", "gn", "in")


@click.command()
@click.argument("model")
@all_option
@model_options("mean", "std")
@json_option
def inspect(model: str, every: bool, known: "ModelOptions", as_json: bool) -> None:
    """List the BatchNorms of MODEL and what replacing each is expected to change.

    Of a bundle it tells what they have become, by its files: no model is built.

    \b
    Examples:
      normswap inspect timm:resnet50 --input-shape 3,224,224
      normswap inspect net.py:build --weights net.pth --all
    """
    from ..bundles.manifest import is_bundle
    from ..bundles.opening import Opened, require_unread

    if is_bundle(model):
        require_unread(known, model)
        _show_bundle(model, every=every, as_json=as_json)
        return
    from ..patchers.patch import plans, problem_of
    from ..patchers.table import EXPECTED, site_row, sites_table

    opened = Opened(model, known)
    if problem := problem_of(opened.model):
        warnings.warn(problem, NormswapWarning, stacklevel=1)
    found = [each.decisions for each in plans(opened.model, TARGETS, example=opened.example)]
    sites = [(decisions[0].site, _drift(decisions)) for decisions in zip(*found, strict=True)]
    rows = [
        site_row(site.name, site.aliases, site.source, site.channels, site.spatial)
        | {"patched to": site.kind, **drift, "note": site.obstacle or site.left}
        for site, drift in sites
    ]
    known_drift = any(drift[target] is not None for _, drift in sites for target in TARGETS)
    legend = [f"{EXPECTED},", "if it becomes sn, gn or in; brn changes nothing"] if known_drift else []
    drifts = {target: f"as {target}" for target in TARGETS}
    text = sites_table(f"{len(rows)} BatchNorms in {model}", rows, drifts, legend, every=every)
    told = [_told(*each) for each in sites]
    show(as_json, {"model": model, "sites": told}, text, _next(model, [site.kind for site, _ in sites]))


def _show_bundle(model: str, *, every: bool, as_json: bool) -> None:
    from ..bundles.contents import norms_in
    from ..bundles.manifest import local
    from ..patchers.table import site_row, sites_table

    norms = norms_in(local(model))
    rows = [
        site_row(norm.name, (), norm.source, norm.channels, norm.spatial) | {"patched to": norm.kind} for norm in norms
    ]
    told = [
        {
            "name": norm.name,
            "aliases": [],
            "type": norm.source,
            "channels": norm.channels,
            "shape": None if norm.spatial is None else list(norm.spatial),
            "patched_to": norm.kind,
            "drift": dict.fromkeys(TARGETS),
            "obstacle": "",
        }
        for norm in norms
    ]
    title = f"{len(rows)} norm{'' if len(rows) == 1 else 's'} in {model}"
    text = sites_table(title, rows, {}, ["as its recipe and its weights tell; no model is built"], every=every)
    show(as_json, {"model": model, "sites": told}, text, _next(model, [norm.kind for norm in norms]))


def _drift(decisions: tuple["Decision", ...]) -> dict[str, float | None]:
    return {name: decision.drift for name, decision in zip(TARGETS, decisions, strict=True)}


def _told(site: "Site", drift: dict[str, float | None]) -> dict[str, Any]:
    return {
        "name": site.name,
        "aliases": list(site.aliases),
        "type": site.source,
        "channels": site.channels,
        "shape": None if site.spatial is None else list(site.spatial),
        "patched_to": site.kind,
        "drift": drift,
        "obstacle": site.obstacle or site.left,
    }


def _next(model: str, kinds: list[str | None]) -> list[str]:
    """Return the command to type next: to patch what is left, or to export what is patched."""
    if None in kinds:
        return [command("patch", *typed("every"), "--to", "sn", "-o", f"{short_name(model)}-sn")]
    return [command("export", *typed("every"), "-o", f"{short_name(model)}.onnx")] if kinds else []
