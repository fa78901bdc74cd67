"""Inputs of every kind in the verification: bytes, ids in floats, logarithms, and what cannot be drawn."""

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import normswap
from normswap.errors import InputError, command_line

from ..helpers import exactly
from .models import trained_


class Bytes(nn.Module):
    """A network of images in bytes, channels last, which it turns to float32 itself."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 3))
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.body(x.permute(0, 3, 1, 2).float() / torch.tensor(255, dtype=torch.float32))).mean((2, 3))


class Ids(nn.Module):
    """A network of token ids that it takes in floats, too."""

    def __init__(self):
        super().__init__()
        self.table, self.bn = nn.Embedding(50, 8), nn.BatchNorm1d(8)

    def forward(self, ids):
        return self.bn(self.table(ids.long()).transpose(1, 2)).mean(2)


class Logs(nn.Module):
    """A network of numbers above zero."""

    def __init__(self):
        super().__init__()
        self.linear, self.bn = nn.Linear(6, 8), nn.BatchNorm1d(8)

    def forward(self, x):
        return self.bn(self.linear(torch.logit(x)))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "m.onnx"


def spoiled(path, factor):
    """Change the last weights in a file of two dimensions or more."""
    proto = onnx.load(path)
    weight = [tensor for tensor in proto.graph.initializer if len(tensor.dims) > 1][-1]
    array = numpy_helper.to_array(weight) * np.float32(factor)
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    onnx.save(proto, path)


@pytest.mark.parametrize("target", ["gn", "in", "sn"])
def test_bytes_of_low_contrast(target, path):
    """The float64 reference holds for a model that asks for float32 by name, and a fault is still found."""
    x = torch.randint(100, 110, (4, 24, 24, 3), dtype=torch.uint8)
    model = trained_(Bytes())
    normswap.patch(model, target, example=x)
    report = normswap.to_onnx(model, path, example=x)

    assert report.verdict
    assert report.verdict.notes == ()
    spoiled(path, 1.001)
    assert not normswap.verify(model, path, example=x)


def test_the_float64_reference_is_one(path):
    """What a model makes of bytes is computed in float64 throughout."""
    from normswap.frameworks.example import Inputs
    from normswap.frameworks.torch import in_double, record

    x = torch.randint(0, 255, (2, 8, 8, 3), dtype=torch.uint8)
    outputs, layers = record(in_double(trained_(Bytes())), Inputs(x))

    assert {array.dtype for array in (*outputs.values(), *layers.values())} == {np.dtype(np.float64)}
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("shown", [True, False])
def test_ids_in_floats_reach_the_table(shown, path):
    """Every row of the table is in the proof, though the ids are floats."""
    model, ids = trained_(Ids()), torch.randint(0, 50, (3, 7)).float()
    normswap.patch(model, "sn", example=ids)
    normswap.to_onnx(model, path, example=ids)
    verdict = normswap.verify(model, path, example=ids if shown else None)

    assert verdict
    assert verdict.coverage == {"table": (50, 50)}


@pytest.mark.parametrize("kind", [torch.float64, torch.float16, torch.bfloat16])
def test_floats_of_another_width(kind, path):
    """An example in any float is one for a float32 model, from the plan to the verification."""
    model, x = trained_(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))), torch.randn(2, 3, 8, 8).to(kind)
    normswap.patch(model, "gn", example=x).drift(x)

    assert normswap.to_onnx(model, path, example=x).verdict
    assert normswap.verify(model, path, example=x, data=[x])


def test_numbers_of_another_kind_are_cast_where_they_are_the_same(path):
    """Whole numbers in floats are ids for a file of whole numbers; others are refused with the number."""
    model, ids = trained_(Ids()), torch.randint(0, 50, (3, 7))
    normswap.to_onnx(model, path, example=ids)

    assert normswap.verify(model, path, example=ids.float(), data=[ids.int(), ids.double()])
    message = "expected int64 for ids (batch, 7), received 0.5 of float32; give numbers of that type"
    with pytest.raises(InputError, match=exactly(message)):
        normswap.verify(model, path, data=[torch.full((2, 7), 0.5)])


class TestWayOut:
    @pytest.mark.parametrize("at", ["python", "command line"])
    def test_of_inputs_that_cannot_be_drawn(self, path, at):
        """Where nothing was shown the verdict says that an example may be given, in the words of who reads it."""
        model, x = trained_(Logs()), torch.rand(4, 6) * 0.9 + 0.05
        normswap.to_onnx(model, path, example=x)
        assert normswap.verify(model, path, example=x)
        if at == "python":
            verdict, given = normswap.verify(model, path), "an `example`"
        else:
            with command_line():
                verdict, given = normswap.verify(model, path), "--example FILE.npz"

        assert verdict.problems == (
            f"the model's own output is not finite, from layer linear on; give {given}, if those drawn are not what it "
            "takes",
        )

    def test_of_an_argument_that_is_no_array(self, path):
        """A number that the example has is named as what is missing without it."""

        class Scaled(nn.Module):
            def __init__(self):
                super().__init__()
                self.bn = nn.BatchNorm1d(3)

            def forward(self, x, factor):
                return self.bn(x) * factor

        model, example = trained_(Scaled()), (torch.randn(4, 3), 0.5)
        normswap.to_onnx(model, path, example=example)

        assert normswap.verify(model, path, example=example)
        assert normswap.verify(model, path).problems == (
            "the model does not accept the file's inputs (x (batch, 3)): "
            "TestWayOut.test_of_an_argument_that_is_no_array.<locals>.Scaled.forward() missing 1 required positional "
            "argument: 'factor'; give an `example`, if those drawn are not what it takes",
        )
