"""Networks in Keras: those that keras-switchnorm, BatchRenormalization and GroupNormalization-keras were tried on.

The command line takes each as a MODEL, with BatchNorms to replace: ``normswap.models.keras:cifar10_net``.
"""

from .cifar10 import cifar10_net
from .fashion_mnist import fashion_mnist_net
from .wide_resnet import wide_resnet

__all__ = ["cifar10_net", "fashion_mnist_net", "wide_resnet"]
