"""Labelled images as a model takes them, out of folders, arrays and what the `datasets` library loads."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError, named
from ..sources.archives import is_archive, require_honest
from ..sources.files import require_file
from ..sources.memory import require_memory
from ..sources.named_arrays import read_array
from .augment import changed, generator, policies, random_box
from .folders import Folder
from .hub import HubImages
from .images import Decoded, resized
from .preprocessing import Preprocessing

Array = NDArray[Any]

CACHE_BYTES = 1 << 29

_ROUNDING = 1e-3  # the step of float16 at 1


class _Images(Protocol):
    labels: NDArray[np.int64]

    def read(self, index: int) -> Array: ...

    def check(self) -> None: ...

    def identity(self) -> bytes: ...


class Data:
    """Images and labels, read batch by batch in a model's own layout.

    ``classes`` names the labels, or is None where they are plain integers; ``name`` is what the data are known by.
    """

    what = "images"

    def __init__(
        self, images: _Images, preprocessing: Preprocessing, classes: Sequence[str] | None = None, name: str = ""
    ) -> None:
        self._images, self.preprocessing, self.name = images, preprocessing, name
        self.classes = None if classes is None else list(classes)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def labels(self) -> NDArray[np.int64]:
        """The label of every image (N,)."""
        return self._images.labels

    def batch(
        self,
        indices: Sequence[int] | NDArray[np.int64],
        draw: tuple[int, int] | None = None,
        augment: str = "none",
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return the preprocessed images and the labels at ``indices``.

        With ``draw``, a seed and a step, each image is changed as ``augment`` says (see `sources.augment`), by random
        numbers that depend on these two and its index alone.

        Raises `UsageError` for more of them than memory holds.
        """
        chosen, shape = [int(index) for index in indices], self.preprocessing.shape
        told = f"a batch of {len(chosen)} images of shape {','.join(map(str, shape))}"
        require_memory(np.dtype(np.float32).itemsize * len(chosen) * prod(shape), told)
        images = [self._images.read(index) for index in chosen]
        names = policies(augment)
        if draw is None or not names:
            images = [self.preprocessing.fit(image) for image in images]
        else:
            randoms = (generator(*draw, index) for index in chosen)
            images = [self._augmented(*pair, names) for pair in zip(images, randoms, strict=True)]
        return self.preprocessing.apply(np.stack(images)), self.labels[chosen]

    def check(self) -> None:
        """Raise `InputError`, naming the files, if images cannot be read."""
        self._images.check()

    def identity(self) -> str:
        """Return a hash that tells these images and labels, and how they are read, from others."""
        digest = hashlib.sha256(json.dumps([self.classes, self.preprocessing.to_dict()]).encode())
        digest.update(self.labels.tobytes())
        digest.update(self._images.identity())
        return digest.hexdigest()

    def batches(self, size: int, indices: Sequence[int] | NDArray[np.int64] | None = None) -> "Batches":
        """Return what is at ``indices``, without them everything in order, in batches of ``size``."""
        return Batches(self, range(len(self)) if indices is None else indices, size)

    def sample(self, count: int, seed: int = 0) -> NDArray[np.int64]:
        """Return the indices of ``count`` images drawn without replacement."""
        return np.random.default_rng(seed).permutation(len(self))[:count]

    def part(self, indices: Sequence[int] | NDArray[np.int64]) -> "Data":
        """Return the images at ``indices`` as data of their own."""
        return Data(_Part(self._images, np.asarray(indices)), self.preprocessing, self.classes)

    def _augmented(self, image: Array, random: np.random.Generator, names: Sequence[str]) -> Array:
        known = self.preprocessing
        box = random_box(image, random) if "resized-crop" in names else None
        image = known.fit(image) if box is None else resized(image, known.size, known.interpolation, box)
        return changed(image, names, random)


class _Part:
    """Some of the images of a source."""

    def __init__(self, images: _Images, indices: NDArray[np.int64]) -> None:
        self.images, self.indices, self.labels = images, indices, images.labels[indices]

    def read(self, index: int) -> Array:
        return self.images.read(int(self.indices[index]))

    def check(self) -> None:
        self.images.check()

    def identity(self) -> bytes:
        return self.images.identity() + self.indices.tobytes()


@dataclass(frozen=True)
class Batches:
    """Images and labels at ``indices`` in batches, read anew each time they are iterated over."""

    data: Data
    indices: Sequence[int] | NDArray[np.int64]
    size: int

    def __iter__(self) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int64]]]:
        for start in range(0, len(self.indices), self.size):
            yield self.data.batch(self.indices[start : start + self.size])


def open_data(
    spec: str, preprocessing: Preprocessing, *, labelled: bool = True, cache_bytes: int = CACHE_BYTES
) -> Data:
    """Open a folder with one subfolder of images per class, an ``.npz`` with arrays ``x`` and ``y``, or a data set.

    Args:
        spec: The folder; the file, whose ``x`` is (N, H, W) or (N, H, W, C), uint8 in 0..255 or floating-point in 0..1,
            and whose ``y`` is (N,) of integers; or ``hf:NAME[:CONFIG][SPLIT]``, anything `datasets.load_dataset` takes
            without running code.
        preprocessing: How an image becomes a model's input: its shape and layout, mean and standard deviation.
        labelled: False takes any folder of images, and an ``.npz`` without ``y``; labels are 0 then.
        cache_bytes: Bytes of decoded files that are kept in memory.

    Returns:
        `Data`, of which ``batch(indices)`` and ``batches(size)`` give images as the model takes them, and labels.

    Raises:
        InputError: If the data is empty, malformed or does not fit the preprocessing.

    Example:
        >>> import normswap, numpy as np
        >>> from normswap.data.preprocessing import Preprocessing
        >>> np.savez("data.npz", x=np.zeros((4, 8, 8, 3), np.uint8), y=np.arange(4))
        >>> data = normswap.open_data("data.npz", Preprocessing((3, 8, 8), "channels_first", mean=(0.5,), std=(0.2,)))
        >>> images, labels = data.batch([0, 3])
        >>> images.shape, labels
        ((2, 3, 8, 8), array([0, 3]))
    """
    path = Path(spec)
    if path.suffix == ".npz":
        arrays = _read_npz(path, labelled=labelled)
        try:
            data = from_arrays(*arrays, preprocessing)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        data.name = spec
        return data
    if spec.startswith("hf:"):
        files: Folder | HubImages = HubImages(spec)
    elif spec and path.is_dir():
        files = Folder(path, labelled=labelled)
    elif spec == "random":
        raise InputError("expected labelled images, received data=random, which serves `verify` alone")
    else:
        raise InputError(f"expected a folder of class folders, an .npz file or hf:NAME[SPLIT], received data={spec}")
    images = Decoded(files, preprocessing.channels, cache_bytes)
    return Data(images, preprocessing, files.classes, spec)


def from_arrays(images: Array, labels: Array, preprocessing: Preprocessing) -> Data:
    """Return images (N, H, W) or (N, H, W, C), uint8 or floating-point in 0..1, with integer labels (N,), as data.

    They are of the model's size, and are neither resized nor cropped.

    Raises `InputError` if they are empty, not finite, out of range, or do not fit each other or the preprocessing.
    """
    images = images[..., None] if images.ndim == 3 else images
    wanted = (*preprocessing.size, preprocessing.channels)
    if images.ndim != 4 or images.shape[1:] != wanted:
        raise InputError(f"expected `x` of shape (N, {', '.join(map(str, wanted))}), received {images.shape}")
    if len(images) == 0:
        raise InputError("expected at least one image, received `x` without any")
    if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
        raise InputError(f"expected `x` of uint8 or floating-point, received dtype={images.dtype}")
    if not np.isfinite(images).all():
        bad = np.flatnonzero(~np.isfinite(images).all(axis=(1, 2, 3)))
        raise InputError(
            f"expected finite `x`, received NaN or infinity in {len(bad)} of {len(images)} images, first in x[{bad[0]}]"
        )
    low, high = images.min(), images.max()
    if images.dtype != np.uint8 and (low < -_ROUNDING or high > 1 + _ROUNDING):
        raise InputError(
            f"expected floating-point `x` in 0..1, received {low:.4g} to {high:.4g}; divide what is in 0..255 by 255 "
            f"or make it uint8, and leave normalization to {named('mean')} and {named('std')}"
        )
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu":  # a timedelta is an np.integer, too
        raise InputError(
            f"expected `y` of {len(images)} non-negative integers, received shape={labels.shape} "
            f"and dtype={labels.dtype}"
        )
    if labels.min() < 0:
        bad = np.flatnonzero(labels < 0)
        raise InputError(
            f"expected `y` of non-negative integers, received {len(bad)} of {len(labels)} below 0, "
            f"first y[{bad[0]}]={labels[bad[0]]}"
        )
    if labels.max() > np.iinfo(np.int64).max:
        bad = np.flatnonzero(labels > np.iinfo(np.int64).max)
        raise InputError(
            f"expected `y` below 2**63, received {len(bad)} of {len(labels)} that are not, "
            f"first y[{bad[0]}]={labels[bad[0]]}"
        )
    return Data(_Arrays(images, labels.astype(np.int64)), replace(preprocessing, crop=1.0))


class _Arrays:
    def __init__(self, images: Array, labels: NDArray[np.int64]) -> None:
        self.images, self.labels = images, labels

    def read(self, index: int) -> Array:
        image: Array = self.images[index]
        return image

    def check(self) -> None:
        """Whatever could be wrong was, when they became data."""

    def identity(self) -> bytes:
        return hashlib.sha256(np.ascontiguousarray(self.images).data).digest()


def _read_npz(path: Path, *, labelled: bool) -> tuple[Array, Array]:
    require_file(path, "an .npz")
    if not is_archive(path):  # else NumPy takes it for a pickle, and says how to load one
        raise InputError(f"expected an .npz in {path}, received a file of another kind or a truncated one")
    require_honest(path, "an .npz")
    try:
        with np.load(path, allow_pickle=False) as archive:
            images = read_array(archive, "x")
            known = labelled or "y" in archive
            return images, read_array(archive, "y") if known else np.zeros(images.shape[:1], np.int64)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (KeyError, ValueError, OSError, EOFError) as error:
        raise InputError(f"expected arrays `x` and `y` in {path}, received: {error}") from None
    except Exception as error:  # zipfile's own errors are no OSError
        raise InputError(f"expected an .npz in {path}, received a damaged one: {error}") from None
