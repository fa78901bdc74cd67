"""A folder with one subfolder of images per class."""

from pathlib import Path

import numpy as np

from ..errors import InputError

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


class Folder:
    """The images in a folder's subfolders at any depth; the subfolder's name is the class.

    With ``labelled=False`` a folder of images without subfolders does too, all of which get the label 0.

    Raises `InputError` if there are fewer than two classes, or one without images.
    """

    def __init__(self, path: Path, *, labelled: bool = True) -> None:
        self.classes: list[str] | None = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
        if not labelled and len(self.classes) < 2:
            self.files = _images(path)
            if not self.files:
                raise InputError(f"expected images in {path}, received none")
            self.classes, self.labels = None, np.zeros(len(self.files), np.int64)
            return
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


def _images(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
