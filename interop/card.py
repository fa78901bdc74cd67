"""What a bundle tells people on a hub: its model card, written from what is known."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bundles.manifest import RUN, Manifest
from ..convert.recipe import Recipe
from ..convert.targets import described
from ..finetune.run.history import History
from ..finetune.run.journal import METRICS
from ..sources.hub import PREFIX, library
from ..sources.spec import PROGRAM_SUFFIX, runs_code
from ..sources.weights import SUFFIX

if TYPE_CHECKING:
    from ..verification.file import Proved

TAGS: Mapping[str, str] = {
    "sn": "switchable-normalization",
    "brn": "batch-renormalization",
    "gn": "group-normalization",
    "bn": "batch-normalization",
}


def card(
    directory: Path,
    manifest: Manifest,
    recipe: Recipe,
    repo: str,
    *,
    license: str | None = None,
    proof: "Proved | None" = None,
    code: str | None = None,
) -> str:
    """Return the model card of the bundle in ``directory`` in the repository ``repo``, as Markdown with its metadata.

    ``license`` is the user's word, ``proof`` that of the ONNX file beside it, ``code`` the file of the source's code in
    the repository. Names are shown as code, whatever they are.
    """
    hub = library()
    kinds = dict.fromkeys(choice.target.kind for choice in recipe.choices)
    framework = {"torch": "pytorch", "keras": "keras"}[manifest.framework]
    tags = ["normswap", framework, *(TAGS[kind] for kind in kinds), *(["onnx"] if proof else [])]
    data = hub.ModelCardData(license=license, library_name="normswap", tags=tags)
    parts = [
        f"# {repo.partition('/')[2]}",
        _what(manifest, recipe),
        "## How to load it",
        *_loading(manifest, repo, code),
        "## How it was made",
        _table(_facts(manifest, recipe)),
        *_accuracy(directory),
        *_onnx(proof),
        "## Layers",
        _table_of_layers(manifest, recipe),
        "This card was written by `normswap push` from what the bundle tells. "
        + (
            "Its licence was named by who pushed it."
            if license
            else "**Its licence is not told:** ask who pushed it before you use it."
        ),
    ]
    return str(hub.ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"))


def code_span(text: object) -> str:
    """Return a text as Markdown shows it letter by letter, also in a table."""
    plain = " ".join(str(text).split()) or " "
    longest = max((len(run) for run in "".join(c if c == "`" else " " for c in plain).split()), default=0)
    fence = "`" * (longest + 1)
    space = " " if "`" in plain else ""
    return f"{fence}{space}{plain}{space}{fence}".replace("|", "\\|")


def _what(manifest: Manifest, recipe: Recipe) -> str:
    made = f"of {code_span(manifest.source)}" if manifest.source else "of an architecture that is not told"
    return (
        f"A network {made}, whose normalization layers normswap has replaced with "
        f"the weights carried over: {recipe.in_words()}."
        if recipe.choices
        else f"A network {made} with the normalization layers it was built with."
    )


def _loading(manifest: Manifest, repo: str, code: str | None) -> list[str]:
    """Return how the bundle is loaded, by what its source is."""
    source, spec = manifest.source, f"{PREFIX}{repo}"
    call, said = f'normswap.load("{spec}")', ""
    if source is not None and source.endswith(PROGRAM_SUFFIX):
        said = "Its source is a file of `torch.export`, which is not here: put it beside the bundle; pass `trust=True`."
    elif source is None or (".py:" in source and code is None):
        call = f'normswap.load("{spec}", model=build())'
        said = "`build` returns a fresh network of its architecture, of which the code is not here."
    elif runs_code(source) and manifest.framework == "torch":
        call = f'normswap.load("{spec}", trust_code=True)'
        where = "in this repository" if code else "in a package that has to be installed"
        said = f"It is built by code, {code_span(source)}, {where}: look at it before you trust it."
    return [
        f"```python\nimport normswap  # pip install 'normswap[{manifest.framework},hub]'\n\nmodel = {call}\n```",
        *([said] if said else []),
        f"At the command line it is a BUNDLE: `normswap report {spec} -o page.html` shows what it is.",
    ]


def _facts(manifest: Manifest, recipe: Recipe) -> list[tuple[str, str]]:
    equalized = sum(bool(choice.front) for choice in recipe.choices)
    drift, shown = manifest.drift, manifest.preprocessing
    layers = {choice.name for choice in recipe.choices}
    ends = [f"{code_span(name)} {value:.3f}" for name, value in drift.measured.items() if name not in layers]
    facts = [("made by", f"normswap {manifest.normswap}"), ("replaced", recipe.in_words())]
    if recipe.choices:
        images = "then calibrated on unlabelled images" if drift.calibrated else "without data"
        facts.append(("weights", f"carried over by algebra, {images}"))
    if equalized:
        facts.append(("equalized", f"the layers in front of {equalized} of them"))
    if drift.expected:
        facts.append(("largest expected drift of a layer", f"{max(drift.expected.values()):.3f} of its output"))
    if ends:
        facts.append(("measured drift", f"{', '.join(ends)}, before any fine-tuning"))
    if shown is not None:
        facts.append(
            (
                "input",
                f"{'x'.join(map(str, shown.shape))}, mean {_numbers(shown.mean)}, deviation {_numbers(shown.std)}",
            )
        )
    original = f"original{SUFFIX[manifest.framework]}" in manifest.sha256
    facts.append(("original's weights", "in the bundle, for distillation" if original else "not in the bundle"))
    return facts


def _accuracy(directory: Path) -> list[str]:
    if not (directory / RUN / METRICS).is_file():
        return []
    history = History.of(directory)
    told, original = history.summary(), history.original
    rows = [("steps", str(told["steps"]))]
    if told["best_top1"] is not None:
        rows.append(
            ("top-1", f"{told['best_top1']:.2f} %, on the images it was evaluated on, after step {told['best_step']}")
        )
    if original is not None and original["eval_top1"] is not None:
        rows.append(("top-1 before the patch", f"{original['eval_top1']:.2f} %"))
    return ["## Fine-tuning", _table(rows)]


def _onnx(proof: "Proved | None") -> list[str]:
    if proof is None:
        return []
    return [
        "## ONNX",
        f"`model.onnx` is the same network with its statistics folded. It says of itself that it {proof} of scale "
        'against the bundle; `normswap.verify(model, "model.onnx")` proves it.',
    ]


def _table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _table_of_layers(manifest: Manifest, recipe: Recipe) -> str:
    if not recipe.choices:
        return "None was replaced."
    expected, measured = manifest.drift.expected, manifest.drift.measured
    rows = [
        f"| {code_span(c.name)} | {described(c.target)} | {c.channels} | {_drift(expected.get(c.name))} | "
        f"{_drift(measured.get(c.name))} |"
        for c in recipe.choices
    ]
    return "\n".join(
        ["| layer | becomes | channels | expected drift | measured drift |", "|---|---|---|---|---|", *rows]
    )


def _drift(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _numbers(values: Any) -> str:
    return ", ".join(f"{value:g}" for value in values) if isinstance(values, tuple | list) else f"{values:g}"
