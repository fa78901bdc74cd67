"""Weights of a PyTorch model on disk."""

from pathlib import Path

from torch import nn

from .state_dict import load_state_dict, read_state_dict, write_state_dict


def load_weights(model: nn.Module, path: Path) -> None:
    """Give a module the state dict in ``path``; raises `InputError` if it does not fit."""
    load_state_dict(model, read_state_dict(path), str(path))


def write_weights(model: nn.Module, path: Path) -> None:
    """Write the module's state dict to ``path``, a ``.safetensors`` file."""
    write_state_dict(model, path)
