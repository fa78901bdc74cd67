"""The command line: parse, call, print. Everything that takes long to import is imported when it is needed."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .console import Group, groups, numbers, option_set, plan_table, progress, remember_json, show, sites_table, table
from .errors import UnsupportedError, VerificationError

if TYPE_CHECKING:
    from .patchers.opening import Opened


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="normswap")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def main(debug: bool) -> None:
    r"""Take the BatchNorm out of a trained network without ruining it.

    \b
    MODEL is timm:NAME, torchvision:NAME, keras:NAME, file.py:callable, package.module:callable,
    a .keras/.h5/.hdf5 file, a .pt2 file of torch.export (with --trust), or a bundle made by `normswap patch`.
    DATA is a folder with one subfolder of images per class, or an .npz with arrays x and y.

    \b
    Exit codes: 0 ok, 1 internal error, 2 usage, 3 input rejected, 4 unsupported or nothing to do,
    5 verification failed, 6 something not installed, 7 file system.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


_json = click.option("--json", "as_json", is_flag=True, callback=remember_json, help="Print one JSON object on stdout.")
_overwrite = click.option("--overwrite", is_flag=True, help="Replace an output that exists.")
_input = option_set(
    click.option("--input-shape", callback=numbers(int), help="One sample's shape, such as 3,224,224."),
    click.option("--size", callback=numbers(int), help="Image height and width, if only they differ: 224 or 224,224."),
    click.option("--mean", callback=numbers(float), help="Subtracted from images in 0..1; one number or one each."),
    click.option("--std", callback=numbers(float), help="Images are divided by it; one number or one each."),
    click.option("--trust", is_flag=True, help="Read a .pt2 file, which can run code while it is read."),
)
_weights = click.option("--weights", type=Path, help="State dict to load: .safetensors, .pt, .pth, .th or .bin.")


@main.command()
@click.argument("model")
@_weights
@_input
@_json
def inspect(model: str, weights: Path | None, as_json: bool, **shape: Any) -> None:
    """List the BatchNorms of MODEL and what replacing each is expected to change.

    Example: normswap inspect timm:resnet50 --input-shape 3,224,224
    """
    from .patchers.model import plan
    from .patchers.opening import Opened

    opened = Opened(model, weights, shape)
    plans = {name: plan(opened.model, name, example=opened.example).decisions for name in ("sn", "gn", "in")}
    rows = [
        {
            "name": site.name,
            "aliases": list(site.aliases),
            "type": site.source,
            "channels": site.channels,
            "shape": None if site.spatial is None else list(site.spatial),
            "patched_to": site.kind,
            "drift": {name: decisions[place].drift for name, decisions in plans.items()},
            "obstacle": site.obstacle or site.left,
        }
        for place, site in enumerate(decision.site for decision in plans["gn"])
    ]
    show(as_json, {"model": model, "sites": rows}, sites_table(f"{len(rows)} BatchNorms in {model}", rows))


@main.command()
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
@_weights
@_input
@_overwrite
@_json
def patch(model: str, target: str | None, output: Path | None, **options: Any) -> None:
    r"""Replace the BatchNorms of MODEL, weights carried over, and write a bundle.

    \b
    Examples:
      normswap patch timm:resnet50 --to gn -o resnet50-gn
      normswap patch net.py:build --weights net.pth --to sn --input-shape 3,32,32 -o net-sn
      normswap patch face.hdf5 --to brn -o face-brn --dry-run
    """
    from .convert.recipe import recipe_from_json
    from .patchers import bundle
    from .patchers import model as patchers
    from .patchers.opening import Opened
    from .sources.files import require_absent, require_file
    from .sources.models import load_model

    if (target is None) == (options["recipe"] is None):
        raise click.UsageError("expected one of --to and --recipe")
    if output is None and not options["dry_run"]:
        raise click.UsageError("expected -o BUNDLE, or --dry-run")
    wanted: Any = _target(target, options) if target else None
    if options["recipe"] is not None:
        require_file(options["recipe"])
        wanted = recipe_from_json(options["recipe"].read_bytes())
    if output is not None:
        require_absent(output, overwrite=options["overwrite"])
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
    if options["calibrate"]:
        result["calibration"] = _calibrate(opened, original, options)
    if data := options["data"] or options["calibrate"]:
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


@main.command()
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
@_input
@_overwrite
@_json
def finetune(bundle: str, output: Path, steps: int | None, epochs: float | None, **options: Any) -> None:
    r"""Fine-tune the model in BUNDLE and write another bundle.

    \b
    Examples:
      normswap finetune net-gn --data train/ --distill --steps 100 -o net-gn-tuned
      normswap finetune net-sn --data train/ --eval-data val/ --epochs 3 --batch-size 2 -o net-sn-tuned
    """
    from .finetune import run
    from .patchers.opening import Opened
    from .sources.data import open_data

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


@main.command()
@click.argument("model")
@click.option("--data", required=True, help="Labelled images.")
@click.option("--batch-size", default=250, show_default=True)
@_weights
@_input
@_json
def evaluate(model: str, data: str, batch_size: int, weights: Path | None, as_json: bool, **shape: Any) -> None:
    """Measure the accuracy of MODEL, a bundle, or an ONNX file (run in onnxruntime).

    Example: normswap evaluate net-gn.onnx --data val/
    """
    from .finetune.accuracy import accuracy
    from .sources.data import open_data

    if model.endswith(".onnx"):
        from .export.inference import open_onnx

        predict, preprocessing = open_onnx(Path(model), shape)
    else:
        from importlib import import_module

        from .patchers.opening import Opened

        opened = Opened(model, weights, shape)
        engine = import_module(f".finetune.{opened.framework}", __package__)
        preprocessing = opened.require_preprocessing()

        def predict(x: Any) -> Any:
            return engine.predict(opened.model, x)

    images = open_data(data, preprocessing)
    done = 0
    with progress("evaluating", len(images)) as advance:

        def count(size: int) -> None:
            nonlocal done
            done += size
            advance(done, "")

        found = accuracy(predict, images, batch_size=batch_size, on_batch=count)
    text = f"top-1 {found.top1:.2f} %, top-5 {found.top5:.2f} % of {found.n} images"
    show(as_json, {"model": model, **found.to_dict()}, text)


@main.command()
@click.argument("model")
@click.option("-o", "--output", type=Path, required=True, help="ONNX file to write.")
@click.option("--opset", default=20, show_default=True)
@_weights
@_input
@_overwrite
@_json
def export(model: str, output: Path, opset: int, weights: Path | None, as_json: bool, **options: Any) -> None:
    """Write MODEL or a bundle to an ONNX file, norms folded, and prove it with onnxruntime.

    Example: normswap export net-gn -o net-gn.onnx
    """
    from .export.onnx import to_onnx
    from .patchers.opening import Opened
    from .sources.files import require_absent

    require_absent(output, overwrite=options["overwrite"])
    opened = Opened(model, weights, options)
    settings = opened.preprocessing
    report = to_onnx(
        opened.model,
        output,
        example=opened.example,
        opset=opset,
        overwrite=options["overwrite"],
        metadata={} if settings is None else {"preprocessing": settings.to_dict()},
    )
    assert report.verdict is not None
    text = (
        f"{report.nodes} nodes, {report.size / 1e6:.2f} MB; {len(report.folded)} norms folded, "
        f"{len(report.kept)} kept; "
        f"largest difference {report.verdict.max_rel:.1e} of scale; written to {output}"
    )
    show(as_json, report.to_dict(), "\n".join([*(f"note: {note}" for note in report.notes), text]))


@main.command()
@click.argument("model")
@click.argument("file", type=Path)
@click.option("--data", help="Images to run beside random inputs; labels are not used.")
@_weights
@_input
@_json
def verify(model: str, file: Path, data: str | None, weights: Path | None, as_json: bool, **shape: Any) -> None:
    """Prove that an ONNX FILE computes what MODEL or a bundle computes; exits 5 if it does not.

    Example: normswap verify net-gn net-gn.onnx --data val/
    """
    from .export.verify import verify as prove
    from .patchers.opening import Opened
    from .sources.data import open_data

    opened = Opened(model, weights, shape)
    batches = []
    if data is not None and data != "random":
        images = open_data(data, opened.require_preprocessing())
        batches = [images.batch(images.sample(16))[0]]
    verdict = prove(opened.model, file, data=batches)
    text = f"passed: {len(verdict.checks)} checks, largest difference {verdict.max_rel:.1e} of scale"
    show(as_json, {"file": str(file), **verdict.to_dict()}, text if verdict else verdict.explain(str(file)))
    if not verdict:
        raise click.exceptions.Exit(VerificationError.exit_code)


@main.command()
@click.option("--framework", type=click.Choice(["torch", "keras"]), default="torch", show_default=True)
@_json
def demo(framework: str, as_json: bool) -> None:
    """Run the whole job on bundled data: train a BatchNorm network, swap, fine-tune, export, prove.

    Example: normswap demo --framework keras
    """
    from .demo.digits import COLUMNS, run

    def say(message: str) -> None:
        click.echo(message, err=True)

    rows = run(framework, say)
    shown = [{title: row[name] for name, title in COLUMNS.items()} for row in rows]
    show(as_json, {"framework": framework, "rows": rows}, table("accuracy on unseen digits, %", shown))


def _target(name: str, options: Mapping[str, Any]) -> Any:
    """Return the configuration that --to and the options beside it name."""
    from .convert.targets import GroupNorm, SwitchNorm, as_target

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
    from .finetune.calibration import calibrate
    from .sources.data import open_data

    data = open_data(options["calibrate"], opened.require_preprocessing())
    chosen = data.sample(options["calibration_size"])
    batches = [data.batch(chosen[start : start + 64])[0] for start in range(0, len(chosen), 64)]
    residuals = calibrate(opened.model, original, batches, refit=options["refit"])
    return [vars(residual) for residual in residuals]


def _drift(opened: "Opened", original: Any, names: list[str], spec: str) -> list[dict[str, Any]]:
    from .patchers.drift import drift_between
    from .sources.data import open_data

    data = open_data(spec, opened.require_preprocessing())
    chosen = data.sample(len(data))[-16:]  # the last that --calibrate would take
    return [vars(found) for found in drift_between(opened.model, original, names, data.batch(chosen)[0])]
