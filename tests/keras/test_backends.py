"""What holds on TensorFlow, where the other tests run, holds on every Keras backend, and on replicas of a strategy."""

import json
import os
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

pytestmark = pytest.mark.slow

OTHERS = [name for name in ("torch", "jax") if find_spec(name) is not None]
ROOT = Path(__file__).parents[2]
JAX = {
    "JAX_PLATFORMS": "cpu",
    # Its time goes into compiling, much of it the same again.
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


@pytest.fixture(scope="module")
def on(tmp_path_factory):
    """The function that returns the folder in which `on_backend` left what it found on a backend."""

    @cache
    def run(backend):
        folder = tmp_path_factory.mktemp(backend)
        environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3", **JAX}
        environment["JAX_COMPILATION_CACHE_DIR"] = str(folder / "compiled")
        command = [sys.executable, "-m", "tests.keras.on_backend", str(folder)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
        assert done.returncode == 0, done.stderr[-3000:]
        return folder

    return run


@pytest.fixture(scope="module")
def trainings(on):
    """What came of training on one device and on two replicas."""
    return json.loads((on("tensorflow") / "trainings.json").read_text())


@pytest.mark.parametrize("backend", OTHERS)
class TestOthers:
    def test_compute_the_same(self, on, backend):
        """Layers with masked timesteps, patched models, and one training step of both agree to 1e-5."""
        expected, found = (dict(np.load(on(name) / "parity.npz")) for name in ("tensorflow", backend))

        assert [str(expected.pop("backend")), str(found.pop("backend"))] == ["tensorflow", backend]
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-5, err_msg=f"{backend}: {name}")

    @pytest.mark.parametrize(("tests", "least"), [("test_patch_", 100), ("test_fit", 12)])
    def test_pass_the_same_tests(self, on, backend, tests, least):
        """What is marked as holding of patched models, and of trainings, on every backend does, and none is skipped."""
        cases = ElementTree.parse(on(backend) / "tests.xml").iter("testcase")
        chosen = [case for case in cases if case.get("classname").rpartition(".keras.")[2].startswith(tests)]

        assert len(chosen) >= least
        assert [f"{case.get('name')}: {part.tag}\n{part.text}" for case in chosen for part in case] == []


SMALL = {"names": [["image"], ["scores"]], "transposes": 1, "passed": True}
EXPORTS = {
    "torch": {
        "functional sn": {**SMALL, "norms": [0, 1]},
        "functional gn": {**SMALL, "norms": [0, 1]},
        "functional brn": {**SMALL, "norms": [1, 0]},
        "sequential": {**SMALL, "norms": [0, 1], "transposes": 2},
        "network": {"names": [["photo"], ["predictions"]], "norms": [16, 0], "transposes": 1, "passed": True},
    },
    "jax": (
        "expected the tensorflow or the torch backend, received backend='jax'; save the model as .keras and export it "
        "with KERAS_BACKEND=tensorflow"
    ),
}


@pytest.mark.parametrize("backend", OTHERS)
def test_torch_exports_and_jax_is_refused(on, backend):
    """A file made on torch has the model's names, folds what TensorFlow's would, and is proven; JAX is refused."""
    assert json.loads((on(backend) / "exports.json").read_text()) == EXPORTS[backend]


class TestReplicas:
    @pytest.mark.parametrize("layer", ["SwitchNormalization", "BatchRenormalization"])
    def test_synchronized_normalize_as_one(self, on, layer):
        """With a batch in parts of 5 and 3, outputs, gradients and statistics are those of the whole on one device."""
        found = np.load(on("tensorflow") / "replicas.npz")
        one = [name for name in found if name.startswith(f"{layer}/one/")]

        assert len(one) >= 6
        for name in one:
            np.testing.assert_allclose(
                found[name.replace("/one/", "/two/")], found[name], rtol=1e-5, atol=1e-5, err_msg=name
            )

    @pytest.mark.parametrize("norm", ["gn", "sn", "brn"])
    def test_have_the_loss_curve_of_one_device(self, trainings, norm):
        """Gradients, their clipping and the batch statistics are those of the whole batch."""
        np.testing.assert_allclose(*trainings[norm], rtol=1e-5)

    def test_give_a_whole_run(self, trainings):
        """Distillation, averages, re-estimated statistics and evaluations come to the same."""
        one, two = trainings["run"]
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)
        assert one["top1"] == two["top1"]

    def test_refuse_what_they_cannot_share(self, trainings):
        """Batches that cannot be shared evenly, and accumulation; the layers are left as they were."""
        assert trainings["uneven"] == (
            "InputError: expected batches that 2 replicas share evenly, received one of 15 images"
        )
        assert trainings["accumulate"] == (
            "UnsupportedError: expected accumulate=1 with 2 replicas, received accumulate=2; "
            "raise the batch size instead"
        )
        assert trainings["flag"] is False
