"""The command that reruns a published experiment: reproduce."""

from pathlib import Path
from typing import Any

import click

from ..console import show
from ..patchers.table import table
from .options import json_option

NAMES = ("sn-toy", "renorm-wrn", "gn-fashion", "small-batch")


@click.command()
@click.argument("name", type=click.Choice(NAMES))
@click.option("--data", help="Where its images are; gn-fashion finds Debian's package by itself.")
@click.option(
    "--scale",
    type=click.Choice(["small", "full"]),
    default="small",
    show_default=True,
    help="small: fewer images, epochs or channels, told in the results; full: as published.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of weights and the data's order.")
@click.option("-o", "--output", type=Path, help="Folder of its runs and results.  [default: NAME]")
@json_option
def reproduce(name: str, data: str | None, scale: Any, seed: int, output: Path | None, as_json: bool) -> None:
    """Rerun the experiment NAME that a norm was published with, and say what of its claims holds.

    Given again, it goes on where it was stopped.

    \b
    Examples:
      normswap reproduce gn-fashion
      normswap reproduce sn-toy --data cifar10 -o sn-toy
    """
    from ..reproduce.experiment import Curve
    from ..reproduce.experiment import reproduce as rerun

    experiment = _experiment(name)

    def tell(curve: Curve, number: int, count: int) -> None:
        click.echo(f"{curve.name} ({number + 1} of {count})", err=True)

    output = Path(name) if output is None else output
    results = rerun(experiment, output, data=data, scale=scale, seed=seed, on_curve=tell)
    if not results:  # one of several processes, whose parent tells
        return
    below = [*(f"differs from the published: {each}" for each in results["differs"]), *results["findings"]]
    below.append(f"curves and results in {output}")
    show(as_json, {**results, "output": str(output)}, table(experiment.title, results["curves"], below))


def _experiment(name: str) -> Any:
    if name == "sn-toy":
        from ..reproduce.sn_toy import EXPERIMENT
    elif name == "renorm-wrn":
        from ..reproduce.renorm_wrn import EXPERIMENT
    elif name == "gn-fashion":
        from ..reproduce.gn_fashion import EXPERIMENT
    else:
        from ..reproduce.small_batch import EXPERIMENT
    return EXPERIMENT
