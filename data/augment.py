"""Random changes of training images that leave their class what it is."""

from collections.abc import Sequence
from math import exp, log, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from .images import Box

Array = NDArray[Any]

POLICIES = ("resized-crop", "crop", "flip")
"""In the order in which they are applied."""

SHARES = (0.08, 1.0)
RATIOS = (3 / 4, 4 / 3)
"""Area and aspect ratio of a random crop, as torchvision, timm and Hugging Face's examples draw them by default."""

PADDING = 1 / 8
"""How far a crop may reach over each border, of height and width: He et al.'s (2015) 4 pixels of CIFAR's 32."""

_TRIES = 10
_STREAM = 1  # beside the streams that seed and step alone give


def policies(text: str) -> tuple[str, ...]:
    """Return the policies in ``"none"`` or a list like ``"crop,flip"``; raises `InputError` if there is no such."""
    names = text.split(",") if isinstance(text, str) else [str(text)]
    names = [] if names == ["none"] else names
    if not set(names) <= set(POLICIES) or len(set(names)) < len(names) or {"crop", "resized-crop"} <= set(names):
        raise InputError(
            f"expected `none`, or `flip` and one of `crop` and `resized-crop` joined by commas, received augment={text}"
        )
    return tuple(names)


def generator(seed: int, step: int, index: int) -> np.random.Generator:
    """Return the random numbers for image ``index`` at a step, whichever process it falls to."""
    return np.random.default_rng([seed, step, index, _STREAM])


def random_box(image: Array, random: np.random.Generator) -> Box | None:
    """Return a box of random area, shape and place (Szegedy et al. 2015, section 6), None if ten tries do not fit."""
    height, width = image.shape[:2]
    for _ in range(_TRIES):
        area = height * width * random.uniform(*SHARES)
        ratio = exp(random.uniform(log(RATIOS[0]), log(RATIOS[1])))
        rows, columns = round(sqrt(area / ratio)), round(sqrt(area * ratio))
        if 0 < rows <= height and 0 < columns <= width:
            top, left = int(random.integers(height - rows + 1)), int(random.integers(width - columns + 1))
            return left, top, left + columns, top + rows
    return None


def changed(image: Array, chosen: Sequence[str], random: np.random.Generator) -> Array:
    """Return ``image`` (H, W, C) shifted into black borders by ``"crop"``, and mirrored half the time by ``"flip"``."""
    if "crop" in chosen:
        rows, columns = (_shift(size, random) for size in image.shape[:2])
        shifted = np.zeros_like(image)
        shifted[rows[0], columns[0]] = image[rows[1], columns[1]]
        image = shifted
    if "flip" in chosen and random.random() < 0.5:
        image = image[:, ::-1]
    return image


def _shift(size: int, random: np.random.Generator) -> tuple[slice, slice]:
    """Return which pixels along an axis are filled after a random shift, and which they are filled with."""
    most = round(size * PADDING)
    by = int(random.integers(-most, most + 1))
    return slice(max(by, 0), size + min(by, 0)), slice(max(-by, 0), size + min(-by, 0))
