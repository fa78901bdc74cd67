"""Verification of ONNX files against PyTorch models: every fault is caught, no correct file fails.

Test names end in the number of the hard case they settle (of 38).
"""

import json
import re

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import normswap
from normswap.errors import InputError, VerificationError

from .conftest import Residual, trained_


class TestVerify:
    @pytest.fixture
    def exported(self, images, tmp_path):
        """A patched model and its file."""
        torch.manual_seed(0)
        model = normswap.patch(trained_(Residual()), "sn", example=images).model
        normswap.to_onnx(model, tmp_path / "m.onnx", example=images)
        return model, tmp_path / "m.onnx"

    @staticmethod
    def corrupt(path, name, change):
        proto = onnx.load(path)
        initializer = next(i for i in proto.graph.initializer if i.name == name)
        array = change(numpy_helper.to_array(initializer)).astype(np.float32)
        initializer.CopyFrom(numpy_helper.from_array(array, name))
        onnx.save(proto, path)

    def test_a_good_file_30(self, exported):
        """Every batch size passes with optimisation off and on."""
        verdict = normswap.verify(*exported)

        assert verdict
        assert {(c.batch, c.optimisation) for c in verdict.checks} == {
            (batch, level) for batch in (1, 2, 5, 7) for level in ("off", "on")
        }
        assert verdict.max_rel < 5e-6
        assert verdict.first_diverging is None
        assert json.loads(json.dumps(verdict.to_dict()))["passed"] is True

    @pytest.mark.parametrize("target", ["brn", "sn", "gn"])
    def test_any_initializer_off_by_a_hundredth_28(self, model, images, tmp_path, target):
        """Each float initializer multiplied by 1.01 fails, and the layer it belongs to is named."""
        path = tmp_path / "m.onnx"
        normswap.patch(model, target)
        normswap.to_onnx(model, path, example=images)
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

    def test_nan_fails_27_28(self, exported):
        """A NaN weight is no pass, as it is where NaN is compared with a bound."""
        model, path = exported
        self.corrupt(path, "head.weight", lambda a: a * np.nan)
        verdict = normswap.verify(model, path)

        assert not verdict
        assert verdict.first_diverging == "head"
        assert "output is not finite (batch 1, optimisation off)" in verdict.explain("m.onnx")

    def test_the_message(self, exported):
        """A failure says by how much, where, and what tolerance would pass."""
        model, path = exported
        self.corrupt(path, "head.weight", lambda a: a * 1.01)
        lines = normswap.verify(model, path).explain("m.onnx").splitlines()

        assert lines[0] == "expected m.onnx to compute what the model computes, received a file that does not:"
        assert re.fullmatch(
            r"  output differs by 0\.0\d+ of its scale, [\d.e+]+ times the framework's own error "
            r"\(batch 1, optimisation off\)",
            lines[1],
        )
        assert lines[-2] == "  first diverging layer: head"
        assert re.fullmatch(r"  a tolerance of 0\.0\d+ would pass; 1e-05 is allowed", lines[-1])

    @pytest.mark.parametrize("factor", [1e-3, 10, 100])
    def test_the_scale_of_the_input_does_not_matter_29(self, exported, images, factor):
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

    def test_a_model_that_takes_other_inputs(self, exported):
        """A model that cannot run on the file's inputs is a failure, said in words."""
        verdict = normswap.verify(nn.Linear(3, 2), exported[1])

        assert verdict.problems[0].startswith("the model does not accept the file's inputs (x ['batch', 3, 12, 12]): ")

    @pytest.mark.parametrize(
        ("content", "message"),
        [(b"", "received an empty file"), (b"not a graph at all", "received a file that is not valid: ")],
    )
    def test_what_is_no_model_49(self, model, tmp_path, content, message):
        """An empty or damaged file is refused as input."""
        (tmp_path / "m.onnx").write_bytes(content)
        with pytest.raises(InputError, match=message):
            normswap.verify(model, tmp_path / "m.onnx")

    def test_export_promotes_no_wrong_file_28(self, model, images, tmp_path, monkeypatch):
        """If the exported file computes something else, the command fails, and the old file stays."""
        from normswap.export import fold

        path = tmp_path / "m.onnx"
        path.write_text("old")
        monkeypatch.setattr(fold, "folded_affine", lambda g, b, m, v, eps: (g / np.sqrt(v), b))
        with pytest.raises(VerificationError, match="first diverging layer: stem.1"):
            normswap.to_onnx(model, path, example=images, overwrite=True)

        assert path.read_text() == "old"
        assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]
