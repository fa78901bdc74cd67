"""What calibration needs of a PyTorch model: its layers, what goes through them, and their parameters."""

from collections import Counter
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ....convert.targets import BatchRenorm
from ....frameworks.names import first_names
from ....frameworks.torch import named_layers, to_numpy
from ....patchers.torch.batch_norm import normalized
from ....patchers.torch.sites import MARK
from ..least_squares import WIDEST, Array


def site_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the replaced layers by name; BatchRenorm computes the original already and is left out."""
    return {
        n: m
        for n, m in first_names(named_layers(model)).items()
        if getattr(m, MARK, BatchRenorm.kind) != BatchRenorm.kind
    }


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the convolutions and linear layers that can be refitted by name.

    Subclasses, grouped and transposed convolutions, frozen and shared weights and biases, and inputs wider than
    `WIDEST` are left out.
    """
    owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    found = {}
    for name, module in first_names(named_layers(model)).items():
        if type(module) is nn.Linear or (type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d) and module.groups == 1):
            weight = module._parameters.get("weight")
            free = all(p.requires_grad and owners[id(p)] == 1 for p in module.parameters(recurse=False))
            if free and weight is not None and weight[0].numel() < WIDEST:
                found[name] = module
    return found


def channels_last(layer: nn.Module, x: Tensor, y: Tensor) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return a call's input and output with the channels last, a linear layer's features as they are.

    What the layer's class adds to a normalization is not in the output.
    """
    axis = -1 if isinstance(layer, nn.Linear) else 1
    return to_numpy(x.movedim(axis, -1)), to_numpy(normalized(layer, x, y).movedim(axis, -1))


def get_affine(layer: nn.Module) -> tuple[Array, Array]:
    """Return the layer's scale and shift in float64."""
    weight, bias = layer.weight, layer.bias
    return weight.detach().cpu().double().numpy(), bias.detach().cpu().double().numpy()  # type: ignore[operator]


def set_affine(layer: nn.Module, gamma: Array, beta: Array) -> None:
    """Give the layer this scale and shift."""
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(gamma))  # type: ignore[operator]
        layer.bias.copy_(torch.from_numpy(beta))  # type: ignore[operator]


def get_weights(layer: nn.Module) -> Array:
    """Return a linear map's weights (K + 1, O) in float64, its bias or zeros as the last row."""
    weight = layer.weight.detach().flatten(1).T  # type: ignore[operator]
    bias = torch.zeros_like(weight[0]) if layer.bias is None else layer.bias.detach()  # type: ignore[operator]
    return torch.cat([weight, bias[None]]).cpu().double().numpy()


def set_weights(layer: nn.Module, weights: Array) -> None:
    """Give the layer these weights, shaped as `get_weights` returns them; one without a bias ignores the last row."""
    inputs = layer.weight[0].numel()  # type: ignore[index]
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weights[:inputs].T).reshape(layer.weight.shape))  # type: ignore[operator, arg-type]
        if layer.bias is not None:
            layer.bias.copy_(torch.from_numpy(weights[inputs]))  # type: ignore[operator]


def patches(layer: nn.Module, sample: NDArray[Any]) -> NDArray[Any]:
    """Return what each output of the layer is a linear map of, (M, K): one sample's windows, and a 1."""
    x = torch.from_numpy(sample)
    if not isinstance(layer, nn.Linear):
        mode = layer.padding_mode
        x = x.movedim(-1, 0)[None]
        x = F.pad(x, layer._reversed_padding_repeated_twice, "constant" if mode == "zeros" else mode)  # type: ignore[arg-type]
        for axis, (size, stride, dilation) in enumerate(
            zip(layer.kernel_size, layer.stride, layer.dilation, strict=True),  # type: ignore[arg-type]
            2,
        ):
            x = x.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
        x = x[0].movedim(0, len(layer.kernel_size))  # type: ignore[arg-type]
        x = x.flatten(len(layer.kernel_size))  # type: ignore[arg-type]
    rows = x.reshape(-1, x.shape[-1]).numpy()
    return np.hstack([rows, np.ones((len(rows), 1), rows.dtype)])
