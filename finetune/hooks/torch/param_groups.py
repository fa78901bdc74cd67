"""What an optimizer is to do with the parameters of a PyTorch model."""

from typing import Any

from torch import nn

from .norms import norm_parameters

_GATES = ("mean_weight", "var_weight")


def param_groups(model: nn.Module, weight_decay: float, *, gate_lr: float | None = None) -> list[dict[str, Any]]:
    """Return optimizer parameter groups: decay on weights alone, none on norms, biases and gates.

    Decay pulls gates to equal shares, and γ to a closed channel. Parameters that do not require gradients are left
    out::

        optimizer = torch.optim.SGD(param_groups(model, 1e-4, gate_lr=0.1), lr=0.01, momentum=0.9)

    Args:
        model: a PyTorch model, which may be compiled or wrapped.
        weight_decay: that of the weights.
        gate_lr: a rate of the gates' own, or None.
    """
    gates = [p for m in model.modules() for name in _GATES if isinstance(p := getattr(m, name, None), nn.Parameter)]
    norms = norm_parameters(model)
    known = {id(p) for p in gates}
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad and id(parameter) not in known:
            spared = id(parameter) in norms or parameter.dim() <= 1
            (plain if spared else decayed).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
        {"params": [p for p in gates if p.requires_grad], "weight_decay": 0.0},
    ]
    if gate_lr is not None:
        groups[-1]["lr"] = gate_lr
    return [group for group in groups if group["params"]]
