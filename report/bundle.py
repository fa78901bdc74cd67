"""What a page shows of a bundle: its plan, drift and gates by layer, by its files alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..bundles.contents import Norm, norms_in
from ..bundles.manifest import Drifts, Manifest, read_manifest
from ..convert.recipe import Choice, Recipe
from ..convert.targets import KINDS, described
from ..interop.gates import Gates, gates_in_bundle
from .charts import bar, shares
from .page import Block, Cell, Details, Facts, Section, Table, Text, Tile

GATES = (("instance", "orange"), ("layer", "sky"), ("batch", "blue"))
"""The statistics that gates are of, and their colours."""


def sections_of(directory: Path) -> tuple[list[Section], list[Tile], dict[str, Any]]:
    """Return what the files of a bundle tell: for the page, what is to be seen first, and as plain data.

    Raises `InputError` if it is no bundle or is damaged.
    """
    manifest, recipe = read_manifest(directory)
    norms, gates = norms_in(directory), gates_in_bundle(directory)
    sections = [
        Section("The bundle", [_facts(manifest, recipe), _files(directory, manifest)]),
        Section("Plan and drift by layer", _layers(recipe, norms, manifest.drift)),
    ]
    if gates:
        sections.append(gates_section(gates))
    drift = manifest.drift
    chosen = {choice.name: choice for choice in recipe.choices}
    layers = [_told(norm, chosen.get(norm.name), drift) for norm in norms]
    told = {
        "framework": manifest.framework,
        "source": manifest.source,
        "calibrated": drift.calibrated,
        "layers": layers,
        "measured": drift.measured,
        "gates": told_of(gates),
    }
    return sections, _tiles(recipe, norms, drift), told


def gates_section(gates: Gates) -> Section:
    """Return the gates of every layer, as bars."""
    rows: list[list[Cell]] = [
        [name, *(shares([(*what, float(v)) for what, v in zip(GATES, each, strict=False)]) for each in pair)]
        for name, pair in gates.items()
    ]
    table = Table(
        "How much each layer takes of the statistics of an instance, of a layer and of the batch",
        ["layer", "of the mean", "of the variance"],
        rows,
        legend=[(colour, name) for name, colour in GATES],
    )
    return Section("Gates by layer", [table])


def told_of(gates: Gates) -> dict[str, Any]:
    """Return gates as plain data."""
    return {name: {"mean": mean.tolist(), "variance": var.tolist()} for name, (mean, var) in gates.items()}


def _facts(manifest: Manifest, recipe: Recipe) -> Facts:
    equalized = [choice for choice in recipe.choices if choice.front]
    calibrated = "with unlabelled images" if manifest.drift.calibrated else "by algebra, without data"
    shown = manifest.preprocessing
    return Facts(
        {
            "source": manifest.source or "not told: a fresh model has to be given to load it",
            "framework": {"torch": "PyTorch", "keras": "Keras"}[manifest.framework],
            "made by": f"normswap {manifest.normswap}",
            "replaced": recipe.in_words(),
            "carried over": calibrated if recipe.choices else None,
            "equalized": f"the layers in front of {len(equalized)}" if equalized else "no layer in front of a norm",
            "input": None if shown is None else "x".join(map(str, shown.shape)),
            "mean, deviation": None if shown is None else f"{_numbers(shown.mean)}; {_numbers(shown.std)}",
            "original": "in the bundle"
            if any(n.startswith("original.") for n in manifest.sha256)
            else "not in the bundle",
        }
    )


def _numbers(values: Any) -> str:
    return ", ".join(f"{value:g}" for value in values) if isinstance(values, tuple | list) else f"{values:g}"


def _files(directory: Path, manifest: Manifest) -> Details:
    rows = [
        [name, size_of((directory / name).stat().st_size), digest] for name, digest in sorted(manifest.sha256.items())
    ]
    table = Table("Files and their hashes, which are as the manifest has them", ["file", "size", "sha256"], rows,
                  frozenset({"size"}))  # fmt: skip
    return Details("Files", [table])


def size_of(count: int) -> str:
    """Return a number of bytes in words."""
    for unit, least in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= least:
            return f"{count / least:.3g} {unit}"
    return f"{count} bytes"


def _layers(recipe: Recipe, norms: list[Norm], drift: Drifts) -> list[Block]:
    choices = {choice.name: choice for choice in recipe.choices}
    worst = max([*drift.expected.values(), *drift.measured.values()], default=0.0)
    rows = [_row(norm, choices.get(norm.name), drift, worst) for norm in norms]
    columns = ["layer", "expected drift", "measured drift", "becomes", "was", "channels", "map", "in front"]
    blocks: list[Block] = [Table(f"{len(rows)} norms", columns, rows, frozenset({"channels"}))]
    if drift.expected:
        blocks.append(
            Text(
                "Drift is how much of a layer's output the patch changed, as a share of its root mean square, told "
                "when it was made. The expected one follows from the running statistics, each layer by itself and "
                "before any calibration."
            )
        )
    if drift.measured:
        outputs = [f"{name} {value:.3f}" for name, value in drift.measured.items() if name not in choices]
        text = "The measured one is on images, with what the layers before change"
        blocks.append(Text(f"{text}; the model's own: {', '.join(outputs)}." if outputs else f"{text}."))
    return blocks


def _row(norm: Norm, choice: Choice | None, drift: Drifts, worst: float) -> list[Cell]:
    front = {"full": "scaled and shifted", "scale": "scaled"}
    return [
        norm.name,
        *(_drift(each.get(norm.name), worst) for each in (drift.expected, drift.measured)),
        described(choice.target) if choice else KINDS.get(norm.kind or "", "left as it is"),
        norm.source,
        norm.channels,
        None if not norm.spatial else "x".join(map(str, norm.spatial)),
        f"{choice.front} {front[choice.mode or 'scale']}" if choice and choice.front else None,
    ]


def _drift(value: float | None, worst: float) -> Cell:
    return None if value is None else bar(value / worst if worst > 0 else 0.0, f"{value:.3f}")


def _told(norm: Norm, choice: Choice | None, drift: Drifts) -> dict[str, Any]:
    return {
        "name": norm.name,
        "type": norm.source,
        "channels": norm.channels,
        "shape": None if norm.spatial is None else list(norm.spatial),
        "patched_to": norm.kind,
        "becomes": described(choice.target) if choice else None,
        "front": choice.front or None if choice else None,
        "expected": drift.expected.get(norm.name),
        "measured": drift.measured.get(norm.name),
    }


def _tiles(recipe: Recipe, norms: list[Norm], drift: Drifts) -> list[Tile]:
    left = len(norms) - len(recipe.choices)
    tiles = [Tile("norms replaced", str(len(recipe.choices)), f"{left} other" if left else "")]
    if drift.expected:
        name, value = max(drift.expected.items(), key=lambda item: item[1])
        tiles.append(Tile("largest expected drift", f"{value:.3f}", name))
    layers = {norm.name for norm in norms}
    for name, value in _ends(drift.measured, layers).items():
        tiles.append(Tile("drift at the patch", f"{value:.3f}", f"of {name}, measured"))
    return tiles


def _ends(measured: Mapping[str, float], layers: set[str]) -> dict[str, float]:
    """Return the drift of the model's outputs, at most two."""
    return dict([item for item in measured.items() if item[0] not in layers][:2])
