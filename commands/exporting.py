"""Commands that write an ONNX file and say what it is worth: export, verify and evaluate."""

from pathlib import Path
from typing import Any

import click

from ..console import show, table
from ..errors import VerificationError
from .options import json_option, model_options, overwrite_option, read_from, weights_option


@click.command()
@click.argument("model")
@click.option("--data", required=True, help="Labelled images.")
@click.option("--against", help="Model or bundle to compare with: its accuracy, and how often both say the same.")
@click.option("--batch-size", default=250, show_default=True)
@weights_option
@model_options
@json_option
def evaluate(
    model: str, data: str, against: str | None, batch_size: int, weights: Path | None, as_json: bool, **shape: Any
) -> None:
    """Measure the accuracy of MODEL, a bundle, or an ONNX file (run in onnxruntime).

    Example: normswap evaluate net-gn.onnx --data val/ --against net-gn
    """
    from .measuring import measure

    first = measure(model, data, batch_size, weights, shape)
    result, text = {"model": model, **first.accuracy.to_dict()}, str(first)
    if against is not None:
        second = measure(against, data, batch_size, weights, shape)
        agreement = first.agreement(second)
        result |= {"against": {"model": against, **second.accuracy.to_dict()}, "agreement": agreement}
        text = f"{model}: {first}\n{against}: {second}\nboth say the same of {agreement:.2f} % of the images"
    show(as_json, result, text)


@click.command()
@click.argument("model")
@click.option("-o", "--output", type=Path, required=True, help="ONNX file to write.")
@click.option("--opset", default=20, show_default=True)
@click.option("--runtime", type=click.Choice(["portable", "ort"]), default="portable", show_default=True,
              help="Operators every runtime knows, or those onnxruntime is fastest with.")  # fmt: skip
@click.option("--dynamic-size", is_flag=True, help="Leave height and width open, not only the batch.")
@click.option("--half", is_flag=True, help="Weights and arithmetic in float16; norms stay in float32.")
@click.option("--prune-gates", type=float, default=0.0, metavar="EPS", help="Leave out SN's statistics of gates below.")
@click.option("--latency/--no-latency", default=True, help="Time a bundle's file beside its original's; default yes.")
@weights_option
@model_options
@overwrite_option
@json_option
def export(model: str, output: Path, weights: Path | None, as_json: bool, latency: bool, **options: Any) -> None:
    """Write MODEL or a bundle to an ONNX file, norms folded, and prove it with onnxruntime.

    Example: normswap export net-gn -o net-gn.onnx
    """
    from ..export.onnx import to_onnx
    from ..patchers.opening import Opened
    from ..sources.files import require_output

    require_output(output, overwrite=options["overwrite"], sources=read_from(model, weights))
    opened = Opened(model, weights, options)
    settings = opened.preprocessing
    example = None if opened.example is None else _noise(opened.example)
    form = {name: options[name] for name in ("opset", "runtime", "dynamic_size", "half")}
    report = to_onnx(
        opened.model,
        output,
        example=example,
        **form,
        prune_gates=options["prune_gates"],
        overwrite=options["overwrite"],
        metadata={} if settings is None else {"preprocessing": settings.to_dict()},
    )
    assert report.verdict is not None
    facts = [_row(str(output), report)]
    if latency and opened.bundle is not None and example is not None:
        facts = _beside_original(opened.bundle.original(), facts[0], example, form)
    lines = [*(f"note: {note}" for note in report.notes)]
    lines.append(f"{len(report.folded)} norms folded, {len(report.kept)} kept; verified: largest difference "
                 f"{report.verdict.max_rel:.1e} of scale in {len(report.verdict.checks)} checks")  # fmt: skip
    show(as_json, {**report.to_dict(), "files": facts}, table("what was written", facts, lines))


def _noise(zeros: Any) -> Any:
    """Return standard normal numbers in place of a batch of zeros, of which norms can make little."""
    import numpy as np

    noise = np.random.default_rng(0).standard_normal(tuple(zeros.shape), np.float32)
    return noise if isinstance(zeros, np.ndarray) else zeros.new_tensor(noise)


def _row(name: str, report: Any) -> dict[str, Any]:
    return {"file": name, "nodes": report.nodes, "MB": round(report.size / 1e6, 2)}


def _beside_original(original: Any, file: dict[str, Any], example: Any, form: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the facts of a file and of its original's, which is written for that, with the time both take."""
    from tempfile import TemporaryDirectory

    from ..export.latency import latencies
    from ..export.onnx import to_onnx

    with TemporaryDirectory() as folder:
        report = to_onnx(original, Path(folder) / "original.onnx", example=example, **form, check=False)
        rows = [_row("its original", report), file]
        paths = {"its original": report.output, str(file["file"]): Path(file["file"])}
        for name, times in latencies(paths, [tuple(example.shape[1:])]).items():
            row = next(row for row in rows if row["file"] == name)
            for batch, (median, least) in times.items():
                row |= {f"median ms, batch {batch}": round(median, 2), f"least, batch {batch}": round(least, 2)}
    return rows


@click.command()
@click.argument("model")
@click.argument("file", type=Path, required=False)
@click.option("--data", help="Images to run beside random inputs; labels are not used.")
@click.option(
    "--provider",
    "providers",
    multiple=True,
    default=("cpu",),
    show_default=True,
    type=click.Choice(["cpu", "cuda", "tensorrt", "openvino", "coreml", "dml", "auto"]),
    help="Where onnxruntime runs the file; may be given several times. auto: all that are installed.",
)
@click.option("--save-reference", type=Path, help="Write what MODEL answers to an .npz, to verify without it.")
@click.option("--against", type=Path, help="Hold FILE against such an .npz; no MODEL and no framework is needed.")
@weights_option
@model_options
@overwrite_option
@json_option
def verify(
    model: str,
    file: Path | None,
    data: str | None,
    providers: tuple[str, ...],
    save_reference: Path | None,
    against: Path | None,
    weights: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Prove that an ONNX FILE computes what MODEL or a bundle computes; exits 5 if it does not.

    \b
    Examples:
      normswap verify net-gn net-gn.onnx --data val/
      normswap verify net-gn net-gn.onnx --save-reference net-gn.npz
      normswap verify net-gn.onnx --against net-gn.npz
    """
    if (file is None) == (against is None):
        raise click.UsageError("expected MODEL and FILE, or FILE and --against")
    if against is not None and (data or save_reference):
        raise click.UsageError("expected --data and --save-reference with a MODEL, received --against in its place")

    from ..export.verify import verify as prove
    from ..export.verify import verify_against

    if file is None:
        file = Path(model)
        verdict = verify_against(str(against), file, providers=providers)
    else:
        from ..patchers.opening import Opened
        from ..sources.data import open_data
        from ..sources.files import require_output

        if save_reference is not None:
            read = read_from(model, weights, file, data)
            require_output(save_reference, overwrite=options["overwrite"], sources=read)
        opened = Opened(model, weights, options)
        batches = []
        if data is not None and data != "random":
            images = open_data(data, opened.require_preprocessing(), labelled=False)
            batches = [images.batch(images.sample(16))[0]]
        saved = {"save_reference": save_reference, "overwrite": options["overwrite"]}
        verdict = prove(opened.model, file, data=batches, providers=providers, **saved)
    text = f"passed: {len(verdict.checks)} checks, largest difference {verdict.max_rel:.1e} of scale"
    text = "\n".join([*(f"note: {note}" for note in verdict.notes), text])
    show(as_json, {"file": str(file), **verdict.to_dict()}, text if verdict else verdict.explain(str(file)))
    if not verdict:
        raise click.exceptions.Exit(VerificationError.exit_code)
