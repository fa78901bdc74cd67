"""The wide ResNet for images of some 32 pixels that BatchRenormalization was tried on."""

from collections.abc import Callable
from typing import Any

import keras
from keras import layers

from ..norms import Norm, blocks_of
from .norms import norm_layers


def wide_resnet(
    depth: int = 16, width: int = 4, norm: Norm = "bn", *, classes: int = 10, dropout: float = 0.0
) -> keras.Model:
    """Return a wide ResNet, WRN-``depth``-``width``, for images (N, 32, 32, 3).

    Its layers are made in the order of the published script, so that Keras numbers them as in its weights files.

    Args:
        depth: Number of layers with weights: 6 n + 4 for n blocks in each of the three stages.
        width: How many times 16, 32 and 64 channels the stages have.
        norm: ``"bn"``, ``"sn"``, ``"brn"``, ``"gn"`` (32 groups, or as many of them as divide the channels), ``"ln"``
            (one group), ``"in"`` (a group a channel), each with ε = 1e-5, or a function that returns a layer for a
            number of channels: ``lambda channels: BatchRenormalization(momentum=0.1, epsilon=1e-5)``.
        classes: Number of scores.
        dropout: Share of the values that training drops between a block's convolutions.

    Returns:
        The network, which maps images to scores (N, classes), without the published softmax: train it with a loss
        ``from_logits=True``.

    Raises:
        ValueError: If depth or norm is another.

    Example:
        >>> from normswap.models.keras import wide_resnet
        >>> wide_resnet(16, 1, "brn").output_shape
        (None, 10)

    Source: Zagoruyko and Komodakis, "Wide Residual Networks", section 2; titu1994/BatchRenormalization, whose stages
    begin with a block that is not pre-activated.
    """
    blocks, normalized = blocks_of(depth), _activated(norm_layers(norm, 1e-5))
    image = keras.Input((32, 32, 3), name="image")
    x = normalized(_convolved(image, 16))
    for stage in range(3):
        wide, stride = 16 * 2**stage * width, 2 if stage else 1
        if stage:
            x = normalized(x)
        y = normalized(_convolved(x, wide, stride))
        y = _convolved(y, wide)
        x = layers.Add()([y, _convolved(x, wide, stride, size=1)])
        for _ in range(blocks - 1):
            y = _convolved(normalized(x), wide)
            y = layers.Dropout(dropout)(y) if dropout else y
            x = layers.Add()([x, _convolved(normalized(y), wide)])
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(image, layers.Dense(classes)(x))


def _convolved(x: Any, width: int, stride: int = 1, size: int = 3) -> Any:
    start = keras.initializers.HeNormal()
    return layers.Conv2D(width, size, stride, padding="same", use_bias=False, kernel_initializer=start)(x)


def _activated(norm: Callable[[int], keras.Layer]) -> Callable[[Any], Any]:
    return lambda x: layers.Activation("relu")(norm(x.shape[-1])(x))
