"""The command that writes an ONNX file: export."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..console import show
from ..patchers.table import table
from ..verification.runtimes.known import RUNTIMES
from .options import command, json_option, model_options, overwrite_option, positive, read_from, require_none, typed

if TYPE_CHECKING:
    from ..bundles.opening import ModelOptions

DEVICES = tuple(runtime.name for runtime in RUNTIMES.values() if runtime.reads != "ONNX")
"""The runtimes whose files are not ONNX."""


@click.command()
@click.argument("model")
@click.option("-o", "--output", type=Path, required=True, help="ONNX file to write, or one of LiteRT or ExecuTorch.")
@click.option("--opset", default=20, show_default=True)
@click.option("--runtime", type=click.Choice(["portable", "ort", "web", *DEVICES]), default="portable",
              show_default=True, help="Operators every runtime knows, or what one runtime is better with: "
              "onnxruntime, onnxruntime-web, LiteRT (of a Keras model), ExecuTorch (of a PyTorch model).")  # fmt: skip
@click.option("--dynamic-size", is_flag=True, help="Leave height and width open, not only the batch.")
@click.option("--half", is_flag=True, help="Weights and arithmetic in float16; norms stay in float32.")
@click.option("--int8", is_flag=True, help="Weights and arithmetic in int8, with --calibrate; norms stay in float.")
@click.option("--calibrate", metavar="DATA", help="Images, or inputs of an .npz, to choose the ranges of --int8 on.")
@click.option("--calibration-size", default=128, show_default=True, callback=positive, help="Inputs --calibrate uses.")
@click.option("--prune-gates", type=float, default=0.0, metavar="EPS", help="Leave out SN's statistics of gates below.")
@click.option("--data", help="Images, or an .npz of named arrays, to prove the file on beside drawn inputs.")
@click.option("--latency/--no-latency", default=None, help="Time a bundle's file beside its original's; default yes.")
@model_options()
@overwrite_option
@json_option
def export(
    model: str,
    output: Path,
    opset: int,
    runtime: str,
    dynamic_size: bool,
    half: bool,
    int8: bool,
    calibrate: str | None,
    calibration_size: int,
    prune_gates: float,
    data: str | None,
    latency: bool | None,
    known: "ModelOptions",
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write MODEL or a bundle to an ONNX file, norms folded, and prove it.

    \b
    Examples:
      normswap export net-gn -o net-gn.onnx
      normswap export timm:resnet50 --input-shape 3,224,224 --dynamic-size -o resnet50.onnx
      normswap export net.py:bert --example tokens.npz --data more.npz -o bert.onnx
      normswap export net-gn --int8 --calibrate train -o net-gn.int8.onnx
    """
    if half and int8:
        raise click.UsageError("expected one of --half and --int8")
    if int8 and calibrate is None:
        raise click.UsageError("expected --calibrate DATA beside --int8")
    if not int8:
        require_none(["calibrate", "calibration_size"], "--int8 beside what is said of its calibration")
    from ..bundles.opening import Opened
    from ..export.onnx import to_onnx
    from ..sources.outputs import require_output

    if runtime in DEVICES:
        of_onnx = ["opset", "half", "int8", "prune_gates", "latency"]
        require_none(of_onnx, f"no option of an ONNX file beside --runtime {runtime}")
    if runtime == "executorch":
        require_none(["dynamic_size"], "the example's own size, which ExecuTorch plans its memory for")
    require_output(output, overwrite=overwrite, sources=read_from(model, known.weights, known.example, data, calibrate))
    opened = Opened(model, known)
    original = opened.bundle is not None and opened.bundle.has_original
    if latency and not original:
        raise click.UsageError(
            f"expected a bundle saved with its original beside --latency, received {model}; leave the option out"
        )
    if latency and known.example is not None:
        raise click.UsageError("expected the shape of one image beside --latency, received --example; leave one out")
    settings = opened.preprocessing
    given = known.example is not None or opened.example is None
    example = opened.example if given else _noise(opened.example)
    proved = None if data is None else opened.shown(data)
    if runtime in DEVICES:
        from ..export.devices import to_executorch, to_litert

        settled: dict[str, Any] = {"example": example, "data": proved, "overwrite": overwrite}
        report = (
            to_litert(opened.model, output, dynamic_size=dynamic_size, **settled)
            if runtime == "litert"
            else to_executorch(opened.model, output, **settled)
        )
        _tell(report, [_row(str(output), report)], _verified(report), _verifying(output, known, data), as_json=as_json)
        return
    form: dict[str, Any] = {"opset": opset, "runtime": runtime, "dynamic_size": dynamic_size, "half": half}
    batches = None
    if calibrate is not None:
        inputs = opened.unlabelled(calibrate)
        batches = [x for x, _ in inputs.batches(16, inputs.sample(calibration_size))]
    report = to_onnx(
        opened.model,
        output,
        example=example,
        int8=batches,
        data=proved,
        **form,
        prune_gates=prune_gates,
        overwrite=overwrite,
        metadata={} if settings is None else {"preprocessing": settings.to_dict()},
    )
    facts = [_row(str(output), report)]
    if latency is not False and original and opened.bundle is not None and not given:
        facts = _beside_original(opened.bundle.original(), facts[0], example, form)
    norms = f"{len(report.folded)} norms folded, {len(report.kept)} kept; {_verified(report)}"
    _tell(report, facts, norms, _verifying(output, known, data), as_json=as_json)


def _tell(report: Any, facts: list[dict[str, Any]], last: str, then: str, *, as_json: bool) -> None:
    """Show what was written, the report's notes and a last line, and the command to type next."""
    told = table("what was written", facts, [*(f"note: {note}" for note in report.notes), last])
    show(as_json, {**report.to_dict(), "files": facts}, told, [then])


def _verified(report: Any) -> str:
    verdict = report.verdict
    return f"verified: largest difference {verdict.max_rel:.1e} of scale in {len(verdict.checks)} checks"


def _verifying(output: Path, known: "ModelOptions", data: str | None) -> str:
    """Return the command that proves a file that was written on more data."""
    runtime = click.get_current_context().params["runtime"]
    elsewhere = ("--runtime", runtime) if runtime in DEVICES else ()
    own = ["output", "opset", "runtime", "dynamic_size", "half", "int8", "calibrate", "calibration_size", "prune_gates",
           "latency", "overwrite", "data", "input_shape", "example", "size", "mean", "std"]  # fmt: skip
    return command("verify", *typed(*own), output, *elsewhere,
                   *(() if known.example is None else ("--example", known.example)),
                   "--data", data or ("DATA" if known.example is None else "DATA.npz"))  # fmt: skip


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

    from ..export.onnx import to_onnx
    from ..verification.latency import latencies

    with TemporaryDirectory() as folder:
        report = to_onnx(original, Path(folder) / "original.onnx", example=example, **form, check=False)
        rows = [_row("its original", report), file]
        paths = {"its original": report.output, str(file["file"]): Path(file["file"])}
        for name, times in latencies(paths, [tuple(example.shape[1:])]).items():
            row = next(row for row in rows if row["file"] == name)
            for batch, (median, least) in times.items():
                row |= {f"median ms, batch {batch}": round(median, 2), f"least, batch {batch}": round(least, 2)}
    return rows
