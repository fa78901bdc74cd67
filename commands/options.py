"""Options that several commands take."""

from pathlib import Path

import click

from ..console import numbers, option_set, remember_json

json_option = click.option(
    "--json", "as_json", is_flag=True, callback=remember_json, help="Print one JSON object on stdout."
)
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace an output that exists.")
trust_option = click.option("--trust", is_flag=True, help="Read a .pt2 file, which can run code while it is read.")
model_options = option_set(
    click.option("--input-shape", callback=numbers(int, above=0), help="One sample's shape, such as 3,224,224."),
    click.option(
        "--size",
        callback=numbers(int, above=0, most=2),
        help="Image height and width, if only they differ: 224 or 224,224.",
    ),
    click.option("--mean", callback=numbers(float), help="Subtracted from images in 0..1; one number or one each."),
    click.option("--std", callback=numbers(float, above=0), help="Images are divided by it; one number or one each."),
    trust_option,
)
weights_option = click.option("--weights", type=Path, help="State dict to load: .safetensors, .pt, .pth, .th or .bin.")


def read_from(model: str, *paths: str | Path | None) -> list[str | Path]:
    """Return the paths a command reads: that in MODEL, which may be ``file.py:callable``, and others it is given."""
    file, _, _ = model.rpartition(":")
    return [file if file.endswith(".py") else model, *(path for path in paths if path is not None)]
