"""Labelled images that the `datasets` library loads: from the Hugging Face Hub, or from files it knows."""

import io
import re
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..errors import InputError, MissingDependencyError
from ..sources.hub import bars

FORMS = "hf:NAME, hf:NAME[SPLIT], hf:NAME:CONFIG[SPLIT] or hf:NAME[SPLIT]:COLUMN,COLUMN"
_SPEC = re.compile(r"hf:(?P<name>[^:\[\]]+)(:(?P<config>[^:\[\]]+))?(\[(?P<split>.+)\](:(?P<columns>[^:\[\]]+))?)?")


class HubImages:
    """The image and label columns of one split, found by their types: `Image`, and `ClassLabel` or else integers.

    ``classes`` is None where labels are plain integers. No code that comes with a data set is run.

    Raises `InputError` if the data set cannot be loaded or its columns do not say which they are,
    `MissingDependencyError` if `datasets` is not installed.
    """

    def __init__(self, spec: str) -> None:
        found = _SPEC.fullmatch(spec)
        if found is None:
            raise InputError(f"expected a data set as {FORMS}, received data={spec}")
        data = _load(spec, found["name"], found["config"], found["split"])
        named = found["columns"].split(",") if found["columns"] else []
        image, label = _columns(spec, data.features, named)
        self._spec, self._column = spec, image
        self.classes = getattr(data.features[label], "names", None)
        labels = np.asarray(data.select_columns([label]).with_format("numpy")[:][label])
        if not np.issubdtype(labels.dtype, np.integer) or len(labels) == 0 or labels.min() < 0:
            least = f" from {labels.min()} on" if len(labels) else ""
            raise InputError(
                f"expected non-negative labels in column {label} of data={spec}, received {len(labels)} of "
                f"dtype={labels.dtype}{least}"
            )
        self.labels = labels.astype(np.int64)
        self._rows = data.select_columns([image]).cast_column(image, type(data.features[image])(decode=False))

    def open(self, index: int) -> Path | BinaryIO:
        """Return the bytes of image ``index``, or the path of its file."""
        found = self._row(index)
        if found.get("bytes"):
            return io.BytesIO(found["bytes"])
        if found.get("path"):
            return Path(found["path"])
        raise InputError("no image")

    def name(self, index: int) -> str:
        """Return the path of image ``index``, or its row in the data set that holds it."""
        found = self._row(index)
        return found["path"] if found.get("path") and not found.get("bytes") else f"{self._spec} row {index}"

    def identity(self) -> bytes:
        """Return what tells these images from others: where they come from."""
        return self._spec.encode()

    def _row(self, index: int) -> dict[str, Any]:
        return self._rows[index][self._column] or {}


def _load(spec: str, name: str, config: str | None, split: str | None) -> Any:
    try:
        import datasets
    except ModuleNotFoundError:
        raise MissingDependencyError("hf: data needs datasets: pip install 'normswap[data]'") from None
    try:
        with bars(datasets):
            data = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # of many libraries: the Hub's, fsspec's, pyarrow's
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"expected a data set to load, received data={spec}: {reason}") from None
    if isinstance(data, datasets.Dataset):
        return data
    if len(data) > 1:
        raise InputError(f"expected one of the splits {', '.join(data)}, received data={spec}; add [SPLIT]")
    return next(iter(data.values()))


def _columns(spec: str, features: Any, named: list[str]) -> tuple[str, str]:
    """Return the names of the image and the label column; those ``named`` come before all others."""
    import datasets

    kinds = {
        name: feature.dtype if isinstance(feature, datasets.Value) else type(feature).__name__
        for name, feature in features.items()
    }
    images = _preferred(named, [name for name, kind in kinds.items() if kind == "Image"])
    labels = _preferred(
        named,
        [name for name, kind in kinds.items() if kind == "ClassLabel"],
        [name for name, kind in kinds.items() if re.fullmatch(r"u?int\d+", kind)],
    )
    if len(images) != 1 or len(labels) != 1 or not set(named) <= set(kinds):
        columns = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
        raise InputError(
            f"expected one column of images and one of labels, received data={spec} with {columns}; "
            "name them as in hf:NAME[SPLIT]:COLUMN,COLUMN"
        )
    return images[0], labels[0]


def _preferred(named: list[str], *kinds: list[str]) -> list[str]:
    """Return the first of the lists that has a name in ``named``, reduced to these, or else the first with any."""
    chosen = ([name for name in kind if name in named] for kind in kinds)
    return next((names for names in (*chosen, *kinds) if names), [])
