"""Whether every architecture of keras.applications can be patched to every target.

Builds each with random weights, patches it to sn, brn and gn in turn, runs it, and undoes the patch. Prints one row an
architecture and what went wrong; exits 1 if anything did.

    python benchmarks/zoo_keras.py [NAME ...]
"""

import gc
import inspect
import math
import sys
from dataclasses import dataclass

import keras
import numpy as np

import normswap

TARGETS = ("sn", "brn", "gn")
SIZE = 96
"""Side of the images: the least that all take is 75."""


@dataclass(frozen=True)
class Row:
    """What was found for one architecture: its BatchNorms, those replaced for each target, and what went wrong."""

    name: str
    batch_norms: int
    replaced: tuple[int, ...]
    failures: tuple[str, ...]


def architectures() -> list[str]:
    """Return the names of the functions in keras.applications that build a model."""
    return [name for name, value in vars(keras.applications).items() if inspect.isfunction(value)]


def sweep(name: str) -> Row:
    """Patch one architecture to each target and back.

    It fails where a BatchNorm is left that the plan did not explain, an output is not finite, BatchRenorm computes
    anything else than the model did, or undo does not give back every bit.
    """
    keras.utils.set_random_seed(0)
    model = getattr(keras.applications, name)(weights=None, input_shape=(SIZE, SIZE, 3), classes=10)
    x = np.random.default_rng(0).normal(size=(2, SIZE, SIZE, 3)).astype("float32")
    found = [layer for layer in model._flatten_layers() if isinstance(layer, keras.layers.BatchNormalization)]
    if not found:
        return Row(name, 0, (), ())
    before, weights = model(x, training=False).numpy(), model.get_weights()
    replaced, failures = [], []
    for target in TARGETS:
        report = normswap.patch(model, target)
        replaced.append(len(report.replaced))
        left = [layer for layer in found if type(layer) is keras.layers.BatchNormalization]
        if len(left) != len(report.skipped) or any(not decision.note for decision in report.skipped):
            failures.append(f"{target}: {len(left)} left")
        after = model(x, training=False).numpy()
        if not np.isfinite(after).all():
            failures.append(f"{target}: not finite")
        if target == "brn" and not np.array_equal(after, before):
            failures.append(f"brn: differs by {np.abs(after - before).max():.1e}")
        report.undo()
        if not all(map(np.array_equal, model.get_weights(), weights)):
            failures.append(f"{target}: undo differs")
    return Row(name, len(found), tuple(replaced), tuple(failures))


def main() -> None:
    """Sweep the named architectures, or all, and print the table."""
    rows = []
    for name in sys.argv[1:] or architectures():
        rows.append(row := sweep(name))
        counts = " ".join(f"{target} {count}" for target, count in zip(TARGETS, row.replaced, strict=False))
        print(f"{row.name:24} {row.batch_norms:4} BatchNorms  {counts}  {'; '.join(row.failures)}", flush=True)
        keras.utils.clear_session()
        gc.collect()
    having = [row for row in rows if row.batch_norms]
    failed = [row for row in having if row.failures]
    total = math.fsum(row.batch_norms for row in having)
    print(f"{len(rows)} architectures, {len(having)} with BatchNorm ({total:.0f} of them), {len(failed)} failed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
