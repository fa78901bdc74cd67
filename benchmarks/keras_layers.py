"""What a training step and inference of each Keras layer cost, as ratios to BatchNormalization in one run.

One thread, float32, channels last, the minimum of interleaved repetitions; each backend runs in a process of its
own: TensorFlow with XLA, PyTorch eagerly. A step is forward and backward to the input and every parameter.
"formula" is the layer written with plain operations, as the published implementations compute it.

    python benchmarks/keras_layers.py [--repetitions N] [--json FILE]
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

BACKENDS = ("tensorflow", "torch")
SHAPES = [(8, 32, 32, 64), (4, 56, 56, 64), (16, 14, 14, 256)]
Steps = tuple[Callable[[], Any], Callable[[], Any]]


def layers() -> dict[str, Callable[[], Any]]:
    """Return what makes each layer to measure."""
    import keras
    from keras import ops

    from normswap.layers.keras import BatchRenormalization, SwitchNormalization

    class Formula(keras.Layer):  # type: ignore[misc]
        """Variables of a norm for (N, H, W, C)."""

        def build(self, shape: Any) -> None:
            """Create them."""
            for name, size, value in (("gamma", shape[-1], 1), ("beta", shape[-1], 0), ("w", 3, 1), ("v", 3, 1)):
                initial = keras.initializers.Constant(value)
                setattr(self, name, self.add_weight(shape=(size,), initializer=initial))
            self.mean = self.add_weight(shape=(shape[-1],), initializer="zeros", trainable=False)
            self.variance = self.add_weight(shape=(shape[-1],), initializer="ones", trainable=False)

        def move(self, mean: Any, variance: Any) -> None:
            """Move the moving statistics."""
            self.mean.assign(0.99 * self.mean + 0.01 * ops.reshape(mean, [-1]))
            self.variance.assign(0.99 * self.variance + 0.01 * ops.reshape(variance, [-1]))

    class FormulaSwitchNorm(Formula):
        """Section 3 of the SN paper on the full tensor."""

        def call(self, x: Any, training: bool = False) -> Any:
            """Normalize."""
            mean, variance = ops.mean(x, [1, 2], keepdims=True), ops.var(x, [1, 2], keepdims=True)
            moment = variance + ops.square(mean)
            layer_mean = ops.mean(mean, -1, keepdims=True)
            layer_variance = ops.mean(moment, -1, keepdims=True) - ops.square(layer_mean)
            batch_mean, batch_variance = self.mean, self.variance
            if training:
                batch_mean = ops.mean(mean, 0, keepdims=True)
                batch_variance = ops.mean(moment, 0, keepdims=True) - ops.square(batch_mean)
                self.move(batch_mean, batch_variance)
            w, v = ops.softmax(self.w), ops.softmax(self.v)
            mixed_mean = w[0] * mean + w[1] * layer_mean + w[2] * batch_mean
            mixed_variance = v[0] * variance + v[1] * layer_variance + v[2] * batch_variance
            return (x - mixed_mean) / ops.sqrt(mixed_variance + 1e-3) * self.gamma + self.beta

    class FormulaBatchRenorm(Formula):
        """Algorithm 1 of the BRN paper on the full tensor."""

        def call(self, x: Any, training: bool = False) -> Any:
            """Normalize."""
            sigma = ops.sqrt(self.variance + 1e-3)
            if not training:
                return (x - self.mean) / sigma * self.gamma + self.beta
            mean, variance = ops.mean(x, [0, 1, 2]), ops.var(x, [0, 1, 2])
            batch_sigma = ops.sqrt(variance + 1e-3)
            r = ops.stop_gradient(ops.clip(batch_sigma / sigma, 1 / 3, 3))
            d = ops.stop_gradient(ops.clip((mean - self.mean) / sigma, -5, 5))
            self.move(mean, variance)
            return ((x - mean) / batch_sigma * r + d) * self.gamma + self.beta

    return {
        "BatchNormalization": keras.layers.BatchNormalization,
        "GroupNormalization(1)": lambda: keras.layers.GroupNormalization(1),
        "SwitchNormalization": SwitchNormalization,
        "SN formula": FormulaSwitchNorm,
        "BatchRenormalization": BatchRenormalization,
        "BRN formula": FormulaBatchRenorm,
    }


def tensorflow_steps(layer: Any, shape: tuple[int, ...]) -> Steps:
    """Return a training step and inference, each compiled by XLA."""
    import tensorflow as tf

    x, dy = tf.random.normal(shape), tf.random.normal(shape)
    options = {} if "GroupNorm" in type(layer).__name__ else {"training": True}

    @tf.function(jit_compile=True)
    def step(x: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x, **options)
        return tape.gradient(y, [x, *(v.value for v in layer.trainable_variables)], dy, unconnected_gradients="zero")

    infer = tf.function(layer, jit_compile=True)
    return lambda: step(x)[0].numpy(), lambda: infer(x).numpy()


def torch_steps(layer: Any, shape: tuple[int, ...]) -> Steps:
    """Return a training step and inference, both eager."""
    import torch

    x, dy = torch.randn(shape), torch.randn(shape)
    options = {} if "GroupNorm" in type(layer).__name__ else {"training": True}

    def step() -> None:
        layer(x.detach().requires_grad_(), **options).backward(dy)

    return step, torch.no_grad()(lambda: layer(x))


def limit_threads(backend: str) -> None:
    """Keep the backend to one thread; XLA takes its count from the process's affinity."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    if backend == "torch":
        import torch

        torch.set_num_threads(1)


def measure(backend: str, repetitions: int) -> list[dict[str, Any]]:
    """Return the seconds of a step and of inference of each layer at each shape."""
    limit_threads(backend)
    import keras

    keras.utils.set_random_seed(0)
    prepare = tensorflow_steps if backend == "tensorflow" else torch_steps
    rows = []
    for shape in SHAPES:
        built = {name: make() for name, make in layers().items()}
        for layer in built.values():
            layer.build(shape)
        steps = {name: prepare(layer, shape) for name, layer in built.items()}
        seconds = {name: [float("inf")] * 2 for name in steps}
        for _ in range(repetitions + 1):  # the first of each compiles, and is never the minimum
            for name, calls in steps.items():
                for index, call in enumerate(calls):
                    begin = time.perf_counter()
                    call()
                    seconds[name][index] = min(seconds[name][index], time.perf_counter() - begin)
        for name, (step, infer) in seconds.items():
            rows.append({"backend": backend, "shape": shape, "layer": name, "step": step, "inference": infer})
    return rows


def in_process(backend: str, repetitions: int) -> list[dict[str, Any]]:
    """Return what a process of its own measures for ``backend``."""
    environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, __file__, "--measure", backend, "--repetitions", str(repetitions)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    rows: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print a table for each backend and shape."""
    for (backend, shape), group in groupby(rows, lambda row: (row["backend"], tuple(row["shape"]))):
        base, *others = group
        table = Table(f"{base['layer']} = 1", "step", "inference", title=f"{backend} {shape}")
        for row in (base, *others):
            ratios = (row[key] / base[key] for key in ("step", "inference"))
            table.add_row(row["layer"], *(f"{ratio:.2f}" for ratio in ratios))
        Console(width=100).print(table)


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=12)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", choices=BACKENDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.repetitions)))
        return
    rows = [row for backend in BACKENDS for row in in_process(backend, arguments.repetitions)]
    show(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps({"results": rows}, indent=1))


if __name__ == "__main__":
    main()
