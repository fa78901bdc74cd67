"""The wide ResNet for images of some 32 pixels that BatchRenormalization was tried on."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from ..norms import Norm, blocks_of
from .norms import norm_layers


def wide_resnet(
    depth: int = 16, width: int = 4, norm: Norm = "bn", *, classes: int = 10, dropout: float = 0.0
) -> nn.Module:
    """Return a wide ResNet, WRN-``depth``-``width``, for images (N, 3, H, W) of some 32 pixels.

    Args:
        depth: Number of layers with weights: 6 n + 4 for n blocks in each of the three stages.
        width: How many times 16, 32 and 64 channels the stages have.
        norm: ``"bn"``, ``"sn"``, ``"brn"``, ``"gn"`` (32 groups, or as many of them as divide the channels), ``"ln"``
            (one group), ``"in"`` (a group a channel), each with ε = 1e-5, or a function that returns a layer for a
            number of channels.
        classes: Number of scores.
        dropout: Share of the values that training drops between a block's convolutions.

    Returns:
        The network, which maps images to scores (N, classes).

    Raises:
        ValueError: If depth or norm is another.

    Example:
        >>> import torch
        >>> from normswap.models.torch import wide_resnet
        >>> wide_resnet(16, 1, "brn")(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 10])

    Source: Zagoruyko and Komodakis, "Wide Residual Networks", section 2; titu1994/BatchRenormalization, whose stages
    begin with a block that is not pre-activated.
    """
    return _WideResNet(blocks_of(depth), width, norm_layers(norm, 1e-5), classes, dropout)


class _First(nn.Module):
    """A stage's first block, which changes the number of channels."""

    def __init__(self, channels: int, width: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.norm = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(channels, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.conv2(F.relu(self.norm(self.conv1(x)))) + self.shortcut(x)
        return result


class _Further(nn.Module):
    def __init__(self, width: int, norm: Callable[[int], nn.Module], dropout: float) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(width), nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.norm2, self.conv2 = norm(width), nn.Conv2d(width, width, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.dropout(self.conv1(F.relu(self.norm1(x))))
        result: Tensor = x + self.conv2(F.relu(self.norm2(y)))
        return result


class _WideResNet(nn.Module):
    def __init__(self, blocks: int, width: int, norm: Callable[[int], nn.Module], classes: int, dropout: float) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False), norm(16), nn.ReLU()]
        channels = 16
        for stage in range(3):
            if stage:
                layers += [norm(channels), nn.ReLU()]
            wide = 16 * 2**stage * width
            layers.append(_First(channels, wide, 2 if stage else 1, norm))
            layers += [_Further(wide, norm, dropout) for _ in range(blocks - 1)]
            channels = wide
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(channels, classes)
        self.pretrained_cfg = {"input_size": (3, 32, 32)}
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.fc(self.features(x).mean((2, 3)))
        return result
