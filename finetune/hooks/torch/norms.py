"""The parameters of a PyTorch model's normalization layers."""

from torch import nn

from ....layers.torch.norm import RunningNorm

_NORMS = (RunningNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)


def norm_parameters(model: nn.Module) -> set[int]:
    """Return the ids of all normalization layers' own parameters.

    The rest can be frozen by them::

        norms = norm_parameters(model)
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in norms)
    """
    return {id(p) for m in model.modules() if isinstance(m, _NORMS) for p in m.parameters(recurse=False)}
