"""Training under a ``tf.distribute`` strategy: the replicas do together what one device does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = [pytest.mark.keras, pytest.mark.slow]


@pytest.fixture(scope="module")
def found():
    """What came of training on one device and on two replicas."""
    command = [sys.executable, "-m", "tests.keras.fit_on_replicas"]
    environment = {**os.environ, "KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("norm", ["gn", "sn", "brn"])
def test_the_loss_curve_is_that_of_one_device(found, norm):
    """Gradients, their clipping and the batch statistics are those of the whole batch."""
    np.testing.assert_allclose(*found[norm], rtol=1e-5)


def test_a_whole_run(found):
    """Distillation, averages, re-estimated statistics and evaluations come to the same."""
    one, two = found["run"]
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)
    assert one["top1"] == two["top1"]


def test_what_is_refused(found):
    """Batches that cannot be shared evenly, and accumulation; the layers are left as they were."""
    assert found["uneven"] == "InputError: expected batches that 2 replicas share evenly, received one of 15 images"
    assert found["accumulate"] == (
        "UnsupportedError: expected accumulate=1 with 2 replicas, received accumulate=2; raise the batch size instead"
    )
    assert found["flag"] is False
