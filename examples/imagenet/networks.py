"""ResNet-50 with Switchable Normalization, to train on ImageNet by the recipes beside this file.

``torchrun --nproc-per-node 8 -m normswap finetune examples/imagenet/networks.py:resnet50_v1
-c examples/imagenet/cosine.toml --data imagenet/train --eval-data imagenet/val -o resnet50-sn``
"""

from normswap.models.torch import resnet_v1, resnet_v2


def resnet50_v1():
    """Return the ResNet-50 of blocks that add first and activate then."""
    return resnet_v1(50, "sn")


def resnet50_v2():
    """Return the pre-activated ResNet-50."""
    return resnet_v2(50, "sn")
