"""The command that proves an ONNX file: verify."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from ..console import show
from ..errors import InputError, VerificationError
from ..verification.runtimes.known import ONNXRUNTIME, RUNTIMES, kind_of
from .options import json_option, model_options, overwrite_option, read_from, require_none, timeout_option

if TYPE_CHECKING:
    from ..bundles.opening import ModelOptions, Opened


@click.command()
@click.argument("model")
@click.argument("file", type=Path, required=False)
@click.option("--data", help="Images, or an .npz of named arrays, to run beside drawn inputs; labels are not used.")
@click.option(
    "--runtime",
    "runtimes",
    multiple=True,
    default=(ONNXRUNTIME,),
    show_default=True,
    type=click.Choice([ONNXRUNTIME, *RUNTIMES]),
    help="What has to compute the same; may be given several times. web: onnxruntime-web under node.",
)
@click.option(
    "--provider",
    "providers",
    multiple=True,
    default=("cpu",),
    show_default=True,
    type=click.Choice(["cpu", "cuda", "tensorrt", "openvino", "coreml", "dml", "auto"]),
    help="Where onnxruntime runs the file; may be given several times. auto: all that are installed.",
)
@click.option(
    "--save-reference", type=Path, help="Write what MODEL answers to an .npz, to verify without it, if FILE passes."
)
@click.option("--against", type=Path, help="Hold FILE against such an .npz; no MODEL and no framework is needed.")
@timeout_option
@model_options()
@overwrite_option
@json_option
def verify(
    model: str,
    file: Path | None,
    data: str | None,
    runtimes: tuple[str, ...],
    providers: tuple[str, ...],
    save_reference: Path | None,
    against: Path | None,
    timeout: float,
    known: "ModelOptions",
    overwrite: bool,
    as_json: bool,
) -> None:
    """Prove that a FILE computes what MODEL or a bundle computes; exits 5 if it does not.

    FILE is an ONNX file; with --runtime litert a TFLite file, with executorch one of ExecuTorch.

    \b
    Examples:
      normswap verify net-gn net-gn.onnx --data val/
      normswap verify net-gn net-gn.onnx --runtime openvino --runtime web
      normswap verify bert-gn bert-gn.onnx --example tokens.npz
      normswap verify net-gn net-gn.onnx --save-reference net-gn.npz
      normswap verify net-gn.onnx --against net-gn.npz
    """
    if (file is None) == (against is None):
        raise click.UsageError("expected MODEL and FILE, or FILE and --against")
    if against is not None:
        of_a_model = [
            "data",
            "save_reference",
            "overwrite",
            "weights",
            "input_shape",
            "example",
            "size",
            "mean",
            "std",
            "trust",
            "trust_code",
        ]
        require_none(of_a_model, "no option of a MODEL beside --against, which stands in its place")
    if save_reference is None:
        require_none(["overwrite"], "--save-reference FILE to overwrite")
    if "onnxruntime" not in runtimes:
        require_none(["providers"], "--runtime onnxruntime beside the providers of it")
    if data in (None, "random"):
        require_none(["input_shape", "size", "mean", "std"], "--data DATA beside what is said of its images")

    from ..verification.verify import verify as prove
    from ..verification.verify import verify_against

    if file is None:
        file = Path(model)
        verdict = verify_against(str(against), file, runtime=runtimes, providers=providers, timeout=timeout)
    else:
        from ..bundles.opening import Opened
        from ..sources.outputs import require_output

        if save_reference is not None:
            read = read_from(model, known.weights, known.example, file, data)
            require_output(save_reference, overwrite=overwrite, sources=read)
        opened = Opened(model, known)
        with float_file_of(opened, file) as float_file:
            verdict = prove(
                opened.model,
                file,
                example=None if known.example is None else opened.example,
                data=[] if data in (None, "random") else opened.shown(str(data)),
                runtime=runtimes,
                providers=providers,
                float_file=float_file,
                save_reference=save_reference,
                overwrite=overwrite,
                timeout=timeout,
            )
        if not verdict and opened.draws_weights():
            raise InputError(
                f"expected a MODEL with the weights that {file} was made of, received {model}, which has other ones "
                "each time it is built; give --weights, or a bundle"
            )
    show(as_json, {"file": str(file), **verdict.to_dict()}, verdict.explain(str(file)))
    if not verdict:
        raise click.exceptions.Exit(VerificationError.exit_code)


@contextmanager
def float_file_of(opened: "Opened", file: Path) -> Iterator[Path | None]:
    """Yield the float file of an int8 one, written anew from its model for the weights in it; None for other files."""
    from ..export.onnx import to_onnx
    from ..sources.files import require_file
    from ..verification.file import read_model

    require_file(file)
    known = read_model(file) if kind_of(file) == "ONNX" else None
    if known is None or not known.int8:
        yield None
        return
    opset = next(entry.version for entry in known.proto.opset_import if entry.domain in ("", "ai.onnx"))
    form: dict[str, Any] = {"opset": opset, "prune_gates": known.pruned, "check": False}
    with TemporaryDirectory() as folder:
        yield to_onnx(opened.model, Path(folder) / "float.onnx", example=opened.example, **form).output
