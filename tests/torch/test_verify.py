"""Verification of ONNX files against PyTorch models: every fault is caught, no correct file fails."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import normswap
from normswap.errors import InputError, VerificationError

from ..helpers import exactly
from .models import Residual, trained_

SIZES = "expected `batch_sizes` of one number above 0 or several, received batch_sizes="


@pytest.fixture
def exported(proven, tmp_path):
    """A patched model and its file, the file being the test's own."""
    model, path, _ = proven("sn")
    return model, Path(shutil.copy(path, tmp_path))


class TestVerify:
    @staticmethod
    def corrupt(path, name, change):
        proto = onnx.load(path)
        initializer = next(i for i in proto.graph.initializer if i.name == name)
        array = change(numpy_helper.to_array(initializer)).astype(np.float32)
        initializer.CopyFrom(numpy_helper.from_array(array, name))
        onnx.save(proto, path)

    def test_a_good_file_passes(self, exported):
        """Every batch size and input scale passes with optimisation off and on."""
        verdict = normswap.verify(*exported)

        assert verdict
        assert [(c.batch, c.inputs, c.optimisation) for c in verdict.checks] == [
            (batch, inputs, level)
            for batch, inputs in ((1, "x1"), (2, "x0.1"), (5, "x1"), (3, "x100"))
            for level in ("off", "on")
        ]
        assert verdict.max_rel < 5e-6
        assert verdict.first_diverging is None
        assert json.loads(json.dumps(verdict.to_dict()))["passed"] is True

    def test_one_or_several(self, exported, images):
        """A provider, a number of samples and an array are not taken apart."""
        one = normswap.verify(*exported, batch_sizes=2, providers="cpu", data=images)
        several = normswap.verify(*exported, batch_sizes=[2], providers=["cpu"], data=[images])

        assert one == several
        assert [(check.batch, check.inputs) for check in one.checks[::2]] == [(2, "x1"), (4, "data")]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"batch_sizes": "12"}, f"{SIZES}'12'"),
            ({"batch_sizes": [2, 0]}, f"{SIZES}[2, 0]"),
            ({"batch_sizes": []}, f"{SIZES}[]"),
            ({"batch_sizes": None}, f"{SIZES}None"),
            ({"providers": 3}, "expected a provider or several, each a text, received 3"),
            ({"data": "x.npz"}, "expected batches of inputs as the model takes them, received 'x.npz'"),
        ],
    )  # fmt: skip
    def test_what_is_neither(self, exported, options, message):
        """It is refused, and no fault of the file."""
        with pytest.raises(InputError, match=exactly(message)):
            normswap.verify(*exported, **options)

    @pytest.mark.parametrize("target", ["brn", "sn", "gn"])
    def test_any_initializer_off_by_a_hundredth_fails(self, proven, tmp_path, target):
        """Each float initializer multiplied by 1.01 fails, and the layer it belongs to is named."""
        model, path = proven(target).model, tmp_path / "m.onnx"
        shutil.copy(proven(target).path, path)
        good = path.read_bytes()
        named = set()
        for initializer in onnx.load(path).graph.initializer:
            values = numpy_helper.to_array(initializer)
            # The pattern of GroupNorm multiplies by ones; zeros and single constants have no hundredth to be off by.
            if values.dtype != np.float32 or values.size < 4 or not values.any():
                continue
            path.write_bytes(good)
            self.corrupt(path, initializer.name, lambda a: a * 1.01)
            verdict = normswap.verify(model, path)
            assert not verdict, initializer.name
            assert verdict.first_diverging, initializer.name
            named.add(verdict.first_diverging)

        assert {"stem.1", "bn", "head"} <= named

    def test_nan_fails(self, exported):
        """A NaN weight is no pass, as it is where NaN is compared with a bound."""
        model, path = exported
        self.corrupt(path, "head.weight", lambda a: a * np.nan)
        verdict = normswap.verify(model, path)

        assert not verdict
        assert verdict.first_diverging == "head"
        assert verdict.explain("m.onnx") == (
            "expected m.onnx to compute what the model computes, received a file that does not:\n"
            "  output is not finite (batch 1, optimisation off)\n"
            "  8 of 8 checks failed\n"
            "  first diverging layer: head\n"
            "  first value that is not finite: output of Gemm"
        )
        assert verdict.to_dict()["first_infinite"] == "output of Gemm"

    def test_the_message_says_how_much_and_where(self, exported):
        """A failure says by how much and on which input, where, and what tolerance would pass."""
        model, path = exported
        self.corrupt(path, "head.weight", lambda a: a * 1.01)
        verdict = normswap.verify(model, path)
        worst = max(verdict.checks, key=lambda check: check.max_rel)

        assert worst.ratio > 1000
        assert verdict.explain("m.onnx") == (
            "expected m.onnx to compute what the model computes, received a file that does not:\n"
            f"  output differs by {worst.max_rel:.2g} of its scale, {worst.ratio:.2g} times the framework's own error "
            f"(batch {worst.batch}, inputs {worst.inputs}, optimisation {worst.optimisation})\n"
            "  8 of 8 checks failed\n"
            "  first diverging layer: head\n"
            f"  a tolerance of {worst.max_rel:.2g} would pass; 1e-05 is allowed"
        )

    @pytest.mark.parametrize("factor", [1e-3, 10, 100])
    def test_the_scale_of_the_input_does_not_matter(self, exported, images, factor):
        """A correct file passes for inputs of any scale."""
        assert normswap.verify(*exported, data=[(images * factor).numpy()])

    def test_another_model(self, exported):
        """A file is held against the model given, not the one it was made from."""
        model, path = exported
        torch.manual_seed(9)
        other = normswap.patch(trained_(Residual()), "sn").model

        assert normswap.verify(model, path)
        assert normswap.verify(other, path).first_diverging == "stem.0"

    def test_other_outputs(self, exported):
        """A file whose outputs are not the model's fails before any number is compared."""
        model, path = exported
        proto = onnx.load(path)
        for node in proto.graph.node:
            node.output[:] = ["scores" if name == "output" else name for name in node.output]
        proto.graph.output[0].name = "scores"
        onnx.save(proto, path)
        verdict = normswap.verify(model, path)

        assert not verdict
        assert verdict.problems == ("expected the outputs output, received scores",)

    def test_inputs_of_another_name_fail(self, exported):
        """Inputs that are not the model's by name fail before anything is run."""
        assert normswap.verify(nn.Linear(3, 2), exported[1]).problems == ("expected the inputs input, received x",)

    def test_inputs_the_model_has_not_fail(self, exported):
        """An input the exporter made of a constant is an input the model does not have."""
        model, path = exported
        proto = onnx.load(path)
        proto.graph.input.append(onnx.helper.make_tensor_value_info("constant", onnx.TensorProto.FLOAT, [3]))
        onnx.save(proto, path)

        assert normswap.verify(model, path).problems == ("expected the inputs x, received x, constant",)

    def test_a_model_that_takes_other_shapes(self, exported):
        """A model that cannot run on the file's inputs is a failure, said in words."""

        class Flat(nn.Module):
            def forward(self, x):
                """Return something of (N, 7)."""
                return nn.functional.linear(x, torch.ones(2, 7))

        assert normswap.verify(Flat(), exported[1]).problems == (
            "the model does not accept the file's inputs (x (batch, 3, 12, 12)): mat1 and mat2 shapes cannot be "
            "multiplied (36x12 and 7x2); give an `example`, if those drawn are not what it takes",
        )

    def test_a_wrongly_declared_output_fails(self, exported):
        """A file that declares another shape than the model returns fails."""
        model, path = exported
        proto = onnx.load(path)
        proto.graph.output[0].type.tensor_type.shape.dim.add().dim_value = 1
        onnx.save(proto, path)
        with pytest.raises(InputError, match="received a file that is not valid"):
            normswap.verify(model, path)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "received an empty file"),
            (b"not a graph at all", "it is damaged or cut short"),
        ],
    )
    def test_what_is_no_model_is_refused(self, model, tmp_path, content, message):
        """An empty or damaged file is refused as input."""
        (tmp_path / "m.onnx").write_bytes(content)
        with pytest.raises(InputError, match=message):
            normswap.verify(model, tmp_path / "m.onnx")

    def test_export_promotes_no_wrong_file(self, model, images, tmp_path, monkeypatch):
        """If the exported file computes something else, the command fails, and the old file stays."""
        from normswap.export import onnx as exporter

        path = tmp_path / "m.onnx"
        path.write_text("old")
        save = exporter._save

        def careless(graph, *to):
            """Write the file with another shift in the stem."""
            bias = next(node for node in graph.graph if node.op_type == "Conv").inputs[2]
            bias.const_value = ir.tensor(bias.const_value.numpy() + 0.1)
            save(graph, *to)

        monkeypatch.setattr(exporter, "_save", careless)
        with pytest.raises(VerificationError, match="first diverging layer: stem.1"):
            normswap.to_onnx(model, path, example=images, overwrite=True)

        assert path.read_text() == "old"
        assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]


class Cancelling(nn.Module):
    """Returns what is left of two numbers that cancel, exactly in float32: 0.01, of weights that were rounded at 1."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.last = nn.Linear(2, 1, bias=False)
        with torch.no_grad():
            self.last.weight.copy_(torch.tensor([[1.01, -1.0]]))

    def forward(self, x):
        return self.last(self.norm(x) * 0 + 1)


@pytest.mark.parametrize(("units", "passes"), [(1, True), (40, False)])
def test_weights_rounded_otherwise_are_right_where_they_cancel(tmp_path, units, passes):
    """A file rounds folded weights anew, which a model that is exact on its own may magnify."""
    model, path = trained_(Cancelling()).eval(), tmp_path / "m.onnx"
    normswap.to_onnx(model, path, example=torch.randn(2, 2))
    assert normswap.verify(model, path, save_reference=tmp_path / "r.npz")
    proto = onnx.load(path)
    weight = next(tensor for tensor in proto.graph.initializer if tensor.dims and tensor.dims[:] in ([1, 2], [2, 1]))
    moved = numpy_helper.to_array(weight) + np.float32(units * np.spacing(np.float32(1))) * np.float32([1, 0]).reshape(
        weight.dims
    )
    weight.CopyFrom(numpy_helper.from_array(moved, weight.name))
    onnx.save(proto, path)
    verdict = normswap.verify(model, path, save_reference=tmp_path / "unwanted.npz")

    assert verdict.max_rel > 1e-5
    assert (tmp_path / "unwanted.npz").exists() is passes
    assert bool(verdict) is passes
    assert normswap.verify_against(tmp_path / "r.npz", path) == verdict
