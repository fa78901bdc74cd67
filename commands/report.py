"""The command that writes a page about a bundle, a run or an ONNX file: report."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..console import show
from ..errors import InputError, NormswapError, UnsupportedError, VerificationError
from .options import (
    command,
    json_option,
    overwrite_option,
    read_from,
    require_none,
    timeout_option,
    trust_code_option,
    trust_option,
)
from .verify import float_file_of

if TYPE_CHECKING:
    from ..bundles.opening import ModelOptions, Opened
    from ..report.page import Page, Section, Tile
    from ..verification.file import OnnxFile
    from ..verification.latency import Latencies


@click.command()
@click.argument("subject", metavar="BUNDLE|RUN|FILE.onnx")
@click.option("-o", "--output", type=Path, required=True, help="Page to write: an .html file.")
@click.option("--against", metavar="BUNDLE", help="Prove FILE.onnx against this bundle or MODEL, and show every check.")
@click.option("--latency", is_flag=True, help="Time FILE.onnx, beside the original of --against where it has one.")
@timeout_option
@trust_option
@trust_code_option
@overwrite_option
@json_option
def report(
    subject: str,
    output: Path,
    against: str | None,
    latency: bool,
    timeout: float,
    trust: bool,
    trust_code: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write one page that shows what a bundle, a fine-tuning run or an ONNX file is.

    Of a bundle it has the plan with the drift of every layer, gates, and the curves of its fine-tuning; of a file what
    it tells of itself, what each norm became in its graph, and with --against the checks of the proof. The page loads
    nothing and runs no script. Of a bundle files alone are read, except of the one in --against, which is run.

    The page is written where the proof fails too; then the exit code is 5.

    \b
    Examples:
      normswap report net-sn-tuned -o net-sn.html
      normswap report net-sn.onnx --against net-sn-tuned --latency -o net-sn.html
    """
    from ..bundles.opening import is_onnx
    from ..sources.outputs import require_output, staged

    if output.suffix.lower() not in (".html", ".htm"):
        raise click.BadParameter(f"expected a file ending in .html, received {output}", param_hint="'-o'")
    is_file = is_onnx(subject)
    if not is_file:
        require_none(["against", "latency"], "a FILE.onnx to be proved or timed")
    if against is None:
        require_none(["trust", "trust_code"], "--against BUNDLE to trust")
    if against is None and not latency:
        require_none(["timeout"], "--against or --latency, which take time")
    require_output(output, overwrite=overwrite, sources=read_from(subject, against))
    then, failed = [], False
    if is_file:
        from ..bundles.opening import ModelOptions

        known = ModelOptions(trust=trust, trust_code=trust_code)
        page, told, failed = _of_file(Path(subject), against, latency, timeout, known)
        if against is None:
            then = [command("report", subject, "--against", "BUNDLE", "-o", output, "--overwrite")]
    else:
        page, told = _of_folder(subject)
    with staged(output, overwrite=overwrite) as temporary:
        page.write(temporary)
    said = f"page written to {output}{': the file failed its proof, which the page shows' if failed else ''}"
    show(as_json, {"report": subject, **told, "output": str(output)}, said, then)
    if failed:
        raise click.exceptions.Exit(VerificationError.exit_code)


def _of_folder(subject: str) -> tuple["Page", dict[str, Any]]:
    """Return the page of a bundle, or of a run that has not come to one, and what it tells as plain data."""
    from ..bundles.manifest import RUN, is_bundle, is_unfinished
    from ..finetune.run.history import History, folder_of
    from ..finetune.run.journal import METRICS
    from ..report import bundle as of_bundle
    from ..report import run as of_run
    from ..report.page import Page
    from ..sources.hub import is_hub

    folder = folder_of(subject)
    if not (is_bundle(folder) or is_unfinished(folder)):
        found = "a folder of something else" if folder.is_dir() else "a file" if folder.exists() else "nothing there"
        raise InputError(f"expected a bundle, a fine-tuning run or a FILE.onnx, received {subject}, {found}")
    sections: list[Section] = []
    tiles: list[Tile] = []
    told: dict[str, Any] = {}
    if is_bundle(folder):
        sections, tiles, told = of_bundle.sections_of(folder)
    if not is_bundle(folder) or (folder / RUN / METRICS).is_file():
        history = History.of(folder)
        sections.insert(1, of_run.section_of(history))
        tiles = [*of_run.tiles_of(history), *tiles]
        told["run"] = history.summary()
    kind = "bundle" if is_bundle(folder) else "run"
    what = "normswap bundle" if is_bundle(folder) else "fine-tuning run that has not come to a bundle"
    return Page(subject if is_hub(subject) else _title(folder), what, sections, tiles), {"kind": kind, **told}


def _of_file(
    path: Path, against: str | None, latency: bool, timeout: float, known: "ModelOptions"
) -> tuple["Page", dict[str, Any], bool]:
    """Return the page of an ONNX file, what it tells as plain data, and whether the file failed its proof."""
    from ..report import file as of_file
    from ..report.page import Page
    from ..verification.file import read_model

    file = read_model(path)
    sections, tiles, told = of_file.sections_of(file)
    opened, verdict, stored = None, None, file.proved
    if against is None:
        proof = of_file.stored_section(stored, path.name)
    else:
        from ..bundles.opening import Opened
        from ..verification.verify import verify

        opened = Opened(against, known)
        with float_file_of(opened, path) as float_file:
            verdict = verify(opened.model, path, float_file=float_file, timeout=timeout)
        proof = of_file.verdict_section(verdict, against)
        tiles = [of_file.verdict_tile(verdict), *tiles]
    sections.insert(1, proof)
    told |= {"stored_verdict": None if stored is None else vars(stored)}
    told |= {"verdict": None if verdict is None else verdict.to_dict()}
    if latency:
        found = _latency(file, opened, timeout)
        sections.append(of_file.latency_section(found))
        told["latency"] = {
            name: {str(batch): {"median": both[0], "least": both[1]} for batch, both in times.items()}
            for name, times in found.items()
        }
    if opened is not None and opened.bundle is not None:
        from ..report import bundle as of_bundle

        more, _, told["bundle"] = of_bundle.sections_of(opened.bundle.directory)
        sections += [each for each in more if each.title not in {section.title for section in sections}]
    page = Page(path.name, "ONNX file", sections, tiles)
    return page, {"kind": "onnx", **told}, verdict is not None and not verdict


def _latency(file: "OnnxFile", opened: "Opened | None", timeout: float) -> "Latencies":
    """Return the time that the file takes, and that of its original where it was opened with one."""
    from tempfile import TemporaryDirectory

    from ..data.preprocessing import Preprocessing
    from ..report.file import shape_of
    from ..verification.latency import latencies

    shapes = [shape_of(value)[1:] for value in file.inputs]
    known = file.metadata.get("preprocessing")
    if len(shapes) == 1 and known is not None:
        shapes = [list(Preprocessing.from_dict(known, file.told("preprocessing")).shape)]
    kinds = {value.type.tensor_type.elem_type for value in file.inputs}
    if kinds != {1} or any(not isinstance(size, int) for shape in shapes for size in shape):  # float32
        told = ", ".join(f"{value.name} {tuple(shape_of(value))}" for value in file.inputs)
        raise UnsupportedError(
            f"expected a file whose inputs are float32 of known sizes beside --latency, received {told}; leave that out"
        )
    sizes = [tuple(map(int, shape)) for shape in shapes]
    with TemporaryDirectory() as folder:
        paths = {file.path.name: file.path}
        if opened is not None and opened.bundle is not None and opened.bundle.has_original and len(sizes) == 1:
            import numpy as np

            from ..export.onnx import to_onnx

            original = Path(folder) / "original.onnx"
            example = np.random.default_rng(0).standard_normal((2, *sizes[0]), np.float32)
            to_onnx(opened.bundle.original(), original, example=example, check=False)
            paths = {"its original": original, **paths}
        try:
            return latencies(paths, sizes, timeout=timeout)
        except NormswapError:
            raise
        except Exception as error:  # onnxruntime's own, of a file of anybody's
            raise InputError(
                f"expected a file that runs on {sizes}, received {file.path}, which fails: {error}; leave --latency out"
            ) from None


def _title(folder: Path) -> str:
    return folder.name or str(folder.resolve().name) or str(folder)
