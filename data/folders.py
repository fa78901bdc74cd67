"""A folder of images, with one subfolder per class where labels count."""

from pathlib import Path

import numpy as np

from ..errors import InputError

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


class Folder:
    """The images in a folder's subfolders at any depth; the subfolder's name is the class.

    With ``labelled=False`` they are all images in the folder at any depth, without classes; their label is 0. What is
    hidden, its name beginning with a dot, is passed over.

    Raises `InputError` if there are no images, or labelled ones of fewer than two classes or one without any.
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
        self.files = []
        labels: list[int] = []
        for label, name in enumerate(self.classes):
            found = _images(path / name)
            if not found:
                raise InputError(f"expected images in every class folder, received none in {path / name}")
            self.files += found
            labels += [label] * len(found)
        self.labels = np.array(labels, np.int64)

    def open(self, index: int) -> Path:
        """Return the path of image ``index``."""
        return self.files[index]

    def name(self, index: int) -> str:
        """Return the path of image ``index``."""
        return str(self.files[index])

    def identity(self) -> bytes:
        """Return what tells these files from others: their names and sizes."""
        return "\n".join(f"{file.relative_to(self._path)} {file.stat().st_size}" for file in self.files).encode()


def _images(path: Path) -> list[Path]:
    found = (file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
    return sorted(file for file in found if not any(map(_hidden, file.relative_to(path).parts)))


def _hidden(name: str) -> bool:
    return name.startswith(".")
