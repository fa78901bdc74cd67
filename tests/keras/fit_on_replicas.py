"""Train on one device and on two replicas of a strategy, and print as JSON what came of it."""

import json
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import tensorflow as tf

CPU = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(CPU, [tf.config.LogicalDeviceConfiguration()] * 2)

import normswap  # noqa: E402
from normswap.bundles import bundle  # noqa: E402
from normswap.errors import NormswapError  # noqa: E402
from normswap.finetune.run.run import Settings, finetune  # noqa: E402

from .fitting import PREPROCESSING, fitted, losses, small_net, stripes  # noqa: E402


def main() -> None:
    """Print the losses of each norm on one device and on two, and what is refused on two."""
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    found = {}
    for norm in ("gn", "sn", "brn"):
        found[norm] = []
        for scope in (nullcontext(), strategy.scope()):
            with scope:
                found[norm].append(losses(small_net(norm), steps=6, weight_decay=0.01, gate_lr=3.0))
    with strategy.scope():
        model = small_net("sn")
        found["flag"] = model.get_layer("norm").synchronized
        for name, options in {"uneven": {"batch_size": 15}, "accumulate": {"accumulate": 2}}.items():
            try:
                fitted(model, **options)
            except NormswapError as error:
                found[name] = f"{type(error).__name__}: {error}"
    found["run"] = [run(scope) for scope in (nullcontext(), strategy.scope())]
    json.dump(found, sys.stdout)


def run(scope) -> dict[str, float]:
    """Distil, re-estimate and evaluate a bundle, and return the figures."""
    with scope, tempfile.TemporaryDirectory() as folder:
        original = small_net("bn")
        report = normswap.patch(original, "sn", inplace=False, example=np.zeros((1, 6, 6, 1), np.float32))
        bundle.save(report, Path(folder, "in"), original=original, preprocessing=PREPROCESSING)
        settings = Settings(steps=4, batch_size=16, teacher="original", ema=0.5, reestimate=16, early_stop=False)
        result = finetune(Path(folder, "in"), Path(folder, "out"), stripes(), settings, eval_data=stripes())
        return {"loss": result.loss, "top1": result.evaluation.top1}


if __name__ == "__main__":
    main()
