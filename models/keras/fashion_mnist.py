"""The network for Fashion-MNIST that GroupNormalization-keras was tried on."""

import keras
from keras import layers

from ..norms import Norm
from .norms import norm_layers


def fashion_mnist_net(norm: Norm = "bn", *, classes: int = 10) -> keras.Model:
    """Return two convolutions, each with a norm, and two dense layers, for images (N, 28, 28, 1).

    Args:
        norm: ``"bn"``, ``"sn"``, ``"brn"``, ``"gn"`` (8 groups), ``"ln"`` (one group), ``"in"`` (a group a channel),
            each with ε = 1e-6, or a function that returns a layer for a number of channels, such as the notebook's
            ``lambda channels: keras.layers.BatchNormalization()`` with ε = 1e-3.
        classes: Number of scores.

    Returns:
        The network, which maps images to scores (N, classes), without the published softmax: train it with a loss
        ``from_logits=True``.

    Raises:
        ValueError: If norm is another.

    Example:
        >>> from normswap.models.keras import fashion_mnist_net
        >>> fashion_mnist_net("gn").output_shape
        (None, 10)

    Source: shaoanlu/GroupNormalization-keras, ``group_norm_experiments.ipynb``.
    """
    norms = norm_layers(norm, 1e-6, groups=8)
    model = keras.Sequential([keras.Input((28, 28, 1), name="image")])
    for width in (32, 64):
        start = keras.initializers.HeNormal()
        model.add(layers.Conv2D(width, 3, kernel_initializer=start, kernel_regularizer=keras.regularizers.L2(1e-5)))
        model.add(norms(width))
        model.add(layers.Activation("relu"))
    model.add(layers.MaxPooling2D())
    model.add(layers.Dropout(0.25))
    model.add(layers.Flatten())
    model.add(layers.Dense(128, activation="relu", kernel_initializer="he_normal"))
    model.add(layers.Dropout(0.5))
    model.add(layers.Dense(classes))
    return model
