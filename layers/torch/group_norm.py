"""A guard for torch's own GroupNorm."""

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


def guard(norm: nn.GroupNorm) -> RemovableHandle:
    """Keep torch 2.13's GroupNorm from crashing the process, until the handle is removed.

    Its backward on the CPU segfaults if the input is channels_last and needs no gradient while γ or β does: a frozen
    convolution before a trainable norm. A hook makes that input contiguous and leaves the module's type as it is.
    """
    return norm.register_forward_pre_hook(_contiguous)


# TorchScript compiles hooks too, so this one keeps to what that understands.
def _contiguous(module, inputs: tuple[Tensor]) -> tuple[Tensor]:  # type: ignore[no-untyped-def]
    if len(inputs) == 1:
        x = inputs[0]
        if x.device.type == "cpu" and torch.is_grad_enabled() and not x.requires_grad and not x.is_contiguous():
            return (x.contiguous(),)
    return inputs
