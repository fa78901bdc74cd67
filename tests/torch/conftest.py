"""Small PyTorch models with the running statistics and scales of a trained one."""

from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.onnx._internal.exporter._registration import ONNXRegistry

import normswap
from normswap.export.onnx import ExportReport

from .models import Residual, trained_
from .runs import bundled, coloured


@pytest.fixture(autouse=True, scope="session")
def _operators_once():
    """Build the table of torch.onnx's operators once: each export does, and spends half of its time on it."""
    build = staticmethod(cache(ONNXRegistry.from_torchlib))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", build)
        yield


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def model():
    """A small trained network with two BatchNorms, ``stem.1`` and ``bn``."""
    torch.manual_seed(0)
    return trained_(Residual())


class Proven(NamedTuple):
    """What came of an export."""

    model: nn.Module
    path: Path
    report: ExportReport


@pytest.fixture(scope="session")
def proven(tmp_path_factory):
    """The function that returns the network patched to a target (unless to "bn") and its file, for tests that read."""

    @cache
    def export(target):
        torch.manual_seed(0)
        model, example = trained_(Residual()), torch.randn(4, 3, 12, 12)
        if target != "bn":
            normswap.patch(model, target, example=example)
        path = tmp_path_factory.mktemp("proven") / "m.onnx"
        return Proven(model, path, normswap.to_onnx(model, path, example=example))

    return export


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
