"""The command that trains a patched model: finetune."""

from pathlib import Path
from typing import Any

import click

from ..console import progress, show
from .options import json_option, model_options, overwrite_option


@click.command()
@click.argument("bundle")
@click.option("--data", required=True, help="Images to train on.")
@click.option("-o", "--output", type=Path, required=True, help="Folder of the bundle to write.")
@click.option("--steps", type=int, help="Training steps; default 100.")
@click.option("--epochs", type=float, help="Passes over the data, instead of --steps.")
@click.option("--batch-size", default=64, show_default=True)
@click.option("--lr", default=0.05, show_default=True, help="Peak learning rate of SGD with momentum 0.9.")
@click.option("--train", type=click.Choice(["norm", "all"]), default="all", show_default=True, help="What learns.")
@click.option("--distill", is_flag=True, help="Learn from the original model; labels are not used.")
@click.option("--limits", type=click.Choice(["pretrained", "paper", "sigmoid"]), default="pretrained",
              show_default=True, help="Schedule of Batch Renormalization's limits.")  # fmt: skip
@click.option("--eval-data", help="Images to evaluate on; the best model on them is kept.")
@click.option("--checkpoint-every", default=100, show_default=True, help="Steps between checkpoints.")
@click.option("--seed", default=0, show_default=True)
@click.option("--resume", is_flag=True, help="Go on with the run in the output folder, if there is one.")
@model_options
@overwrite_option
@json_option
def finetune(bundle: str, output: Path, steps: int | None, epochs: float | None, **options: Any) -> None:
    r"""Fine-tune the model in BUNDLE and write another bundle.

    \b
    Examples:
      normswap finetune net-gn --data train/ --distill --steps 100 -o net-gn-tuned
      normswap finetune net-sn --data train/ --eval-data val/ --epochs 3 --batch-size 2 -o net-sn-tuned
    """
    from ..finetune import run
    from ..patchers.opening import Opened
    from ..sources.data import open_data

    if steps is not None and epochs is not None:
        raise click.UsageError("expected one of --steps and --epochs")
    opened = Opened(bundle, None, options, need_bundle=True)
    data = open_data(options["data"], opened.require_preprocessing())
    eval_data = open_data(options["eval_data"], opened.require_preprocessing()) if options["eval_data"] else None
    if epochs is not None:
        steps = round(epochs * (len(data) // min(options["batch_size"], len(data))))
    settings = run.Settings(
        steps=100 if steps is None else steps,
        **{name: options[name] for name in run.Settings.__dataclass_fields__ if name in options},
    )
    with progress("fine-tuning", settings.steps) as advance:
        result = run.finetune(
            bundle,
            output,
            data,
            settings,
            eval_data=eval_data,
            resume=options["resume"],
            overwrite=options["overwrite"],
            trust=options["trust"],
            on_step=lambda step, loss: advance(step, f"loss {loss:.4f}"),
        )
    top1 = "" if result.evaluation is None else f", top-1 {result.evaluation.top1:.2f} %"
    text = f"{result.steps} steps, loss {result.loss or 0:.4f}{top1}; bundle written to {output}"
    show(options["as_json"], result.to_dict(), text)
