"""Take the BatchNorm out of a trained network without ruining it.

    plan = normswap.plan(model, "gn", example=x)      # what would become of each layer; print(plan) is a table
    report = normswap.patch(model, "gn", example=x)   # in place; report.undo() restores every bit
    normswap.to_onnx(model, "model.onnx", example=x)  # folded, and verified before it gets its name

Importing this package imports no framework: each public name is loaded on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from normswap.bundles.bundle import load, save
    from normswap.bundles.source import load_model
    from normswap.convert.recipe import Recipe, Rule, Rules
    from normswap.convert.targets import BatchNorm, BatchRenorm, GroupNorm, SwitchNorm
    from normswap.data.dataset import open_data
    from normswap.export.onnx import to_onnx
    from normswap.finetune.calibration.calibrate import calibrate
    from normswap.frameworks.example import Inputs
    from normswap.interop.load_weights import load_weights
    from normswap.patchers.patch import patch, plan
    from normswap.patchers.torch.subclasses import register_batch_norm
    from normswap.verification.verify import verify, verify_against

__version__ = "0.1.0"

_HOME = {
    "BatchNorm": "normswap.convert.targets",
    "BatchRenorm": "normswap.convert.targets",
    "GroupNorm": "normswap.convert.targets",
    "Inputs": "normswap.frameworks.example",
    "Recipe": "normswap.convert.recipe",
    "Rule": "normswap.convert.recipe",
    "Rules": "normswap.convert.recipe",
    "SwitchNorm": "normswap.convert.targets",
    "calibrate": "normswap.finetune.calibration.calibrate",
    "load": "normswap.bundles.bundle",
    "load_model": "normswap.bundles.source",
    "load_weights": "normswap.interop.load_weights",
    "open_data": "normswap.data.dataset",
    "patch": "normswap.patchers.patch",
    "plan": "normswap.patchers.patch",
    "register_batch_norm": "normswap.patchers.torch.subclasses",
    "save": "normswap.bundles.bundle",
    "to_onnx": "normswap.export.onnx",
    "verify": "normswap.verification.verify",
    "verify_against": "normswap.verification.verify",
}

__all__ = [
    "BatchNorm",
    "BatchRenorm",
    "GroupNorm",
    "Inputs",
    "Recipe",
    "Rule",
    "Rules",
    "SwitchNorm",
    "__version__",
    "calibrate",
    "load",
    "load_model",
    "load_weights",
    "open_data",
    "patch",
    "plan",
    "register_batch_norm",
    "save",
    "to_onnx",
    "verify",
    "verify_against",
]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'normswap' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
