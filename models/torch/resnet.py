"""ResNets for ImageNet, under the names of the switchablenorms checkpoints whatever their norm is."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..norms import Norm
from .norms import norm_layers

_STAGES = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
_BOTTLENECK = 50
"""The depth from which on a block is three convolutions."""

_WIDTHS = 64, 128, 256, 512
_EPSILON = 1e-5
_IMAGENET = {
    "input_size": (3, 224, 224),
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "crop_pct": 0.875,
}

Layers = Callable[[int], nn.Module]


def resnet_v1(
    depth: int = 50,
    norm: Norm = "bn",
    *,
    classes: int = 1000,
    last_gamma: bool = False,
    dropout: float = 0.5,
    small_images: bool = False,
) -> nn.Module:
    """Return a ResNet whose blocks add first and activate then, for images (N, 3, H, W) of any size.

    Names and shapes of its parameters and buffers are those of the checkpoints of switchablenorms, which it computes
    as published with ``norm="bn"`` patched to ``"sn"`` and `normswap.load_weights`: norms are called ``sn1``, ``sn2``,
    ``sn3``, also where they are others. Its convolutions start as theirs, normally distributed by fan-out.

    Args:
        depth: Number of layers with weights: 18, 34, 50, 101 or 152.
        norm: ``"bn"``, ``"sn"``, ``"brn"``, ``"gn"`` (32 groups, or as many of them as divide the channels), ``"ln"``
            (one group), ``"in"`` (a group a channel), or a function that returns a layer for a number of channels, for
            all options of a layer: ``partial(SwitchNorm2d, compat="switchablenorms", batch_statistics="none")``.
        classes: Number of scores.
        last_gamma: Whether γ of the last norm of each block starts at 0, so that each block starts as its shortcut.
        dropout: Share of the features that training drops before the last layer.
        small_images: Whether a 3x3 convolution alone takes the place of the 7x7 one with stride 2 and the pooling, for
            images of some 32 pixels.

    Returns:
        The network, which maps images to scores (N, classes).

    Raises:
        ValueError: If depth or norm is another, or with ``last_gamma`` a norm has no γ.

    Example:
        >>> import torch
        >>> from normswap.models.torch import resnet_v1
        >>> resnet_v1(18, "sn", classes=10, last_gamma=True)(torch.rand(2, 3, 96, 96)).shape
        torch.Size([2, 10])

    Source: He et al., "Deep Residual Learning for Image Recognition", table 1; ``last_gamma``: Goyal et al.,
    "Accurate, Large Minibatch SGD", section 5.1; dropout: switchablenorms/Switchable-Normalization.
    """
    layers = norm_layers(norm, _EPSILON)
    block = _BottleneckV1 if _depth(depth) >= _BOTTLENECK else _BasicV1
    model = _ResNet(block, _STAGES[depth], layers, classes, dropout, small_images)
    if last_gamma:
        for module in model.modules():
            if isinstance(module, _BasicV1 | _BottleneckV1):
                _start_at_zero(module.last_norm)
    return model


def resnet_v2(
    depth: int = 50, norm: Norm = "bn", *, classes: int = 1000, dropout: float = 0.5, small_images: bool = False
) -> nn.Module:
    """Return a ResNet whose blocks normalize and activate before each convolution, for images (N, 3, H, W) of any size.

    Names and shapes are those of the checkpoints of switchablenorms, as in `resnet_v1`; the norm behind the last block
    is ``sn_out``, a shortcut's convolution ``downsample`` itself. There is no ``last_gamma``: with γ and β at 0 the
    last convolution of a block would see the zeros of a ReLU that passes no gradient, and never learn.

    Args:
        depth: Number of layers with weights: 18, 34, 50, 101 or 152.
        norm: A name or a function, as in `resnet_v1`.
        classes: Number of scores.
        dropout: Share of the features that training drops before the last layer.
        small_images: Whether to begin without reducing, as in `resnet_v1`.

    Returns:
        The network, which maps images to scores (N, classes).

    Raises:
        ValueError: If depth or norm is another.

    Example:
        >>> import torch
        >>> from normswap.models.torch import resnet_v2
        >>> resnet_v2(18, "gn")(torch.rand(2, 3, 64, 64)).shape
        torch.Size([2, 1000])

    Source: He et al., "Identity Mappings in Deep Residual Networks", figure 4 (e).
    """
    layers = norm_layers(norm, _EPSILON)
    block = _BottleneckV2 if _depth(depth) >= _BOTTLENECK else _BasicV2
    return _ResNet(block, _STAGES[depth], layers, classes, dropout, small_images)


def _depth(depth: Any) -> int:
    if depth not in _STAGES:
        raise ValueError(f"expected `depth` out of {', '.join(map(str, _STAGES))}, received depth={depth!r}")
    return int(depth)


def _start_at_zero(norm: Any) -> None:
    if getattr(norm, "weight", None) is None:
        raise ValueError(f"expected norms with a weight for last_gamma=True, received {type(norm).__name__} without")
    nn.init.zeros_(norm.weight)


def _convolution(channels: int, width: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, width, size, stride, size // 2, bias=False)


class _BasicV1(nn.Module):
    expansion = 1

    def __init__(self, channels: int, width: int, stride: int, norm: Layers) -> None:
        super().__init__()
        self.conv1, self.sn1 = _convolution(channels, width, 3, stride), norm(width)
        self.conv2, self.sn2 = _convolution(width, width, 3), norm(width)
        self.relu = nn.ReLU()
        self.downsample = _shortcut_v1(channels, width, stride, norm)

    @property
    def last_norm(self) -> Any:
        return self.sn2

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.sn1(self.conv1(x)))
        y = self.sn2(self.conv2(y))
        result: Tensor = self.relu(y + (x if self.downsample is None else self.downsample(x)))
        return result


class _BottleneckV1(nn.Module):
    expansion = 4

    def __init__(self, channels: int, width: int, stride: int, norm: Layers) -> None:
        super().__init__()
        self.conv1, self.sn1 = _convolution(channels, width, 1), norm(width)
        self.conv2, self.sn2 = _convolution(width, width, 3, stride), norm(width)
        self.conv3, self.sn3 = _convolution(width, 4 * width, 1), norm(4 * width)
        self.relu = nn.ReLU()
        self.downsample = _shortcut_v1(channels, 4 * width, stride, norm)

    @property
    def last_norm(self) -> Any:
        return self.sn3

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.sn1(self.conv1(x)))
        y = self.relu(self.sn2(self.conv2(y)))
        y = self.sn3(self.conv3(y))
        result: Tensor = self.relu(y + (x if self.downsample is None else self.downsample(x)))
        return result


class _BasicV2(nn.Module):
    expansion = 1

    def __init__(self, channels: int, width: int, stride: int, norm: Layers) -> None:
        super().__init__()
        self.sn1, self.conv1 = norm(channels), _convolution(channels, width, 3, stride)
        self.sn2, self.conv2 = norm(width), _convolution(width, width, 3)
        self.relu = nn.ReLU()
        self.downsample = _shortcut_v2(channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        activated = self.relu(self.sn1(x))
        y = self.conv1(activated)
        y = self.conv2(self.relu(self.sn2(y)))
        result: Tensor = y + (x if self.downsample is None else self.downsample(activated))
        return result


class _BottleneckV2(nn.Module):
    expansion = 4

    def __init__(self, channels: int, width: int, stride: int, norm: Layers) -> None:
        super().__init__()
        self.sn1, self.conv1 = norm(channels), _convolution(channels, width, 1)
        self.sn2, self.conv2 = norm(width), _convolution(width, width, 3, stride)
        self.sn3, self.conv3 = norm(width), _convolution(width, 4 * width, 1)
        self.relu = nn.ReLU()
        self.downsample = _shortcut_v2(channels, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        activated = self.relu(self.sn1(x))
        y = self.conv1(activated)
        y = self.conv2(self.relu(self.sn2(y)))
        y = self.conv3(self.relu(self.sn3(y)))
        result: Tensor = y + (x if self.downsample is None else self.downsample(activated))
        return result


def _shortcut_v1(channels: int, width: int, stride: int, norm: Layers) -> nn.Module | None:
    """Return what brings a block's input to its output's shape; None where they are the same."""
    if channels == width and stride == 1:
        return None
    return nn.Sequential(_convolution(channels, width, 1, stride), norm(width))


def _shortcut_v2(channels: int, width: int, stride: int) -> nn.Module | None:
    return None if channels == width and stride == 1 else _convolution(channels, width, 1, stride)


class _ResNet(nn.Module):
    """Blocks in four stages, of which all but the first halve the maps."""

    def __init__(
        self, block: Any, counts: tuple[int, ...], norm: Layers, classes: int, dropout: float, small_images: bool
    ) -> None:
        super().__init__()
        self.pretrained_cfg = {"input_size": (3, 32, 32)} if small_images else dict(_IMAGENET)
        self.conv1 = _convolution(3, 64, 3) if small_images else _convolution(3, 64, 7, 2)
        self.sn1 = norm(64)
        self.relu = nn.ReLU()
        self.maxpool = nn.Identity() if small_images else nn.MaxPool2d(3, 2, 1)
        channels = 64
        stages = []
        for index, (width, count) in enumerate(zip(_WIDTHS, counts, strict=True)):
            blocks = []
            for position in range(count):
                blocks.append(block(channels, width, 2 if index and not position else 1, norm))
                channels = block.expansion * width
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.sn_out = norm(channels) if block in (_BasicV2, _BottleneckV2) else None
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.sn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        if self.sn_out is not None:
            x = self.relu(self.sn_out(x))
        result: Tensor = self.fc(self.dropout(self.avgpool(x).flatten(1)))
        return result
