"""Bring the patched model back to, or past, the original: calibration, hooks and training loops.

Importing this package imports no framework: each public name is loaded on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .callbacks.accelerate import AccelerateCallback
    from .callbacks.keras import KerasCallback
    from .callbacks.lightning import LightningCallback
    from .callbacks.transformers import TransformersCallback
    from .hooks.blend import Blend
    from .hooks.distillation import Distillation
    from .hooks.freeze import Freeze
    from .hooks.gate_schedule import GateSchedule
    from .hooks.hook import Hook, Hooks
    from .hooks.momentum import Momentum
    from .hooks.renorm_limits import RenormLimits
    from .hooks.statistics import Statistics, update_statistics
    from .hooks.stop_at_nan import StopAtNaN
    from .hooks.torch.norms import norm_parameters
    from .hooks.torch.param_groups import param_groups
    from .hooks.torch.sync import convert_sync
    from .run.history import History
    from .run.run import finetune
    from .run.settings import Settings

_HOME = {
    "AccelerateCallback": "callbacks.accelerate",
    "Blend": "hooks.blend",
    "Distillation": "hooks.distillation",
    "Freeze": "hooks.freeze",
    "GateSchedule": "hooks.gate_schedule",
    "History": "run.history",
    "Hook": "hooks.hook",
    "Hooks": "hooks.hook",
    "KerasCallback": "callbacks.keras",
    "LightningCallback": "callbacks.lightning",
    "Momentum": "hooks.momentum",
    "RenormLimits": "hooks.renorm_limits",
    "Settings": "run.settings",
    "Statistics": "hooks.statistics",
    "StopAtNaN": "hooks.stop_at_nan",
    "TransformersCallback": "callbacks.transformers",
    "convert_sync": "hooks.torch.sync",
    "finetune": "run.run",
    "norm_parameters": "hooks.torch.norms",
    "param_groups": "hooks.torch.param_groups",
    "update_statistics": "hooks.statistics",
}

__all__ = [
    "AccelerateCallback",
    "Blend",
    "Distillation",
    "Freeze",
    "GateSchedule",
    "History",
    "Hook",
    "Hooks",
    "KerasCallback",
    "LightningCallback",
    "Momentum",
    "RenormLimits",
    "Settings",
    "Statistics",
    "StopAtNaN",
    "TransformersCallback",
    "convert_sync",
    "finetune",
    "norm_parameters",
    "param_groups",
    "update_statistics",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
