"""Commands that write an ONNX file and say what it is worth: export, verify and evaluate."""

from pathlib import Path
from typing import Any

import click

from ..console import progress, show
from ..errors import VerificationError
from .options import json_option, model_options, overwrite_option, weights_option


@click.command()
@click.argument("model")
@click.option("--data", required=True, help="Labelled images.")
@click.option("--batch-size", default=250, show_default=True)
@weights_option
@model_options
@json_option
def evaluate(model: str, data: str, batch_size: int, weights: Path | None, as_json: bool, **shape: Any) -> None:
    """Measure the accuracy of MODEL, a bundle, or an ONNX file (run in onnxruntime).

    Example: normswap evaluate net-gn.onnx --data val/
    """
    from ..finetune.accuracy import accuracy
    from ..sources.data import open_data

    if model.endswith(".onnx"):
        from ..export.inference import open_onnx

        predict, preprocessing = open_onnx(Path(model), shape)
    else:
        from importlib import import_module

        from ..patchers.opening import Opened

        opened = Opened(model, weights, shape)
        engine = import_module(f"..finetune.{opened.framework}", __package__)
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


@click.command()
@click.argument("model")
@click.option("-o", "--output", type=Path, required=True, help="ONNX file to write.")
@click.option("--opset", default=20, show_default=True)
@weights_option
@model_options
@overwrite_option
@json_option
def export(model: str, output: Path, opset: int, weights: Path | None, as_json: bool, **options: Any) -> None:
    """Write MODEL or a bundle to an ONNX file, norms folded, and prove it with onnxruntime.

    Example: normswap export net-gn -o net-gn.onnx
    """
    from ..export.onnx import to_onnx
    from ..patchers.opening import Opened
    from ..sources.files import require_absent

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


@click.command()
@click.argument("model")
@click.argument("file", type=Path)
@click.option("--data", help="Images to run beside random inputs; labels are not used.")
@weights_option
@model_options
@json_option
def verify(model: str, file: Path, data: str | None, weights: Path | None, as_json: bool, **shape: Any) -> None:
    """Prove that an ONNX FILE computes what MODEL or a bundle computes; exits 5 if it does not.

    Example: normswap verify net-gn net-gn.onnx --data val/
    """
    from ..export.verify import verify as prove
    from ..patchers.opening import Opened
    from ..sources.data import open_data

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
