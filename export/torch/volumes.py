"""Convolutions and pooling of volumes as those of maps, for a runtime that has no others."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    groups: int = 1,
) -> Tensor:
    """Return a convolution: the k slices that meet in one of the result are one map of C·k channels.

    y[n, t] = conv2d([x[n, s·t + d·i - p] for i in range(k)], W) with W of shape (O, C·k, height, width).
    """
    stride, padding, dilation = _three(stride), _three(padding), _three(dilation)
    x = F.pad(x, (0, 0, 0, 0, padding[0], padding[0]))
    maps, slices = _meeting(x, weight.shape[2], stride[0], dilation[0])
    y = F.conv2d(maps, weight.flatten(1, 2), bias, stride[1:], padding[1:], dilation[1:], groups)
    return y.reshape(-1, slices, *y.shape[1:]).transpose(1, 2)


def _conv_padded(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1,),
    padding: str = "valid",
    dilation: Sequence[int] = (1,),
    groups: int = 1,
) -> Tensor:
    """Return a convolution whose padding is a word."""
    if padding == "same":
        totals = [each * (size - 1) for each, size in zip(_three(dilation), weight.shape[2:], strict=True)]
        x = F.pad(x, [side for total in reversed(totals) for side in (total // 2, total - total // 2)])
    return _conv(x, weight, bias, stride, (0,), dilation, groups)


def _conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,),
    output_padding: Sequence[int] = (0,),
    groups: int = 1,
    dilation: Sequence[int] = (1,),
) -> Tensor:
    """Return a transposed convolution: in depth it is a convolution by flipped weights of slices apart by zeros."""
    stride, padding, dilation, extra = _three(stride), _three(padding), _three(dilation), _three(output_padding)
    apart = torch.stack([x, *[torch.zeros_like(x)] * (stride[0] - 1)], 3).flatten(2, 3)
    front = dilation[0] * (weight.shape[2] - 1) - padding[0]
    apart = F.pad(apart, (0, 0, 0, 0, front, front + extra[0] - stride[0] + 1))
    maps, slices = _meeting(apart, weight.shape[2], 1, dilation[0])
    flipped = weight.flip(2).transpose(1, 2).flatten(0, 1)
    y = F.conv_transpose2d(maps, flipped, bias, stride[1:], padding[1:], extra[1:], groups, dilation[1:])
    return y.reshape(-1, slices, *y.shape[1:]).transpose(1, 2)


def _max_pool(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil_mode: bool = False,
) -> Tensor:
    """Return the largest of each slice, and of those the largest in depth."""
    kernel, padding, dilation = _three(kernel_size), _three(padding), _three(dilation)
    stride = _three(stride) if stride else kernel
    y = F.max_pool2d(x.flatten(1, 2), kernel[1:], stride[1:], padding[1:], dilation[1:], ceil_mode)
    y = y.reshape(*x.shape[:3], *y.shape[2:])
    deep = F.max_pool2d(
        y.flatten(3), (kernel[0], 1), (stride[0], 1), (padding[0], 0), (dilation[0], 1), ceil_mode
    )  # fmt: skip
    return deep.reshape(*deep.shape[:3], *y.shape[3:])


VOLUMES = {
    torch.ops.aten.conv3d.default: _conv,
    torch.ops.aten.conv3d.padding: _conv_padded,
    torch.ops.aten.conv_transpose3d.input: _conv_transpose,
    torch.ops.aten.max_pool3d.default: _max_pool,
}
"""What takes the place of torch's operators where a program is decomposed."""


def _meeting(x: Tensor, taps: int, stride: int, dilation: int) -> tuple[Tensor, int]:
    """Return the slices (N, C, depth, …) that meet in each of the result, as maps (N·slices, C·taps, …), and how many.

    Its channels are in order of x's channel and then of the tap, so that groups of channels stay together.
    """
    slices = (x.shape[2] - dilation * (taps - 1) - 1) // stride + 1
    reach = stride * (slices - 1) + 1
    met = torch.stack([x[:, :, dilation * tap : dilation * tap + reach : stride] for tap in range(taps)], 2)
    return met.permute(0, 3, 1, 2, 4, 5).flatten(2, 3).flatten(0, 1), slices


def _three(given: Sequence[int]) -> list[int]:
    """Return a number for each axis, where one may stand for all."""
    return list(given) * (3 // len(given))
