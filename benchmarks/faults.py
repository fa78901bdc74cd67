"""Whether faults in an ONNX file are found, and correct files pass: by our verifier, and by the criteria of others.

The table injects faults into a ResNet-18 and asks every criterion. The sweep (`fault_sweep`) asks ours of model after
model.

    python benchmarks/faults.py                                 # the table
    python benchmarks/faults.py --models 53 [--results FILE]    # and the sweep; FILE lets it go on where it was left
    python benchmarks/faults.py timm:resnet18 ours:tokens       # the sweep of the models named
"""

import argparse
import copy
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import peers
import torch
from fault_sweep import build_timm, listed, report, sweep
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.onnx.verification import VerificationInfo

import normswap
from normswap.verification.runtime import session


def table() -> Table:
    """Return which criterion finds which fault of a ResNet-18 of each kind, and which fails a correct file."""
    found = Table("fault", "target", "of scale", *CRITERIA, title="x: found faulty, -: passed")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.onnx"
        for target, faults in {"sn": SWITCH_FAULTS, "gn": GROUP_FAULTS, "brn": RENORM_FAULTS}.items():
            model, x = resnet18(target)
            for name, change in faults.items():
                faulty = copy.deepcopy(model)
                with torch.no_grad():
                    change(faulty)
                normswap.to_onnx(faulty, path, example=x, check=False, overwrite=True)
                found.add_row(name, target, *judged(model, path, x))
            normswap.to_onnx(model, path, example=x, check=False, overwrite=True)
            for scale in (1, 10, 100):
                found.add_row(f"none, inputs x{scale}", target, *judged(model, path, scale * x))
        dense = Dense().eval()
        x = torch.randn(2, 3, 64, 64)
        normswap.patch(dense, "sn")
        normswap.to_onnx(dense, path, example=x, check=False, overwrite=True)
        found.add_row("none, 1,048,576 outputs", "sn", *judged(dense, path, x))
    return found


def judged(model: nn.Module, path: Path, x: Tensor) -> list[str]:
    """Return the largest difference relative to scale on ``x``, and what each criterion says of the file."""
    with torch.no_grad():
        expected = model(x)
    runner = session(path, threads=1)
    actual = torch.from_numpy(runner.run(None, {runner.get_inputs()[0].name: x.numpy()})[0])
    apart = float((actual - expected).abs().max() / expected.abs().max())
    say = ("-" if criterion(model, path, expected, actual) else "x" for criterion in CRITERIA.values())
    return [f"{apart:.1e}", *say]


def ours(model: nn.Module, path: Path, expected: Tensor, actual: Tensor) -> bool:
    """Return whether `normswap.verify` passes the file."""
    return bool(normswap.verify(model, path))


def torchs(model: nn.Module, path: Path, expected: Tensor, actual: Tensor) -> bool:
    """Return what `torch.onnx.export(verify=True)` says: its figures, its two bounds."""
    info = VerificationInfo.from_tensors("output", expected, actual)
    return not (info.max_abs_diff >= 5e-3 or info.max_rel_diff >= 1e-1)


def optimums(model: nn.Module, path: Path, expected: Tensor, actual: Tensor) -> bool:
    """Return what optimum says: its default absolute tolerance."""
    return np.allclose(expected, actual, atol=1e-5, rtol=1e-5)


def timms(model: nn.Module, path: Path, expected: Tensor, actual: Tensor) -> bool:
    """Return what timm's export script says."""
    try:
        np.testing.assert_almost_equal(expected.numpy(), actual.numpy(), decimal=3)
    except AssertionError:
        return False
    return True


CRITERIA = {"normswap": ours, "torch": torchs, "optimum": optimums, "timm": timms}


def resnet18(target: str) -> tuple[nn.Module, Tensor]:
    """Return a patched ResNet-18, its Switchable Normalizations with gates as different as training leaves them."""
    subject = build_timm("resnet18")
    model, x = subject.model, torch.from_numpy(subject.draw(np.random.default_rng(0)).args[0])
    normswap.patch(model, target, example=x)
    generator = torch.Generator().manual_seed(1)
    for norm in of_kind(model, "mean_weight"):
        for gates in (norm.mean_weight, norm.var_weight):
            gates.data = torch.randn(3, generator=generator)
    return model, x


class Dense(nn.Sequential):
    """A network with so many outputs that some are near 0."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        first, second = nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(64, 128, 3, padding=1)
        super().__init__(first, nn.BatchNorm2d(64), nn.ReLU(), second, nn.GroupNorm(8, 128))


def of_kind(model: nn.Module, attribute: str) -> list[Any]:
    """Return the norms of a patched model that have an attribute."""
    return [module for module in model.modules() if hasattr(module, "eps") and hasattr(module, attribute)]


def set_eps(norms: Iterable[Any], eps: float) -> None:
    """Set ε of norms."""
    for norm in norms:
        norm.eps = eps


def swap_gates(model: nn.Module) -> None:
    """Swap the gates of mean and variance in every norm."""
    for norm in of_kind(model, "mean_weight"):
        norm.mean_weight.data, norm.var_weight.data = norm.var_weight.data, norm.mean_weight.data


def round_weights(model: nn.Module) -> None:
    """Round every parameter to float16."""
    for parameter in model.parameters():
        parameter.copy_(parameter.half().float())


SWITCH_FAULTS: dict[str, Callable[[Any], Any]] = {
    "ε 1e-5 → 1e-3, all layers": lambda m: set_eps(of_kind(m, "mean_weight"), 1e-3),
    "ε 1e-5 → 1e-3, last layer": lambda m: set_eps(of_kind(m, "mean_weight")[-1:], 1e-3),
    "ε dropped": lambda m: set_eps(of_kind(m, "mean_weight"), 0.0),
    "running variance x0.99, one layer": lambda m: m.layer2[0].bn1.running_var.mul_(0.99),
    "gates of mean and variance swapped": swap_gates,
    "weights rounded to float16": round_weights,
    "a weight NaN": lambda m: m.layer2[0].conv1.weight[0, 0, 0, 0].fill_(float("nan")),
}
GROUP_FAULTS: dict[str, Callable[[Any], Any]] = {
    "ε 1e-5 → 1e-3, last layer": lambda m: set_eps([m.layer4[1].bn2], 1e-3),
    "γ x1.01, one layer": lambda m: m.layer2[0].bn1.weight.mul_(1.01),
    "weight x1.01 before a norm": lambda m: m.layer2[0].conv1.weight.mul_(1.01),
    "a weight NaN": SWITCH_FAULTS["a weight NaN"],
}
RENORM_FAULTS: dict[str, Callable[[Any], Any]] = {
    "running variance x0.99, one layer": SWITCH_FAULTS["running variance x0.99, one layer"],
    "running mean of one channel dropped": lambda m: m.layer2[0].bn1.running_mean[0].zero_(),
    "weights rounded to float16": round_weights,
}


def main() -> None:
    """Print the table, the sweep or both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="timm:NAME or keras:NAME, torch:NAME or ours:NAME of fault_subjects")
    parser.add_argument("--models", type=int, default=0, help="how many of the sweep's own list")
    parser.add_argument("--results", type=Path, help="JSON lines, one for each model")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    peers.make_importable()
    if not arguments.names:
        Console(width=110).print(table())
    names = [*arguments.names, *listed()[: arguments.models]]
    if names:
        report(sweep(names, arguments.results), len(names))


if __name__ == "__main__":
    main()
