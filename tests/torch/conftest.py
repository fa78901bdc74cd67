"""Small PyTorch models with the running statistics and scales of a trained one."""

from functools import partial

import pytest
import torch

from .models import Residual, trained_
from .runs import bundled, coloured


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def model():
    """A small trained network with two BatchNorms, ``stem.1`` and ``bn``."""
    torch.manual_seed(0)
    return trained_(Residual())


@pytest.fixture
def images():
    """Four images (N, C, H, W)."""
    return torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def data():
    """Images that a few steps can learn."""
    return coloured()


@pytest.fixture
def source(tmp_path):
    """The function that makes a bundle of a small network, patched to a target, and returns its path."""
    return partial(bundled, tmp_path)
