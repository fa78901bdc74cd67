"""The layers of a PyTorch model, by name."""

from torch import nn

from ....frameworks.names import first_names
from ....frameworks.torch import named_layers
from ....patchers.torch.sites import MARK


def replaced(model: nn.Module) -> dict[str, nn.Module]:
    """Return the replaced layers, each by the first of its names."""
    return {n: m for n, m in first_names(named_layers(model)).items() if MARK in m.__dict__}
