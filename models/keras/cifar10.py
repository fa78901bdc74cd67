"""The network for CIFAR-10 that keras-switchnorm was tried on."""

import keras
from keras import layers

from ..norms import Norm
from .norms import norm_layers

_CONVOLUTIONS = (1, 1), (1, 1), (2, 2), (2, 1), (4, 2), (4, 1)
"""Width as a multiple of the first one's, and stride of each."""


def cifar10_net(norm: Norm = "bn", *, classes: int = 10, width: int = 64) -> keras.Model:
    """Return six convolutions, each with a norm, and a classifier, for images (N, 32, 32, 3).

    Args:
        norm: ``"bn"``, ``"sn"``, ``"brn"``, ``"gn"`` (32 groups), ``"ln"`` (one group), ``"in"`` (a group a channel),
            each with ε = 1e-3, or a function that returns a layer for a number of channels:
            ``lambda channels: SwitchNormalization(momentum=0.98, compat="keras-switchnorm")``.
        classes: Number of scores.
        width: Channels of the first two convolutions; the following have two and four times as many.

    Returns:
        The network, which maps images to scores (N, classes), without the published softmax: train it with a loss
        ``from_logits=True``.

    Raises:
        ValueError: If norm is another.

    Example:
        >>> from normswap.models.keras import cifar10_net
        >>> cifar10_net("sn").output_shape
        (None, 10)

    Source: titu1994/keras-switchnorm, ``cifar.py``.
    """
    norms = norm_layers(norm, 1e-3)
    model = keras.Sequential([keras.Input((32, 32, 3), name="image")])
    for times, stride in _CONVOLUTIONS:
        start = keras.initializers.HeNormal()
        model.add(layers.Conv2D(times * width, 3, stride, padding="same", kernel_initializer=start))
        model.add(norms(times * width))
        model.add(layers.Activation("relu"))
    model.add(layers.GlobalAveragePooling2D())
    model.add(layers.Dense(classes))
    return model
