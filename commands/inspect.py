"""The command that lists a model's BatchNorms: inspect."""

from pathlib import Path
from typing import Any

import click

from ..console import show, sites_table
from .options import json_option, model_options, weights_option


@click.command()
@click.argument("model")
@weights_option
@model_options
@json_option
def inspect(model: str, weights: Path | None, as_json: bool, **shape: Any) -> None:
    """List the BatchNorms of MODEL and what replacing each is expected to change.

    Example: normswap inspect timm:resnet50 --input-shape 3,224,224
    """
    from ..bundles.opening import Opened
    from ..patchers.patch import plans

    opened = Opened(model, weights, shape)
    targets = ("sn", "gn", "in")
    found = [each.decisions for each in plans(opened.model, targets, example=opened.example)]
    rows = [
        {
            "name": site.name,
            "aliases": list(site.aliases),
            "type": site.source,
            "channels": site.channels,
            "shape": None if site.spatial is None else list(site.spatial),
            "patched_to": site.kind,
            "drift": {name: decision.drift for name, decision in zip(targets, decisions, strict=True)},
            "obstacle": site.obstacle or site.left,
        }
        for decisions in zip(*found, strict=True)
        for site in [decisions[0].site]
    ]
    show(as_json, {"model": model, "sites": rows}, sites_table(f"{len(rows)} BatchNorms in {model}", rows))
