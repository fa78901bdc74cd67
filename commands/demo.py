"""The command that runs the whole job on bundled data: demo."""

import click

from ..console import show
from ..patchers.table import table
from .options import json_option


@click.command()
@click.option("--framework", type=click.Choice(["torch", "keras"]), default="torch", show_default=True)
@json_option
def demo(framework: str, as_json: bool) -> None:
    """Run the whole job on bundled data: train a BatchNorm network, swap, fine-tune, export, prove.

    Example: normswap demo --framework keras
    """
    from ..demo.digits import COLUMNS, run

    def say(message: str) -> None:
        click.echo(message, err=True)

    rows = run(framework, say)
    shown = [{title: row[name] for name, title in COLUMNS.items()} for row in rows]
    show(as_json, {"framework": framework, "rows": rows}, table("accuracy on unseen digits, %", shown))
