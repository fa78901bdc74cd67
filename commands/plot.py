"""The command that draws how a fine-tuning went: plot."""

from pathlib import Path

import click

from ..console import show
from .options import json_option, overwrite_option, trust_option


@click.command()
@click.argument("bundle")
@click.option("-o", "--output", type=Path, required=True, help="Picture to write: a .png, .svg or .pdf.")
@trust_option
@overwrite_option
@json_option
def plot(bundle: str, output: Path, trust: bool, overwrite: bool, as_json: bool) -> None:
    """Draw the curves of the fine-tuning that made BUNDLE, and its gates by layer.

    Of a run that has not ended yet the curves are drawn as far as they go.

    Example: normswap plot net-sn-tuned -o net-sn-tuned.png
    """
    from ..bundles.bundle import read
    from ..bundles.manifest import is_unfinished
    from ..finetune.run import plots
    from ..finetune.run.figures import gates
    from ..sources.files import require_output, staged

    if output.suffix.lower() not in plots.FORMATS:
        raise click.BadParameter(
            f"expected a file ending in {', '.join(plots.FORMATS)}, received {output}", param_hint="'-o'"
        )
    require_output(output, overwrite=overwrite)
    found = {} if is_unfinished(bundle) else gates(read(bundle, trust=trust).model)
    figure = plots.picture(Path(bundle), found)
    with staged(output, overwrite=overwrite) as temporary:
        plots.save(figure, temporary)
    told = {name: {"mean": mean.tolist(), "variance": var.tolist()} for name, (mean, var) in found.items()}
    show(as_json, {"bundle": bundle, "output": str(output), "gates": told}, f"picture written to {output}")
