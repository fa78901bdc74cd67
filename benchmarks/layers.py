"""What a training step and inference of each normalization layer cost, as ratios to native BatchNorm2d in one run.

float32, the minimum of interleaved repetitions, with the allocator told to keep what it has been given back (or page
faults would be measured); "formula" is the layer written with plain operations, as the published implementations
compute it. Saved bytes are those autograd keeps for backward, in units of the input.

    python benchmarks/layers.py [--threads 1 2] [--compile] [--device cuda --dtype bfloat16] [--json FILE]
"""

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from normswap.layers.torch import BatchRenorm2d, SwitchNorm2d

SHAPES = [(16, 64, 56, 56), (2, 256, 56, 56), (32, 512, 14, 14), (8, 64, 32, 32)]


class FormulaSwitchNorm(nn.Module):
    """Section 3 of the SN paper as plain operations on the full tensor."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.mean_weight, self.var_weight = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
        self.register_buffer("running_mean", torch.zeros(1, channels, 1))
        self.register_buffer("running_var", torch.ones(1, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (N, C, H, W)."""
        shape = x.shape
        x = x.view(*shape[:2], -1)
        mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True)
        moment = var + mean**2
        layer_mean = mean.mean(1, keepdim=True)
        layer_var = moment.mean(1, keepdim=True) - layer_mean**2
        if self.training:
            batch_mean = mean.mean(0, keepdim=True)
            batch_var = moment.mean(0, keepdim=True) - batch_mean**2
            with torch.no_grad():
                self.running_mean.mul_(0.9).add_(0.1 * batch_mean)
                self.running_var.mul_(0.9).add_(0.1 * batch_var)
        else:
            batch_mean, batch_var = self.running_mean, self.running_var
        w, v = self.mean_weight.softmax(0), self.var_weight.softmax(0)
        mixed_mean = w[0] * mean + w[1] * layer_mean + w[2] * batch_mean
        mixed_var = v[0] * var + v[1] * layer_var + v[2] * batch_var
        return ((x - mixed_mean) / (mixed_var + 1e-5).sqrt()).view(shape) * self.weight + self.bias


class FormulaBatchRenorm(nn.Module):
    """Algorithm 1 of the BRN paper as plain operations on the full tensor."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (N, C, H, W)."""

        def channel(v: Tensor) -> Tensor:
            return v.view(1, -1, 1, 1)

        sigma, mean = (self.running_var + 1e-5).sqrt(), self.running_mean
        if self.training:
            batch_var, batch_mean = torch.var_mean(x, (0, 2, 3), unbiased=False)
            batch_sigma = (batch_var + 1e-5).sqrt()
            r = (batch_sigma.detach() / sigma).clamp(1 / 3, 3)
            d = ((batch_mean.detach() - mean) / sigma).clamp(-5, 5)
            y = (x - channel(batch_mean)) / channel(batch_sigma) * channel(r) + channel(d)
            with torch.no_grad():
                self.running_mean.lerp_(batch_mean, 0.01)
                self.running_var.lerp_(batch_var, 0.01)
        else:
            y = (x - channel(mean)) / channel(sigma)
        return y * channel(self.weight) + channel(self.bias)


LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "BatchNorm2d": nn.BatchNorm2d,
    "GroupNorm(1)": lambda channels: nn.GroupNorm(1, channels),
    "SwitchNorm2d": SwitchNorm2d,
    "SN formula": FormulaSwitchNorm,
    "BatchRenorm2d": BatchRenorm2d,
    "BRN formula": FormulaBatchRenorm,
}


COMPILED = ("BatchNorm2d", "SwitchNorm2d", "SN formula", "BatchRenorm2d", "BRN formula")
"""What is measured under ``torch.compile`` too."""

REPEATS = 3
"""Steps of one layer in a row: the first one pays for what the layer before it left in the caches."""


def measure(x: Tensor, repetitions: int, *, compiled: bool) -> dict[str, dict[str, float]]:
    """Return for each layer the seconds of forward, step and inference, and the saved bytes over the input's."""
    torch.manual_seed(0)
    dy = torch.randn_like(x)
    layers = {
        name: build(x.shape[1]).to(x.device) for name, build in LAYERS.items() if not compiled or name in COMPILED
    }
    found = {name: dict.fromkeys(("forward", "step", "eval"), float("inf")) for name in layers}
    saved = {name: saved_bytes(layer.train(), x) / x.nbytes for name, layer in layers.items()}
    train, infer = dict(layers), dict(layers)
    if compiled:
        torch.compiler.reset()
        train, infer = ({name: torch.compile(layer) for name, layer in layers.items()} for _ in range(2))
    for _ in range(repetitions):
        for name, layer in layers.items():
            layer.train()
            for _ in range(REPEATS):
                leaf = x.detach().requires_grad_()
                begin = now(x)
                y = train[name](leaf)
                middle = now(x)
                y.backward(dy)
                end = now(x)
                found[name]["forward"] = min(found[name]["forward"], middle - begin)
                found[name]["step"] = min(found[name]["step"], end - begin)
            layer.eval()
            with torch.no_grad():
                for _ in range(REPEATS):
                    begin = now(x)
                    infer[name](x)
                    found[name]["eval"] = min(found[name]["eval"], now(x) - begin)
    for name, row in found.items():
        row["saved"] = saved[name]
    return found


def now(x: Tensor) -> float:
    """Return the time, after what runs on the device of ``x`` has ended."""
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """Return the bytes of distinct tensors autograd keeps for backward."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x.detach().requires_grad_())
    return sum(kept.values())


def keep_memory() -> None:
    """Start the program again with an allocator that keeps memory: else page faults are a large part of each pass.

    Beyond 32 MB glibc takes no threshold for mapped memory, and falls back to 128 KB.
    """
    keep = {"MALLOC_TRIM_THRESHOLD_": "4000000000", "MALLOC_MMAP_THRESHOLD_": str(32 << 20)}
    if not keep.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **keep})


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--compile", action="store_true", help="measure under torch.compile too")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repetitions", type=int, default=25)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    from rich.console import Console
    from rich.table import Table

    keep_memory()
    results: list[dict[str, Any]] = []
    modes = (False, True) if arguments.compile else (False,)
    for threads, compiled in itertools.product(arguments.threads, modes):
        torch.set_num_threads(threads)
        for layout, shape in itertools.product((torch.contiguous_format, torch.channels_last), SHAPES):
            x = torch.randn(shape, dtype=getattr(torch, arguments.dtype), device=arguments.device)
            found = measure(x.contiguous(memory_format=layout), arguments.repetitions, compiled=compiled)
            base = found["BatchNorm2d"]
            setting = {"layout": str(layout).removeprefix("torch."), "threads": threads, "compiled": compiled}
            title = f"{shape}, {', '.join(f'{key} {value}' for key, value in setting.items())}; BatchNorm2d = 1"
            table = Table("layer", "forward", "step", "eval", "saved", title=title, title_justify="left")
            for name, row in found.items():
                ratios = [row[key] / base[key] for key in ("forward", "step", "eval")]
                table.add_row(name, *(f"{ratio:.2f}" for ratio in ratios), f"{row['saved']:.2f}")
                results.append({"shape": shape, **setting, "layer": name, "seconds": row})
            Console(width=100).print(table)
    if arguments.json:
        setting = {"device": arguments.device, "dtype": arguments.dtype}
        arguments.json.write_text(json.dumps({**setting, "results": results}, indent=1))


if __name__ == "__main__":
    main()
