"""The layers of a PyTorch model, by name."""

from torch import nn

from ....frameworks.torch import named_layers
from ....patchers.torch.sites import MARK


def replaced(model: nn.Module) -> dict[str, nn.Module]:
    """Return the replaced layers, each by the first of its names."""
    found: dict[int, tuple[str, nn.Module]] = {}
    for name, module in named_layers(model):
        if MARK in module.__dict__:
            found.setdefault(id(module), (name, module))
    return dict(found.values())
