"""How an image becomes a model's input."""

from dataclasses import asdict, dataclass
from math import floor, isfinite
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..formats.fields import read
from ..formats.place import Place
from ..frameworks.detect import framework_of, traced_shape
from .images import INTERPOLATIONS, resized

Array = NDArray[Any]


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes a model's input: resized, cropped, scaled to 0..1, then ``(x - mean) / std`` per channel.

    ``shape`` is one sample's shape as the model takes it: (C, H, W) for ``layout="channels_first"``, (H, W, C) for
    ``"channels_last"``. ``mean`` and ``std`` have one value, or one per channel. An image is resized by
    ``interpolation`` until it just covers the input's size over ``crop`` (each side for itself with
    ``crop_mode="squash"``), and its centre is taken, as timm and torchvision do.
    """

    shape: tuple[int, ...]
    layout: Literal["channels_first", "channels_last"]
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    interpolation: str = "bilinear"
    crop: float = 1.0
    crop_mode: Literal["center", "squash"] = "center"

    def __post_init__(self) -> None:
        if len(self.shape) != 3 or any(size < 1 for size in self.shape):
            raise InputError(f"expected an input shape of three sizes for images, received shape={self.shape}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, self.channels):
                count = "1 value" if self.channels == 1 else f"1 or {self.channels} values"
                raise InputError(f"expected {count}, received {name}={values}")
            if not all(map(isfinite, values)):
                raise InputError(f"expected finite values, received {name}={values}")
        if min(self.std) <= 0:
            raise InputError(f"expected positive values, received std={self.std}")
        if self.interpolation not in INTERPOLATIONS:
            raise InputError(
                f"expected one of {', '.join(INTERPOLATIONS)}, received interpolation={self.interpolation}"
            )
        if not 0 < self.crop <= 1:
            raise InputError(f"expected a share above 0 and up to 1, received crop={self.crop}")
        if self.crop_mode not in ("center", "squash"):
            raise InputError(f"expected center or squash, received crop_mode={self.crop_mode}")

    @property
    def channels(self) -> int:
        """Number of colour channels."""
        return self.shape[0] if self.layout == "channels_first" else self.shape[2]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.shape[1:] if self.layout == "channels_first" else self.shape[:2]  # type: ignore[return-value]

    def fit(self, image: Array) -> Array:
        """Return an image (H, W, C) of any size at the model's."""
        (height, width), (high, wide) = self.size, image.shape[:2]
        rows, columns = floor(height / self.crop), floor(width / self.crop)
        if self.crop_mode == "center":
            whole = int if rows == columns else round  # torchvision's way, and timm's where that has none
            if rows * wide >= columns * high:
                columns = whole(rows * wide / high)
            else:
                rows = whole(columns * high / wide)
        top, left = round((rows - height) / 2), round((columns - width) / 2)
        return resized(image, (rows, columns), self.interpolation)[top : top + height, left : left + width]

    def apply(self, images: Array) -> NDArray[np.float32]:
        """Return images (N, H, W, C), uint8 in 0..255 or floating-point in 0..1, as the model's input."""
        scaled = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).astype(np.float32)
        if images.dtype == np.uint8:
            scaled /= 255
        scaled -= np.array(self.mean, np.float32)[:, None, None]  # along the rows: seven times as fast as across
        scaled /= np.array(self.std, np.float32)[:, None, None]
        return scaled if self.layout == "channels_first" else np.ascontiguousarray(scaled.transpose(0, 2, 3, 1))

    def to_dict(self) -> dict[str, Any]:
        """Return the preprocessing as plain data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Any, place: Place = Place()) -> "Preprocessing":  # noqa: B008 - it never changes
        """Return the preprocessing `to_dict` wrote; raises `InputError`, which names the ``place``, for other data."""
        return read(cls, data, place)


def preprocessing_of(
    model: Any,
    *,
    input_shape: tuple[int, ...] | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
) -> Preprocessing | None:
    """Return how images become the model's input, from the arguments or, where they are None, from the model.

    A torch model tells through ``pretrained_cfg`` (timm's convention: ``input_size``, ``mean``, ``std``,
    ``interpolation``, ``crop_pct``, ``crop_mode``) or its traced graph, a Keras model through its input shape. None if
    the input shape is not known or is not that of images.
    """
    keras = framework_of(model) == "keras"
    if keras:
        shape: Any = input_shape or _keras_shape(model)
        config: dict[str, Any] = {}
    else:
        config = dict(getattr(model, "pretrained_cfg", None) or {})
        shape = input_shape or config.get("input_size") or (traced_shape(model) or ())[1:]
    if shape is None or len(shape) != 3 or None in shape:
        return None
    return Preprocessing(
        tuple(int(size) for size in shape),
        "channels_last" if keras else "channels_first",
        tuple(mean or config.get("mean") or (0.0,)),
        tuple(std or config.get("std") or (1.0,)),
        config.get("interpolation") or "bilinear",
        config.get("crop_pct") or 1.0,
        config.get("crop_mode") or "center",
    )


def _keras_shape(model: Any) -> tuple[int, ...] | None:
    shape = getattr(model, "input_shape", None)
    if not isinstance(shape, tuple) or len(shape) < 2 or None in shape[1:]:
        return None
    return shape[1:]
