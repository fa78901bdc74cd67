"""A Keras model is exported on the backend it runs on, or says where it can be."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = [pytest.mark.keras, pytest.mark.slow]


def on_backend(backend, folder):
    """Return what `export_on_backend` prints on a backend."""
    environment = {**os.environ, "KERAS_BACKEND": backend, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-m", "tests.keras.export_on_backend", str(folder)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


SMALL = {"names": [["image"], ["scores"]], "transposes": 1, "passed": True}
EXPECTED = {
    "torch": {
        "functional sn": {**SMALL, "norms": [0, 1]},
        "functional gn": {**SMALL, "norms": [0, 1]},
        "functional brn": {**SMALL, "norms": [1, 0]},
        "sequential": {**SMALL, "norms": [0, 1], "transposes": 2},
        "network": {"names": [["input_layer"], ["predictions"]], "norms": [49, 0], "transposes": 1, "passed": True},
    },
    "jax": (
        "expected the tensorflow or the torch backend, received backend='jax'; save the model as .keras and export it "
        "with KERAS_BACKEND=tensorflow"
    ),
}


@pytest.mark.parametrize("backend", [name for name in EXPECTED if find_spec(name) is not None])
def test_torch_exports_and_jax_is_refused(backend, tmp_path):
    """A file made on torch has the model's names, folds what TensorFlow's would, and is proven; JAX is refused."""
    assert on_backend(backend, tmp_path) == EXPECTED[backend]
