"""The Keras layers as `tests.conformance` wants them, on whichever backend Keras runs."""

import keras
import numpy as np
from keras import ops

from normswap.layers.keras import BatchRenormalization, SwitchNormalization

from ..conformance import EPS, MOMENTUM

CLASSES = {"sn": SwitchNormalization, "brn": BatchRenormalization}
NAMES = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}


def computed(case, axis=-1):
    """Return what the layer of a case computes with its channels along ``axis``."""
    dtype = "mixed_float16" if case.x.dtype == np.float16 else "float32"
    layer = CLASSES[case.kind](axis, 1 - MOMENTUM, EPS, dtype=dtype, **case.options)
    x, dy = (np.ascontiguousarray(np.moveaxis(array, 1, axis)) for array in (case.x, case.dy))
    layer.build(x.shape)
    values = {**case.parameters, **case.statistics}
    for name, value in values.items():
        getattr(layer, NAMES.get(name, name)).assign(value)
    y, dx, gradients = PULLBACKS[keras.backend.backend()](layer, x, dy, case.training)
    found = {"y": np.moveaxis(y, axis, 1), "d x": np.moveaxis(dx, axis, 1)}
    for name in case.parameters:
        found[f"d {name}"] = gradients[NAMES.get(name, name)]
    for name in case.statistics:
        found[name] = ops.convert_to_numpy(getattr(layer, NAMES[name]))
    return found


def _tensorflow(layer, x, dy, training):
    import tensorflow as tf

    x, variables = tf.constant(x), layer.trainable_variables
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x, training=training)
    dx, *gradients = tape.gradient(y, [x, *(v.value for v in variables)], dy)
    return y.numpy(), dx.numpy(), {v.name: g.numpy() for v, g in zip(variables, gradients, strict=True)}


def _torch(layer, x, dy, training):
    import torch

    x = torch.from_numpy(x).requires_grad_()
    y = layer(x, training=training)
    y.backward(torch.from_numpy(dy))
    gradients = {v.name: v.value.grad.numpy() for v in layer.trainable_variables}
    return y.detach().numpy(), x.grad.numpy(), gradients


def _jax(layer, x, dy, training):
    import jax

    variables = layer.trainable_variables
    moved = [v.value for v in layer.non_trainable_variables]

    def call(x, values):
        return layer.stateless_call(values, moved, x, training=training)

    y, pull, moved = jax.vjp(call, x, [v.value for v in variables], has_aux=True)
    dx, gradients = pull(ops.convert_to_tensor(dy))
    for variable, value in zip(layer.non_trainable_variables, moved, strict=True):
        variable.assign(value)
    return np.asarray(y), np.asarray(dx), {v.name: np.asarray(g) for v, g in zip(variables, gradients, strict=True)}


PULLBACKS = {"tensorflow": _tensorflow, "torch": _torch, "jax": _jax}
