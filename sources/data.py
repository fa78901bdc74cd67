"""Labelled images as a model takes them: folders, arrays, and random inputs for parity checks."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError, MissingDependencyError
from .files import require_file

Array = NDArray[Any]
IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".webp"}


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes a model's input: resized, scaled to 0..1, then ``(x - mean) / std`` per channel.

    ``shape`` is one sample's shape as the model takes it: (C, H, W) for ``layout="channels_first"``, (H, W, C) for
    ``"channels_last"``. ``mean`` and ``std`` have one value, or one per channel.
    """

    shape: tuple[int, ...]
    layout: Literal["channels_first", "channels_last"]
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        if len(self.shape) != 3 or any(size < 1 for size in self.shape):
            raise InputError(f"expected an input shape of three sizes for images, received shape={self.shape}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, self.channels):
                raise InputError(f"expected 1 or {self.channels} values, received {name}={values}")
        if min(self.std) <= 0:
            raise InputError(f"expected positive values, received std={self.std}")

    @property
    def channels(self) -> int:
        """Number of colour channels."""
        return self.shape[0] if self.layout == "channels_first" else self.shape[2]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.shape[1:] if self.layout == "channels_first" else self.shape[:2]  # type: ignore[return-value]

    def apply(self, images: Array) -> NDArray[np.float32]:
        """Return images (N, H, W, C), uint8 in 0..255 or floating-point in 0..1, as the model's input."""
        scaled = images.astype(np.float32) / (255 if images.dtype == np.uint8 else 1)
        scaled = (scaled - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        if self.layout == "channels_first":
            scaled = scaled.transpose(0, 3, 1, 2)
        return np.ascontiguousarray(scaled)

    def to_dict(self) -> dict[str, Any]:
        """Return the preprocessing as plain data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Preprocessing":
        """Return the preprocessing `to_dict` wrote."""
        return cls(tuple(data["shape"]), data["layout"], tuple(data["mean"]), tuple(data["std"]))


class _Images(Protocol):
    labels: NDArray[np.int64]

    def read(self, indices: Sequence[int], preprocessing: Preprocessing) -> Array: ...


class Data:
    """Images and labels, read batch by batch in a model's own layout."""

    def __init__(self, images: _Images, preprocessing: Preprocessing, classes: Sequence[str]) -> None:
        self._images, self.preprocessing, self.classes = images, preprocessing, list(classes)

    def __len__(self) -> int:
        return len(self._images.labels)

    def batch(self, indices: Sequence[int] | NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return the preprocessed images and the labels at ``indices``."""
        chosen = [int(index) for index in indices]
        return self.preprocessing.apply(self._images.read(chosen, self.preprocessing)), self._images.labels[chosen]

    def batches(self, size: int) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int64]]]:
        """Yield everything in order, in batches of ``size``."""
        for start in range(0, len(self), size):
            yield self.batch(range(start, min(start + size, len(self))))

    def sample(self, count: int, seed: int = 0) -> NDArray[np.int64]:
        """Return the indices of ``count`` images drawn without replacement."""
        return np.random.default_rng(seed).permutation(len(self))[:count]


def open_data(spec: str, preprocessing: Preprocessing) -> Data:
    """Open a folder with one subfolder of images per class, or an ``.npz`` with arrays ``x`` and ``y``.

    ``x`` is (N, H, W) or (N, H, W, C), uint8 in 0..255 or floating-point in 0..1; ``y`` is (N,) of integers.

    Raises `InputError` if the data is empty, malformed or does not fit the preprocessing.
    """
    path = Path(spec)
    if path.suffix == ".npz":
        return from_arrays(*_read_npz(path), preprocessing)
    if path.is_dir():
        folder = _Folder(path)
        return Data(folder, preprocessing, folder.classes)
    if spec == "random":
        raise InputError("expected labelled images, received data=random, which serves `verify` alone")
    raise InputError(f"expected a folder of class folders or an .npz file, received data={spec}")


def from_arrays(images: Array, labels: Array, preprocessing: Preprocessing) -> Data:
    """Return images (N, H, W) or (N, H, W, C), uint8 or floating-point in 0..1, with integer labels (N,), as data.

    Raises `InputError` if they are empty or do not fit each other or the preprocessing.
    """
    images = images[..., None] if images.ndim == 3 else images
    wanted = (*preprocessing.size, preprocessing.channels)
    if images.ndim != 4 or images.shape[1:] != wanted or len(images) == 0:
        raise InputError(f"expected `x` of shape (N, {', '.join(map(str, wanted))}), received {images.shape}")
    if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
        raise InputError(f"expected `x` of uint8 or floating-point, received dtype={images.dtype}")
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise InputError(
            f"expected `y` of {len(images)} non-negative integers, received shape={labels.shape} "
            f"and dtype={labels.dtype}"
        )
    classes = [str(label) for label in range(int(labels.max()) + 1)]
    return Data(_Arrays(images, labels.astype(np.int64)), preprocessing, classes)


class _Folder:
    def __init__(self, path: Path) -> None:
        self.classes = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
        self.files: list[Path] = []
        labels: list[int] = []
        for label, name in enumerate(self.classes):
            found = sorted(f for f in (path / name).iterdir() if f.suffix.lower() in IMAGE_SUFFIXES)
            if not found:
                raise InputError(f"expected images in every class folder, received none in {path / name}")
            self.files += found
            labels += [label] * len(found)
        if len(self.classes) < 2:
            raise InputError(f"expected at least two class folders in {path}, received {len(self.classes)}")
        self.labels = np.array(labels, np.int64)

    def read(self, indices: Sequence[int], preprocessing: Preprocessing) -> Array:
        try:
            from PIL import Image, ImageOps
        except ModuleNotFoundError:
            raise MissingDependencyError("reading images needs Pillow: pip install 'normswap[data]'") from None
        height, width = preprocessing.size
        mode = {1: "L", 3: "RGB", 4: "RGBA"}.get(preprocessing.channels)
        if mode is None:
            raise InputError(f"expected 1, 3 or 4 channels to read images, received {preprocessing.channels}")
        images = np.empty((len(indices), height, width, preprocessing.channels), np.uint8)
        for row, index in enumerate(indices):
            try:
                with Image.open(self.files[index]) as file:
                    image = file.convert(mode)
            except OSError as error:
                raise InputError(f"expected an image in {self.files[index]}, received: {error}") from None
            if image.size != (width, height):
                image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
            images[row] = np.asarray(image).reshape(images.shape[1:])
        return images


class _Arrays:
    def __init__(self, images: Array, labels: NDArray[np.int64]) -> None:
        self.images, self.labels = images, labels

    def read(self, indices: Sequence[int], preprocessing: Preprocessing) -> Array:
        return self.images[list(indices)]


def _read_npz(path: Path) -> tuple[Array, Array]:
    require_file(path)
    try:
        with np.load(path, allow_pickle=False) as archive:
            return archive["x"], archive["y"]
    except (KeyError, ValueError, OSError, EOFError) as error:
        raise InputError(f"expected arrays `x` and `y` in {path}, received: {error}") from None
    except Exception as error:  # zipfile's own errors are no OSError
        raise InputError(f"expected an .npz file in {path}, received a damaged one: {error}") from None
