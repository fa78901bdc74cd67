"""The PyTorch layers compute the formulas."""

import pytest
import torch

from normswap.layers import torch as layers

from ..conformance import CASES, EPS, MOMENTUM, check


def computed(case, dtype=torch.float32):
    """What the layer of a case computes."""
    name = {"sn": "SwitchNorm", "brn": "BatchRenorm"}[case.kind]
    cls = getattr(layers, f"{name}{max(1, case.x.ndim - 2)}d")
    layer = cls(case.x.shape[1], eps=EPS, momentum=MOMENTUM, **case.options).train(case.training)
    with torch.no_grad():
        for tensor, value in {**case.parameters, **case.statistics}.items():
            getattr(layer, tensor).copy_(torch.from_numpy(value))
    x = torch.from_numpy(case.x).requires_grad_()
    y = layer(x)
    y.backward(torch.from_numpy(case.dy))
    gradients = {"x": x.grad, **{name: getattr(layer, name).grad for name in case.parameters}}
    found = {"y": y.detach(), **{name: getattr(layer, name) for name in case.statistics}}
    found |= {f"d {name}": value for name, value in gradients.items()}
    return {name: tensor.numpy() for name, tensor in found.items()}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_conforms(case):
    """Output, running statistics and every gradient are the formula's in float64, to 1e-5."""
    check(case, computed(case))
