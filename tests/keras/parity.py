"""Run under one Keras backend: write what layers and patched models compute to an .npz file.

``python parity.py OUTPUT`` with KERAS_BACKEND set; `test_backends` compares the files.
"""

import sys
import tempfile
from pathlib import Path

import keras
import numpy as np

from normswap.convert.targets import BatchRenorm, GroupNorm, SwitchNorm
from normswap.layers.keras import BatchRenormalization, SwitchNormalization
from normswap.patchers.keras import patch

LAYERS = {
    "sn_moving": lambda: SwitchNormalization(epsilon=1e-5, momentum=0.9),
    "sn_frozen": lambda: SwitchNormalization(epsilon=1e-5, batch_statistics="frozen"),
    "sn_none": lambda: SwitchNormalization(epsilon=1e-5, batch_statistics="none"),
    "brn": lambda: BatchRenormalization(epsilon=1e-5, momentum=0.9, r_max=1.5, d_max=0.5),
}
TARGETS = {"a": SwitchNorm(), "b": BatchRenorm(), "c": GroupNorm(2)}
SHAPES = {"nc": (5, 6), "nhwc": (3, 5, 4, 6)}


def inputs(shape):
    """Return the seeded input of this shape."""
    return np.random.default_rng(len(shape)).normal(2.0, 3.0, shape).astype("float32")


def values(layer):
    """Return a seeded value for each variable but BatchRenormalization's limits."""
    rng = np.random.default_rng(0)
    names = ("gamma", "beta", "mean_weight", "var_weight", "moving_mean", "moving_variance")
    found = [name for name in names if getattr(layer, name, None) is not None]
    return {name: rng.uniform(0.5, 1.5, getattr(layer, name).shape).astype("float32") for name in found}


def numpy(x):
    """Return a tensor or variable as an array."""
    return np.asarray(keras.ops.convert_to_numpy(x))


def run_layers(results):
    """Record each layer's outputs at inference and in training, and the statistics it is left with."""
    for kind, make in LAYERS.items():
        for label, shape in SHAPES.items():
            layer = make()
            layer.build(shape)
            for name, value in values(layer).items():
                getattr(layer, name).assign(value)
            results[f"{kind}/{label}/inference"] = numpy(layer(inputs(shape), training=False))
            results[f"{kind}/{label}/training"] = numpy(layer(inputs(shape), training=True))
            if layer.moving_mean is not None:
                results[f"{kind}/{label}/moving_mean"] = numpy(layer.moving_mean)
                results[f"{kind}/{label}/moving_variance"] = numpy(layer.moving_variance)


def network():
    """Return a small network with seeded weights and three BatchNorms."""
    x = image = keras.Input((8, 8, 3))
    for name in TARGETS:
        x = keras.layers.ReLU()(keras.layers.BatchNormalization(name=name)(keras.layers.Conv2D(4, 3)(x)))
    model = keras.Model(image, keras.layers.Dense(2)(keras.layers.GlobalAveragePooling2D()(x)))
    rng = np.random.default_rng(0)
    model.set_weights([rng.uniform(0.1, 0.5, w.shape).astype("float32") for w in model.get_weights()])
    return model


def patched(model):
    """Patch each BatchNorm to its own target and return the reports."""
    return [patch(model, target, include=[name]) for name, target in TARGETS.items()]


def run_model(results):
    """Record a patched network before and after a training step; check undo in mid-training, and a saved file."""
    x, model = inputs((4, 8, 8, 3)), network()
    model.compile(keras.optimizers.SGD(1e-3, momentum=0.9), "mse")
    model.train_on_batch(x, np.ones((4, 2)))
    before, weights = model.predict(x, verbose=0), model.get_weights()
    for report in reversed(patched(model)):
        report.undo()
    assert all(map(np.array_equal, model.get_weights(), weights))
    assert np.array_equal(model.predict(x, verbose=0), before)
    patched(model)
    results["model/patched"] = model.predict(x, verbose=0)
    model.train_on_batch(x, np.ones((4, 2)))
    results["model/trained"] = trained = model.predict(x, verbose=0)
    assert not np.array_equal(trained, results["model/patched"])
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder, "m.keras"))
        loaded = keras.models.load_model(Path(folder, "m.keras"))
    assert np.array_equal(loaded.predict(x, verbose=0), trained)


if __name__ == "__main__":
    recorded = {"backend": np.array(keras.backend.backend())}
    run_layers(recorded)
    run_model(recorded)
    np.savez(sys.argv[1], **recorded)
