"""Helpers of networks in `test_callers`, in a module of their own as those of detectors are."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def fuse_conv_and_bn(conv, bn):
    """A convolution that computes ``bn(conv(x))`` at inference."""
    scale = bn.weight / torch.sqrt(bn.running_var + bn.eps)
    fused = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, bias=True)
    fused.weight.copy_(conv.weight * scale.view(-1, 1, 1, 1))
    bias = torch.zeros(conv.out_channels) if conv.bias is None else conv.bias
    fused.bias.copy_((bias - bn.running_mean) * scale + bn.bias)
    return fused


def keep_norms_in_eval(model):
    """Put BatchNorms in eval mode."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
