"""Image files as arrays (H, W, C): decoded, resized, and kept in memory while there is room."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from os import SEEK_END
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError, MissingDependencyError

Array = NDArray[Any]
Box = tuple[float, float, float, float]
"""Left, upper, right and lower edge, in pixels of the image it is cut from."""

INTERPOLATIONS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
_CHUNK = 256
_SHOWN = 10


class Files(Protocol):
    """Labelled image files, in folders or elsewhere."""

    labels: NDArray[np.int64]

    def open(self, index: int) -> Path | BinaryIO:
        """Return what Pillow can open."""

    def name(self, index: int) -> str:
        """Return what people find the file by."""

    def identity(self) -> bytes:
        """Return what tells these files from others."""


class Decoded:
    """Image files decoded when asked for; the first ones that fit into ``cache_bytes`` stay decoded.

    Every epoch asks for every image, so that one image is as good to keep as another. A copy sent to another process
    starts with nothing kept.
    """

    def __init__(self, files: Files, channels: int, cache_bytes: int) -> None:
        if channels not in _MODES:
            raise InputError(f"expected 1, 3 or 4 channels to read images, received channels={channels}")
        _pillow()  # or every image would be found unreadable
        self.labels = files.labels
        self._files, self._channels = files, channels
        self._room = self._cache_bytes = cache_bytes
        self._kept: dict[int, Array] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}, "_room": self._cache_bytes}

    def read(self, index: int) -> Array:
        """Return image ``index`` (H, W, C), uint8; raises `InputError` if it cannot be read."""
        try:
            return self._image(index)
        except Exception as error:  # each format's parser has its own
            name = self._files.name(index)
            raise InputError(f"expected an image in {name}, received: {_reason(error)}") from None

    def identity(self) -> bytes:
        """Return what tells these images from others."""
        return self._files.identity()

    def check(self) -> None:
        """Raise `InputError`, which names them, if there are files that cannot be read.

        They are decoded while there is room to keep them. After that only the header is read of a file whose last
        bytes are the end of its format, so that it is not truncated.
        """
        count = len(self.labels)
        with ThreadPoolExecutor() as pool:
            chunks = pool.map(self._unreadable, (range(i, min(i + _CHUNK, count)) for i in range(0, count, _CHUNK)))
            found = [line for lines in chunks for line in lines]
        if found:
            more = [f"  and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
            title = f"expected images that can be read, received {len(found)} of {count} that cannot:"
            raise InputError("\n".join([title, *found[:_SHOWN], *more]))

    def _unreadable(self, indices: Iterable[int]) -> list[str]:
        lines = []
        for index in indices:
            try:
                if self._room:
                    self._image(index)
                    continue
                with _pillow().open(self._opened(index)) as file:
                    _require_bytes(file.mode)
                    if not _is_whole(file):
                        file.load()
            except Exception as error:
                lines.append(f"  {self._files.name(index)}: {_reason(error)}")
        return lines

    def _opened(self, index: int) -> Path | BinaryIO:
        file = self._files.open(index)
        if (
            isinstance(file, Path) and file.exists() and not file.is_file()
        ):  # a pipe would be waited for, a device read without end
            raise ValueError("no regular file")
        return file

    def _image(self, index: int) -> Array:
        image = self._kept.get(index)
        if image is None:
            with _pillow().open(self._opened(index)) as file:
                _require_bytes(file.mode)
                pixels = np.asarray(file.convert(_MODES[self._channels]))
            image = pixels.reshape(*pixels.shape[:2], self._channels)
            if image.nbytes <= self._room:
                self._kept[index] = image
                self._room -= image.nbytes
            else:
                self._room = 0
        return image


def resized(image: Array, size: tuple[int, int], interpolation: str, box: Box | None = None) -> Array:
    """Return ``image`` (H, W, C), or the part of it inside ``box``, resized to ``size`` (height, width).

    uint8 stays uint8; anything else becomes float32 if it changes.
    """
    if image.shape[:2] == size and box is None:
        return image
    pillow = _pillow()
    arguments = size[::-1], pillow.Resampling[interpolation.upper()], box
    if image.dtype == np.uint8 and image.shape[2] == 3:
        return np.asarray(pillow.fromarray(image).resize(*arguments))
    planes = image if image.dtype == np.uint8 else image.astype(np.float32)
    channels = (pillow.fromarray(np.ascontiguousarray(planes[..., c])) for c in range(planes.shape[2]))
    return np.stack([np.asarray(plane.resize(*arguments)) for plane in channels], axis=-1)


def _pillow() -> Any:
    try:
        from PIL import Image
    except ModuleNotFoundError:
        raise MissingDependencyError("reading images needs Pillow: pip install 'normswap[data]'") from None
    return Image


def _require_bytes(mode: str) -> None:
    if mode.startswith(("I", "F")):
        raise InputError(f"pixels of mode={mode}, which would be cut off at 255; convert them to 8 bits")


def _is_whole(file: Any) -> bool:
    """Return whether an opened file is known to end where its format does: others have to be decoded to know."""
    if file.format not in _ENDS:
        return False
    place, end = file.fp.tell(), _ENDS[file.format]
    file.fp.seek(-len(end), SEEK_END)
    found = file.fp.read()
    file.fp.seek(place)
    return bool(found == end)


def _reason(error: Exception) -> str:
    if type(error).__name__ == "UnidentifiedImageError":
        return "no image Pillow knows"  # its own words name the file once more, or an address in memory
    return str(error) or type(error).__name__
