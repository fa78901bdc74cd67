"""The Keras layers and the patcher compute the same on every backend, and the same as the torch layers."""

import os
import subprocess
import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest

pytestmark = [pytest.mark.keras, pytest.mark.slow]

BACKENDS = [name for name in ("tensorflow", "torch", "jax") if find_spec(name) is not None]
SCRIPT = Path(__file__).with_name("parity.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return what each installed backend computed, by backend and quantity."""
    folder = tmp_path_factory.mktemp("parity")
    running = {}
    for backend in BACKENDS:
        environment = {**os.environ, "KERAS_BACKEND": backend, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
        command = [sys.executable, str(SCRIPT), str(folder / f"{backend}.npz")]
        running[backend] = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    for process in running.values():
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    return {backend: dict(np.load(folder / f"{backend}.npz")) for backend in BACKENDS}


@pytest.fixture(scope="module")
def parity():
    """Return the script's module, for its inputs and values."""
    spec = spec_from_file_location("parity", SCRIPT)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_backends_agree(results):
    """Layers, also masked and far from 0, patched models, and one training step of both agree to 1e-5."""
    golden = results[BACKENDS[0]]
    for backend in BACKENDS:
        assert str(results[backend]["backend"]) == backend
    for backend in BACKENDS[1:]:
        computed = results[backend].keys() - {"backend"}
        assert computed == {name for name in golden if name != "backend" and not name.startswith("replicas/")}
        for name in computed:
            expected, found = golden[name], results[backend][name]
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5, err_msg=f"{backend}: {name}")


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


@pytest.mark.parametrize("kind", ["sn_moving", "sn_frozen", "sn_none", "brn"])
@pytest.mark.parametrize("label", ["nc", "nhwc"])
def test_keras_agrees_with_torch(kind, label, results, parity):
    """A Keras layer and its PyTorch twin compute the same output and the same running statistics."""
    torch = pytest.importorskip("torch")
    from normswap.layers import torch as twins

    golden, shape = results[BACKENDS[0]], parity.SHAPES[label]
    size = 2 if label == "nhwc" else 1
    if kind == "brn":
        twin = getattr(twins, f"BatchRenorm{size}d")(6, momentum=0.1, r_max=1.5, d_max=0.5)
    else:
        statistics = kind.removeprefix("sn_")
        twin = getattr(twins, f"SwitchNorm{size}d")(6, momentum=0.1, batch_statistics=statistics)
    ours = parity.LAYERS[kind]()
    ours.build(shape)
    names = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}
    with torch.no_grad():
        for name, value in parity.values(ours).items():
            getattr(twin, names.get(name, name)).copy_(torch.from_numpy(value))
        x = torch.from_numpy(np.moveaxis(parity.inputs(shape), -1, 1).copy())
        computed = {"inference": twin.eval()(x), "training": twin.train()(x)}
    found = {name: np.moveaxis(y.numpy(), 1, -1) for name, y in computed.items()}
    if kind != "sn_none":
        found |= {"moving_mean": twin.running_mean.numpy(), "moving_variance": twin.running_var.numpy()}
    for name, array in found.items():
        np.testing.assert_allclose(array, golden[f"{kind}/{label}/{name}"], rtol=1e-5, atol=1e-5, err_msg=name)
