"""What a training step and inference of each normalization layer cost, as ratios to native BatchNorm2d in one run.

One thread, float32, the minimum of interleaved repetitions; "formula" is the layer written with plain operations, as
the published implementations compute it. Saved bytes are those autograd keeps for backward, in units of the input.

    python benchmarks/layers.py [--threads N] [--json FILE]
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
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


def measure(shape: tuple[int, ...], layout: torch.memory_format, repetitions: int) -> dict[str, dict[str, float]]:
    """Return for each layer the seconds of forward, step and inference, and the saved bytes over the input's."""
    torch.manual_seed(0)
    x = torch.randn(shape).contiguous(memory_format=layout)
    dy = torch.randn(shape).contiguous(memory_format=layout)
    layers = {name: build(shape[1]) for name, build in LAYERS.items()}
    found = {name: dict.fromkeys(("forward", "step", "eval"), float("inf")) for name in layers}
    for _ in range(repetitions):
        for name, layer in layers.items():
            leaf = x.detach().requires_grad_()
            layer.train()
            begin = time.perf_counter()
            y = layer(leaf)
            middle = time.perf_counter()
            y.backward(dy)
            end = time.perf_counter()
            layer.eval()
            with torch.no_grad():
                start = time.perf_counter()
                layer(x)
                stop = time.perf_counter()
            for key, value in (("forward", middle - begin), ("step", end - begin), ("eval", stop - start)):
                found[name][key] = min(found[name][key], value)
    for name, layer in layers.items():
        found[name]["saved"] = saved_bytes(layer.train(), x) / x.nbytes
    return found


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """Return the bytes of distinct tensors autograd keeps for backward."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x.detach().requires_grad_())
    return sum(kept.values())


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=25)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results: list[dict[str, Any]] = []
    for layout in (torch.contiguous_format, torch.channels_last):
        for shape in SHAPES:
            found = measure(shape, layout, arguments.repetitions)
            base = found["BatchNorm2d"]
            table = Table("layer", "forward", "step", "eval", "saved", title=f"{shape} {layout}, BatchNorm2d = 1")
            for name, row in found.items():
                ratios = [row[key] / base[key] for key in ("forward", "step", "eval")]
                table.add_row(name, *(f"{ratio:.2f}" for ratio in ratios), f"{row['saved']:.2f}")
                results.append({"shape": shape, "layout": str(layout), "layer": name, "seconds": row})
            Console(width=100).print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps({"threads": arguments.threads, "results": results}, indent=1))


if __name__ == "__main__":
    main()
