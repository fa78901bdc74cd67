"""The Keras layers and the patcher compute the same on every backend; the layers also conform there."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

pytestmark = [pytest.mark.keras, pytest.mark.slow]

BACKENDS = [name for name in ("tensorflow", "torch", "jax") if find_spec(name) is not None]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return what each installed backend computed, by backend and quantity."""
    folder = tmp_path_factory.mktemp("parity")
    running = {}
    for backend in BACKENDS:
        environment = {**os.environ, "KERAS_BACKEND": backend, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
        command = [sys.executable, "-m", "tests.keras.parity", str(folder / f"{backend}.npz")]
        running[backend] = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    for process in running.values():
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    return {backend: dict(np.load(folder / f"{backend}.npz")) for backend in BACKENDS}


def test_every_backend_computes_the_same(results):
    """Layers with masked timesteps, patched models, and one training step of both agree to 1e-5."""
    golden = results[BACKENDS[0]]
    for backend in BACKENDS:
        assert str(results[backend]["backend"]) == backend
    for backend in BACKENDS[1:]:
        computed = results[backend].keys() - {"backend"}
        assert computed == {name for name in golden if name != "backend" and not name.startswith("replicas/")}
        for name in computed:
            expected, found = golden[name], results[backend][name]
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5, err_msg=f"{backend}: {name}")


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_patching_holds_on_another_backend(backend):
    """What holds of patched models on TensorFlow holds on this backend too, and no test is skipped."""
    files = sorted(map(str, Path(__file__).parent.glob("test_patch_*.py")))
    environment = {**os.environ, "KERAS_BACKEND": backend, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout.splitlines()[-1]


@pytest.mark.parametrize("layer", ["SwitchNormalization", "BatchRenormalization"])
def test_synchronized_replicas_normalize_as_one(layer, results):
    """With a batch in parts of 5 and 3, outputs, gradients and statistics are those of the whole on one device."""
    if "tensorflow" not in results:
        pytest.skip("replicas are TensorFlow's")
    found = results["tensorflow"]
    one = {name: array for name, array in found.items() if name.startswith(f"replicas/{layer}/one/")}
    assert len(one) >= 6
    for name, array in one.items():
        np.testing.assert_allclose(found[name.replace("/one/", "/two/")], array, rtol=1e-5, atol=1e-5, err_msg=name)
