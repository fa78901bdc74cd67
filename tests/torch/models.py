"""PyTorch models to patch, with the running statistics and scales of trained ones, and how to tell them apart."""

import copy
import hashlib

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import normswap

TARGETS = ["sn", "brn", "gn", "ln", "in"]

CODE = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
                          nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    model.pretrained_cfg = {"input_size": (3, 8, 8), "mean": (0.5, 0.5, 0.5), "std": (0.3, 0.3, 0.3)}
    return model.eval()
"""
"""A file that builds a network for images of 8 x 8."""


def trained_(model, seed=0):
    """Give every BatchNorm of ``model`` plausible statistics and scales, in place."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            for tensor, low, high in (
                (module.weight, 0.5, 2.0),
                (module.bias, -1.0, 1.0),
                (module.running_mean, -1.0, 1.0),
                (module.running_var, 0.2, 3.0),
            ):
                if tensor is not None:
                    tensor.data.uniform_(low, high, generator=generator)
    return model.eval()


def filled(cls, channels, **options):
    """A layer whose parameters and running statistics are not the initial ones."""
    layer = cls(channels, **options)
    generator = torch.Generator().manual_seed(3)
    for tensor in (*layer.parameters(), *(b for n, b in layer.named_buffers() if n.startswith("running"))):
        tensor.data.uniform_(0.3, 1.5, generator=generator)
    return layer


def fingerprint(model):
    """A hash of everything in the state dict, names and types included."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def batch_norms(model):
    """The names of the BatchNorms in ``model``."""
    return [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]


class Residual(nn.Module):
    """A network with a branch, so that call order and nesting matter."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8, eps=1e-3)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        """Return scores for (N, 3, H, W) images."""
        x = self.stem(x)
        return self.head(torch.relu(x + self.bn(self.conv(x))).mean((2, 3)))


class Functional(nn.Module):
    """A module that calls batch_norm itself."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("var", torch.ones(3))

    def forward(self, x):
        """Normalize by the buffers."""
        return F.batch_norm(x, self.mean, self.var)


class Unregistered(nn.Module):
    """A module whose BatchNorm is in a plain list alone, where PyTorch does not see it."""

    def __init__(self):
        super().__init__()
        self.plain = [nn.BatchNorm2d(3).eval()]

    def forward(self, x):
        """Normalize."""
        return self.plain[0](x)


def quantization_aware():
    """A fused QAT convolution, which has a BatchNorm in it, and a BatchNorm."""
    from torch.ao.nn.intrinsic import qat
    from torch.ao.quantization import get_default_qat_qconfig

    return nn.Sequential(qat.ConvBn2d(3, 4, 1, qconfig=get_default_qat_qconfig("fbgemm")), nn.BatchNorm2d(4))


class FrozenBatchNorm2d(nn.Module):
    """A constant scale and shift in four buffers, as torchvision and detectron2 have it."""

    def __init__(self, channels, eps=1e-5):
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1.5), ("bias", 0.5), ("running_mean", 0.3), ("running_var", 2.0)):
            self.register_buffer(name, torch.full((channels,), value) + torch.linspace(0, 0.2, channels))

    def forward(self, x):
        """Scale and shift."""
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0, self.eps)


class WithActivation(nn.BatchNorm2d):
    """A BatchNorm with a ReLU of its own."""

    def forward(self, x):
        """Normalize and clip."""
        return super().forward(x).relu()


def exported(model, *inputs, strict=False, decomposed=False, free=True):
    """A program of the model, for any number of samples if ``free``."""
    shapes = tuple({0: torch.export.Dim("batch")} for _ in inputs) if free else None
    program = torch.export.export(model, inputs, strict=strict, dynamic_shapes=shapes)
    return program.run_decompositions() if decomposed else program


def patched(model, target, example=None):
    """What patching a copy of the source gives, for inference, other layers left alone."""
    return normswap.patch(copy.deepcopy(model).eval(), target, example=example, equalize=False).model
