"""Keras's own GroupNormalization by the arguments of GroupNormalization-keras."""

from typing import Any

import keras

_AXES = {"channels_first": 1, "channels_last": -1}


def group_normalization(
    axis: int = -1,
    gamma_init: Any = "ones",
    beta_init: Any = "zeros",
    gamma_regularizer: Any = None,
    beta_regularizer: Any = None,
    epsilon: float = 1e-6,
    group: int = 32,
    data_format: str | None = None,
    **kwargs: Any,
) -> keras.layers.GroupNormalization:
    """Return the layer that GroupNormalization-keras makes of these arguments, as `keras.layers.GroupNormalization`.

    Args:
        axis: Axis of the channels; its layer went by ``data_format`` alone.
        gamma_init: Initializer of γ, of shape (C,).
        beta_init: Initializer of β, of shape (C,).
        gamma_regularizer: Penalty on γ.
        beta_regularizer: Penalty on β.
        epsilon: Added to each group's variance.
        group: Number of groups, which has to divide the channels. Theirs mixed samples where it did not.
        data_format: ``"channels_first"`` or ``"channels_last"``, in place of ``axis``.
        kwargs: Those of every layer.

    Returns:
        A layer for input of any rank from 2 on, which Keras saves and loads by itself.

    Raises:
        ValueError: If the data format is another.

    Example:
        >>> from normswap.layers.keras import group_normalization
        >>> group_normalization(group=8).groups
        8

    Source: shaoanlu/GroupNormalization-keras.
    """
    if data_format not in (None, *_AXES):
        raise ValueError(f"expected `data_format` out of {', '.join(_AXES)}, received data_format={data_format!r}")
    return keras.layers.GroupNormalization(
        group,
        axis if data_format is None else _AXES[data_format],
        epsilon,
        gamma_initializer=gamma_init,
        beta_initializer=beta_init,
        gamma_regularizer=gamma_regularizer,
        beta_regularizer=beta_regularizer,
        **kwargs,
    )
