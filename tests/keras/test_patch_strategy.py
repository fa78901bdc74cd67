"""A model made under a strategy is patched outside of its scope."""

import subprocess
import sys
from pathlib import Path

CODE = """
import keras, numpy as np
from tests.keras.replicas import two
strategy = two()
from tests.keras.models import functional
from normswap.patchers.keras.patch import patch
from normswap.convert.targets import SwitchNorm
x, y = np.ones((8, 8, 8, 3), "float32"), np.ones((8, 3))
with strategy.scope():
    model = functional()
    model.compile(keras.optimizers.SGD(1e-3, momentum=0.9), "mse")
model.fit(x, y, verbose=0)
patch(model, SwitchNorm(), example=x)
model.fit(x, y, verbose=0)
kinds = {type(v.value).__name__ for v in (*model.trainable_variables, *model.optimizer.variables)}
print(*kinds)
"""


def test_new_variables_are_under_the_models_strategy():
    """After a patch in mid-training fit goes on, every new variable and slot on all replicas as the others are."""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", CODE], cwd=root, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["MirroredVariable"], done.stderr[-2000:]
