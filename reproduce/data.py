"""Where the images of the experiments are found."""

import gzip
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..data.dataset import Data, open_data
from ..data.preprocessing import Preprocessing
from ..errors import InputError
from ..sources.outputs import staged

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package ``dataset-fashion-mnist`` installs its four files."""

_FASHION_MNIST_FILES = {"train": "train-{}-idx{}-ubyte.gz", "test": "t10k-{}-idx{}-ubyte.gz"}


def cifar10(spec: str | None, preprocessing: Preprocessing, output: Path) -> tuple[Data, Data]:
    """Open CIFAR-10: a folder with ``train`` and ``test`` of a subfolder a class, or ``hf:NAME`` with such splits."""
    if spec is None:
        raise InputError(
            "expected --data with CIFAR-10, received none; give a folder with train and test, each with a subfolder of "
            "images for each of the ten classes, or hf:uoft-cs/cifar10"
        )
    if spec.startswith("hf:"):
        train, test = (open_data(f"{spec}[{split}]", preprocessing) for split in ("train", "test"))
    else:
        folder = Path(spec)
        for name in ("train", "test"):
            if not (folder / name).is_dir():
                raise InputError(
                    f"expected CIFAR-10 in {folder}, as folders train and test, received no folder {folder / name}"
                )
        train, test = (open_data(str(folder / name), preprocessing) for name in ("train", "test"))
    return train, test


def fashion_mnist(spec: str | None, preprocessing: Preprocessing, output: Path) -> tuple[Data, Data]:
    """Open Fashion-MNIST in a folder with its four ``.gz`` files, of which ``output`` keeps arrays in its ``data``."""
    folder = FASHION_MNIST if spec is None else Path(spec)
    kept = {name: output / "data" / f"{name}.npz" for name in _FASHION_MNIST_FILES}
    if not all(path.is_file() for path in kept.values()):
        found = {
            name: [_idx(folder / pattern.format(what, rank)) for what, rank in (("images", 3), ("labels", 1))]
            for name, pattern in _FASHION_MNIST_FILES.items()
        }
        (output / "data").mkdir(parents=True, exist_ok=True)
        for name, (images, labels) in found.items():
            with staged(kept[name], overwrite=True) as temporary, temporary.open("wb") as file:
                np.savez(file, x=images, y=labels.astype(np.int64))
    train, test = (open_data(str(path), preprocessing) for path in kept.values())
    return train, test


def _idx(path: Path) -> NDArray[np.uint8]:
    """Return the array of bytes in a file of LeCun's IDX format."""
    if not path.is_file():
        raise InputError(
            f"expected Fashion-MNIST in {path.parent}, received no file {path.name} there; install Debian's package "
            "dataset-fashion-mnist, or give --data with the folder of its four .gz files"
        )
    try:
        content = gzip.decompress(path.read_bytes())
        rank = content[3]
        shape = tuple(int(size) for size in np.frombuffer(content, ">u4", rank, 4))
        if content[:3] != b"\x00\x00\x08":
            raise ValueError("it does not begin as one of bytes does")
        return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise InputError(f"expected an IDX file of bytes at {path}, received one that is damaged: {error}") from None
