"""What layers and patched models compute on one Keras backend, for `test_backends` to compare with the others'."""

import tempfile
from pathlib import Path

import keras
import numpy as np

from normswap.convert.targets import BatchRenorm, GroupNorm, SwitchNorm
from normswap.layers.keras import BatchRenormalization, SwitchNormalization
from normswap.patchers.keras.patch import patch

from ..conformance import CASES, check
from .adapter import computed

LAYERS = {
    "sn_moving": lambda: SwitchNormalization(epsilon=1e-5, momentum=0.9),
    "sn_frozen": lambda: SwitchNormalization(epsilon=1e-5, batch_statistics="frozen"),
    "sn_none": lambda: SwitchNormalization(epsilon=1e-5, batch_statistics="none"),
    "brn": lambda: BatchRenormalization(epsilon=1e-5, momentum=0.9, r_max=1.5, d_max=0.5),
    "sn_cool": lambda: SwitchNormalization(epsilon=1e-5, momentum=0.9, temperature=0.25),
    "sn_hard": lambda: SwitchNormalization(epsilon=1e-5, momentum=0.9, temperature=0.0),
    "brn_paper": lambda: BatchRenormalization(epsilon=1e-5, momentum=0.9, schedule="paper", schedule_steps=4),
    "brn_sigmoid": lambda: BatchRenormalization(epsilon=1e-5, momentum=0.9, compat="titu1994", t_delta=1.0),
}
TARGETS = {"a": SwitchNorm(), "b": BatchRenorm(), "c": GroupNorm(2)}
CONFORMING = ("(N, C)", "2d", "mean far above deviation")
SHAPE = (3, 4, 6)
MASK = np.array([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]], bool)


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


def built(kind, shape):
    """Return a layer with seeded values."""
    layer = LAYERS[kind]()
    layer.build(shape)
    for name, value in values(layer).items():
        getattr(layer, name).assign(value)
    return layer


def run_conformance():
    """Check the layers; on TensorFlow `test_conformance` does, with every input."""
    for case in CASES:
        if case.input in CONFORMING:
            check(case, computed(case))


def run_masked(results):
    """Record training with masked timesteps, step by step along a schedule, and what the layer is left with."""
    for kind in LAYERS:
        layer = built(kind, SHAPE)
        for step in range(3):
            results[f"{kind}/masked/{step}"] = numpy(layer(inputs(SHAPE), training=True, mask=MASK))
        for variable in layer.weights:
            results[f"{kind}/left/{variable.name}"] = numpy(variable)


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
    return [patch(model, target, include=[name], mode=None) for name, target in TARGETS.items()]


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


def recorded():
    """Return all that is recorded on this backend."""
    results = {"backend": np.array(keras.backend.backend())}
    if keras.backend.backend() != "tensorflow":
        run_conformance()
    run_masked(results)
    run_model(results)
    return results
