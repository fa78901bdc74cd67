"""How much memory each of the GPU's kernels moves, in units of the input, beside the least that could be.

Counted, not computed: Triton's interpreter runs the kernels on the CPU, and every value that a program loads or stores
is counted, also those that a card would find in a cache.

    PYTHONPATH=build/triton python benchmarks/traffic.py [--json FILE]    # after `make build/triton`
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # which Triton reads when it is imported

import torch
from triton.runtime import interpreter

from normswap.layers.torch import BatchRenorm2d, SwitchNorm2d, gpu

LEAST = {"moments": 1, "affine": 2, "products": 2, "combine": 3}
"""What passes over the data have to read and write, in units of the input; the others move arrays of (N, C)."""

SHAPES = [(2, 64, 56, 56), (4, 32, 14, 14), (1, 8, 112, 112)]
LAYOUTS = (torch.contiguous_format, torch.channels_last)
DTYPES = (torch.float32, torch.bfloat16)


class Counter:
    """What was moved since `start`."""

    def __init__(self) -> None:
        self.bytes = 0
        builder = interpreter.InterpreterBuilder
        builder.create_masked_load = self._counted(builder.create_masked_load, mask=0)
        builder.create_masked_store = self._counted(builder.create_masked_store, mask=1)

    def _counted(self, method: Any, mask: int) -> Any:
        def call(builder: Any, pointers: Any, *arguments: Any) -> Any:
            values = int(arguments[mask].data.sum())
            self.bytes += values * pointers.get_element_ty().primitive_bitwidth // 8
            return method(builder, pointers, *arguments)

        return call


def moved(cls: Any, x: torch.Tensor, counter: Counter) -> dict[str, float]:
    """Return what each launch of a step moves, in units of the input."""
    found: dict[str, float] = {}
    launch = gpu._launch

    def counted(kernel: Any, *arguments: Any) -> None:
        before = counter.bytes
        launch(kernel, *arguments)
        found[kernel.fn.__name__] = (counter.bytes - before) / x.nbytes

    gpu._launch = counted
    try:
        y = cls(x.shape[1])(x.requires_grad_())
        y.backward(torch.ones_like(y))
    finally:
        gpu._launch = launch
    return found


def main() -> None:
    """Count, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    gpu._devices = {"cpu"}
    gpu._ready(torch.device("cpu"))
    counter, results = Counter(), []
    for cls in (SwitchNorm2d, BatchRenorm2d):
        for shape in SHAPES:
            for layout in LAYOUTS:
                for dtype in DTYPES:
                    x = torch.randn(shape).to(dtype).contiguous(memory_format=layout)
                    found = moved(cls, x, counter)
                    setting = [str(option).removeprefix("torch.") for option in (layout, dtype)]
                    results.append({"layer": cls.__name__, "shape": shape, "setting": setting, "moved": found})
                    row = ", ".join(f"{name} {share:.3f} ({LEAST.get(name, 0)})" for name, share in found.items())
                    print(f"{cls.__name__} {shape} {' '.join(setting)}: {row}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
