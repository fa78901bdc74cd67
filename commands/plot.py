"""The command that draws how fine-tunings went, and the gates of a model: plot."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..console import show
from .options import json_option, overwrite_option, require_none, trust_option

if TYPE_CHECKING:
    from ..finetune.run.contract import Gates


@click.command()
@click.argument("run", nargs=-1, required=True)
@click.option("-o", "--output", type=Path, required=True, help="Picture to write: a .png, .svg or .pdf.")
@trust_option
@overwrite_option
@json_option
def plot(run: tuple[str, ...], output: Path, trust: bool, overwrite: bool, as_json: bool) -> None:
    """Draw the curves of the fine-tuning that made the bundle RUN, and its gates by layer.

    Of a run that has not ended yet the curves are drawn as far as they go. Of several runs they are drawn over each
    other: loss and accuracy in training and evaluation, learning rate, and seconds per epoch.

    In place of a run any MODEL, and any weights file of switchablenorms, keras-switchnorm or normswap, has its gates
    drawn.

    \b
    Examples:
      normswap plot net-sn-tuned -o net-sn-tuned.png
      normswap plot net-bn-tuned net-gn-tuned net-sn-tuned -o curves.png
      normswap plot Baseline-CIFAR10.h5 -o gates.png
    """
    from ..finetune.run import plots
    from ..sources.outputs import require_output, staged

    if output.suffix.lower() not in plots.FORMATS:
        raise click.BadParameter(
            f"expected a file ending in {', '.join(plots.FORMATS)}, received {output}", param_hint="'-o'"
        )
    require_output(output, overwrite=overwrite)
    figure, told = _one(run[0], trust=trust) if len(run) == 1 else _several(run)
    with staged(output, overwrite=overwrite) as temporary:
        plots.save(figure, temporary)
    show(as_json, {**told, "output": str(output)}, f"picture written to {output}")


def _one(run: str, *, trust: bool) -> tuple[Any, dict[str, Any]]:
    """Return the picture of one run, model or file, and what is to be seen there."""
    from ..finetune.run import plots
    from ..finetune.run.history import folder_of

    found = _gates(run, trust=trust)
    told = {name: {"mean": mean.tolist(), "variance": var.tolist()} for name, (mean, var) in found.items()}
    return plots.picture(folder_of(run), found), {"bundle": run, "gates": told}


def _several(runs: tuple[str, ...]) -> tuple[Any, dict[str, Any]]:
    """Return the picture of several runs, and what each came to."""
    from ..finetune.run.history import History
    from ..finetune.run.overlay import overlay

    require_none(["trust"], "no --trust beside several runs, of which no model is read")
    histories = [History.of(run) for run in runs]
    return overlay(histories), {
        "runs": [{**each.summary(), "run": run} for run, each in zip(runs, histories, strict=True)]
    }


def _gates(run: str, *, trust: bool) -> "Gates":
    """Return the gates in a bundle, a model or a file of weights; there are none in a run that has not ended."""
    from ..bundles.manifest import is_bundle, is_unfinished
    from ..bundles.source import load_model
    from ..finetune.run.figures import gates
    from ..finetune.run.history import folder_of
    from ..interop.gates import gates_in, gates_in_bundle
    from ..sources.spec import PROGRAM_SUFFIX

    folder = folder_of(run)
    if not run.endswith(PROGRAM_SUFFIX):
        require_none(["trust"], f"a {PROGRAM_SUFFIX} file for --trust")
    if is_unfinished(folder):
        return {}
    if is_bundle(folder) or Path(run).is_dir():
        return gates_in_bundle(folder)
    if Path(run).is_file() and not run.endswith(PROGRAM_SUFFIX) and (found := gates_in(Path(run))) is not None:
        return found
    return gates(load_model(run, trust=trust))
