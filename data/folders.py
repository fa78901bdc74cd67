"""A folder of images, with one subfolder per class where labels count."""

import os
import warnings
from pathlib import Path

import numpy as np

from ..errors import InputError, NormswapWarning

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
_SHOWN = 5


class Folder:
    """The images in a folder's subfolders at any depth; the subfolder's name is the class.

    A subfolder without images has its label all the same, so that a part of a data set keeps the labels of the whole.
    With ``labelled=False`` they are all images in the folder at any depth, without classes; their label is 0. What is
    hidden, its name beginning with a dot, is passed over.

    Raises `InputError` if there are no images, or fewer than two class folders where labels count; warns of those
    without any.
    """

    def __init__(self, path: Path, *, labelled: bool = True) -> None:
        self._path = path
        self.classes: list[str] | None = None
        if not labelled:
            self.files = _images(path)
            if not self.files:
                raise InputError(f"expected images in {path}, received none")
            self.labels = np.zeros(len(self.files), np.int64)
            return
        self.classes = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not _hidden(entry.name))
        if len(self.classes) < 2:
            raise InputError(f"expected at least two class folders in {path}, received {len(self.classes)}")
        found = [_images(path / name) for name in self.classes]
        self.files = [file for files in found for file in files]
        self.labels = np.repeat(np.arange(len(found), dtype=np.int64), [len(files) for files in found])
        empty = [name for name, files in zip(self.classes, found, strict=True) if not files]
        if not self.files:
            raise InputError(f"expected images in the class folders of {path}, received none")
        if empty:
            warnings.warn(
                f"expected images in every class folder of {path}, received none in {len(empty)} of "
                f"{len(self.classes)}, which keep their labels: {', '.join(empty[:_SHOWN])}"
                f"{', ...' if len(empty) > _SHOWN else ''}",
                NormswapWarning,
                stacklevel=2,
            )

    def open(self, index: int) -> Path:
        """Return the path of image ``index``."""
        return self.files[index]

    def name(self, index: int) -> str:
        """Return the path of image ``index``."""
        return str(self.files[index])

    def identity(self) -> bytes:
        """Return what tells these files from others: their names and sizes."""
        lines = (f"{file.relative_to(self._path)} {file.stat().st_size}" for file in self.files)
        return os.fsencode("\n".join(lines))  # names need not be text


def _images(path: Path) -> list[Path]:
    found = (file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
    return sorted(file for file in found if not any(map(_hidden, file.relative_to(path).parts)))


def _hidden(name: str) -> bool:
    return name.startswith(".")
