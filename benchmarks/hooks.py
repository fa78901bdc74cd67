"""What the hooks add to a training step, as ratios to the bare step in one run.

A ResNet-20 for 32x32 images at batch 32, patched to each target, one thread, CPU time, minima of interleaved steps.
"hooks" are all that set something each step: the limits of BRN, gates held and tempered, the NaN stop; "calls" is what
their calls take, by themselves, of a bare step. The blend and distillation, which compute more, are given apart. "run"
is a step of `normswap finetune` with all it keeps account of, but for checkpoints: order of the data, limits, gradient
clipping (which the bare step has too, for this column), metrics.csv, TensorBoard and signals. Keras: ``fit`` on
TensorFlow with the callback and without.

    python benchmarks/hooks.py [--repetitions N] [--json FILE]
"""

import argparse
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import normswap
from normswap.finetune import Blend, Distillation, GateSchedule, Hook, Hooks, RenormLimits, StopAtNaN

BATCH, STEPS, WIDTHS = 32, 10_000, (16, 32, 64)
TARGETS = ("sn", "brn", "gn")


def cheap(model: Any) -> Hooks:
    """Return every hook that sets something each step and computes nothing on the data."""
    gates = GateSchedule(model, STEPS, freeze=STEPS // 2, temperature=(1.0, 0.1))
    return Hooks(RenormLimits(model, STEPS), gates, StopAtNaN())


def interleaved(steps: dict[str, Callable[[], Any]], repetitions: int) -> dict[str, float]:
    """Return the shortest time of each, the runs taking turns."""
    best = dict.fromkeys(steps, float("inf"))
    for _ in range(repetitions):
        for name, step in steps.items():
            begin = time.process_time()
            step()
            best[name] = min(best[name], time.process_time() - begin)
    return best


def share_of_calls(model: Any, step: float) -> float:
    """Return what telling the hooks of a step takes, as a share of the step."""
    hooks, numbers = cheap(model), count()

    def call() -> None:
        number = next(numbers)
        hooks.on_step(number)
        hooks.on_loss(number, 1.0)

    return interleaved({"calls": call}, 300)["calls"] / step


def torch_rows(repetitions: int) -> dict[str, dict[str, float]]:
    """Return for each target how much longer a step takes with what is added to it."""
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn

    torch.set_num_threads(1)

    class Block(nn.Module):
        """Two convolutions, each with its norm, beside a shortcut."""

        def __init__(self, inputs: int, outputs: int, stride: int) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
            self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
            self.stride, self.more = stride, outputs - inputs

        def forward(self, x: Tensor) -> Tensor:
            """Return the block's output."""
            y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
            return F.relu(y + F.pad(x[..., :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more)))

    def network() -> nn.Module:
        blocks = [
            Block(WIDTHS[max(0, stage - (index == 0))], width, 2 if stage and index == 0 else 1)
            for stage, width in enumerate(WIDTHS)
            for index in range(3)
        ]
        stem = nn.Conv2d(3, WIDTHS[0], 3, 1, 1, bias=False), nn.BatchNorm2d(WIDTHS[0]), nn.ReLU()
        return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTHS[-1], 10))

    x, y = torch.randn(BATCH, 3, 32, 32), torch.randint(10, (BATCH,))
    original = network().eval()

    def step_of(target: str, add: str) -> Callable[[], None]:
        model = copy.deepcopy(original)
        normswap.patch(model, target)
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9)
        hook: Hook = Blend(model, original, STEPS) if add == "blend" else cheap(model) if add == "hooks" else Hook()
        features = {"distillation": 0.0, "with features": 0.1}.get(add)
        distillation = None if features is None else Distillation(model, original, features=features).open()
        numbers = count()

        def step() -> None:
            number = next(numbers)
            hook.on_step(number)
            optimizer.zero_grad()
            output = model(x)
            loss = F.cross_entropy(output, y) if distillation is None else distillation(x, output)
            hook.on_loss(number, loss)  # type: ignore[arg-type]
            loss.backward()
            optimizer.step()

        return step

    rows = {}
    for target in TARGETS:
        added = ("bare", "bare again", "hooks", "blend", "distillation", "with features")
        times = interleaved({add: step_of(target, add) for add in added}, repetitions)
        model = copy.deepcopy(original)
        normswap.patch(model, target)
        row = {add: times[add] / times["bare"] for add in added[1:]} | {"ms": 1e3 * times["bare"]}
        row["run"] = run_ratio(target, repetitions)
        rows[f"torch {target}"] = {"calls": share_of_calls(model, times["bare"]), **row}
    return rows


class Clock:
    """The shortest time between two notes of a name, of which the first of its run is not counted."""

    def __init__(self) -> None:
        self.shortest: dict[str, float] = {}
        self._last = ("", 0.0)

    def note(self, name: str) -> None:
        """Note that a step of this name has ended."""
        now, (before, last) = time.process_time(), self._last
        if before == name:
            self.shortest[name] = min(self.shortest.get(name, float("inf")), now - last)
        self._last = name, now


def run_ratio(target: str, repetitions: int) -> float:
    """Return how much longer a step of a run takes than the same step in a bare loop."""
    import torch
    import torch.nn.functional as F

    from normswap.bundles import bundle
    from normswap.bundles.source import load_model
    from normswap.data.dataset import from_arrays
    from normswap.data.preprocessing import preprocessing_of
    from normswap.finetune.run.run import finetune
    from normswap.finetune.run.settings import Settings

    torch.manual_seed(0)
    source = str(Path(__file__).parent.parent / "examples" / "resnet20.py") + ":resnet20"
    model = load_model(source)
    preprocessing = preprocessing_of(model)
    assert preprocessing is not None
    x, y = np.random.default_rng(0).integers(0, 255, (64, 32, 32, 3), np.uint8), np.arange(64) % 10
    data, steps, clock = from_arrays(x, y, preprocessing), 8, Clock()
    report = normswap.patch(model, target)
    optimizer = torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9)
    images, labels = (torch.from_numpy(part) for part in data.batch(range(BATCH)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        bundle.save(report, path / "in", source=source, preprocessing=preprocessing)
        settings = Settings(steps=steps, batch_size=BATCH, checkpoint_every=100)
        for _ in range(max(3, repetitions // 4)):
            finetune(path / "in", path / "out", data, settings, overwrite=True, on_step=lambda *_: clock.note("run"))
            model.train()
            for _ in range(steps):
                optimizer.zero_grad()
                F.cross_entropy(model(images), labels).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                clock.note("bare")
    return clock.shortest["run"] / clock.shortest["bare"]


def keras_run_ratio(model: Any, target: str, repetitions: int) -> float:
    """Return how much longer a step of a run takes than the same step in a bare ``fit``."""
    import keras

    from normswap.bundles import bundle
    from normswap.data.dataset import from_arrays
    from normswap.data.preprocessing import Preprocessing
    from normswap.finetune.run.run import finetune
    from normswap.finetune.run.settings import Settings

    preprocessing = Preprocessing((32, 32, 3), "channels_last")
    x, y = np.random.default_rng(0).integers(0, 255, (64, 32, 32, 3), np.uint8), np.arange(64) % 10
    data, steps, clock = from_arrays(x, y, preprocessing), 8, Clock()
    report = normswap.patch(model, target)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(1e-4, momentum=0.9, global_clipnorm=1.0), loss, jit_compile=False)
    images, labels = data.batch(range(BATCH))
    images, labels = np.concatenate([images] * steps), np.concatenate([labels] * steps)
    told = keras.callbacks.LambdaCallback(on_train_batch_end=lambda *_, **__: clock.note("bare"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        bundle.save(report, path / "in", preprocessing=preprocessing)
        settings = Settings(steps=steps, batch_size=BATCH, checkpoint_every=100)
        for _ in range(max(3, repetitions // 4)):
            finetune(path / "in", path / "out", data, settings, overwrite=True, on_step=lambda *_: clock.note("run"))
            model.fit(images, labels, batch_size=BATCH, shuffle=False, verbose=0, callbacks=[told])
    return clock.shortest["run"] / clock.shortest["bare"]


def keras_rows(repetitions: int) -> dict[str, dict[str, float]]:
    """Return for each target how much longer an epoch of ``fit`` takes with the callback."""
    import keras
    import tensorflow as tf
    from keras import layers

    from normswap.finetune import KerasCallback

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)

    def network() -> Any:
        def norm(x: Any) -> Any:
            return layers.BatchNormalization()(x)

        inputs = keras.Input((32, 32, 3))
        x = layers.ReLU()(norm(layers.Conv2D(WIDTHS[0], 3, padding="same", use_bias=False)(inputs)))
        for stage, width in enumerate(WIDTHS):
            for index in range(3):
                stride = 2 if stage and index == 0 else 1
                y = layers.Conv2D(width, 3, stride, padding="same", use_bias=False)(x)
                y = norm(layers.Conv2D(width, 3, padding="same", use_bias=False)(layers.ReLU()(norm(y))))
                x = layers.Conv2D(width, 1, stride, use_bias=False)(x) if stage and index == 0 else x
                x = layers.ReLU()(layers.Add()([x, y]))
        return keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))

    batches = 5
    x, y = np.zeros((BATCH * batches, 32, 32, 3), np.float32), np.zeros(BATCH * batches, np.int64)

    def epoch_of(target: str, hooked: bool) -> Callable[[], Any]:
        model = network()
        normswap.patch(model, target)
        callbacks = [KerasCallback(cheap(model))] if hooked else []
        callbacks = [_Endless(each) for each in callbacks]
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(1e-4, momentum=0.9), loss, jit_compile=False)
        return lambda: model.fit(x, y, batch_size=BATCH, shuffle=False, verbose=0, callbacks=callbacks)

    class _Endless(keras.callbacks.Callback):  # type: ignore[misc]
        """A callback that is not told of the end of an epoch's ``fit``."""

        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.on_train_batch_begin, self.on_train_batch_end = inner.on_train_batch_begin, inner.on_train_batch_end
            self.set_model = inner.set_model

    rows = {}
    for target in TARGETS:
        epochs = {"bare": epoch_of(target, False), "bare again": epoch_of(target, False)}
        times = interleaved({**epochs, "hooks": epoch_of(target, True)}, max(3, repetitions // 3))
        rows[f"keras {target}"] = {name: times[name] / times["bare"] for name in ("bare again", "hooks")}
        rows[f"keras {target}"]["ms"] = 1e3 * times["bare"] / batches
        model = network()
        normswap.patch(model, target)
        rows[f"keras {target}"]["calls"] = share_of_calls(model, times["bare"] / batches)
        rows[f"keras {target}"]["run"] = keras_run_ratio(network(), target, repetitions)
    return rows


def main() -> None:
    """Measure each framework in a process of its own and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--framework", choices=("torch", "keras"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.framework:
        rows = (torch_rows if options.framework == "torch" else keras_rows)(options.repetitions)
        sys.stdout.write(json.dumps(rows))
        return
    rows = {}
    for framework in ("torch", "keras"):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"}
        command = [sys.executable, __file__, "--framework", framework, "--repetitions", str(options.repetitions)]
        result = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        rows |= json.loads(result.stdout.splitlines()[-1])
    columns = ("bare again", "hooks", "blend", "distillation", "with features", "run")
    table = Table("", "ms a step", "calls, %", *columns, title="Ratio to the bare step")
    for name, row in rows.items():
        ratios = (f"{row[c]:.3f}" if c in row else "" for c in columns)
        table.add_row(name, f"{row['ms']:.1f}", f"{100 * row['calls']:.2f}", *ratios)
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
