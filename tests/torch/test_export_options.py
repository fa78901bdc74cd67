"""What a PyTorch export can be asked for: runtime, half precision, open sizes, pruned gates, external weights."""

import json
import os
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from onnx.reference import ReferenceEvaluator
from torch import nn

import normswap
from normswap import GroupNorm, SwitchNorm
from normswap.cli import main
from normswap.errors import InputError, UnsupportedError
from normswap.export import onnx as exporter

from ..helpers import exactly
from .models import trained_


def patched(model, target, example):
    """The model, patched."""
    normswap.patch(model, target, example=example)
    return model


def operators(path):
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def answer(path, x):
    return onnxruntime.InferenceSession(str(path)).run(None, {"x": x.numpy()})[0]


class TestRuntime:
    @pytest.mark.parametrize("target", ["sn", "gn", GroupNorm(groups=2)])
    def test_onnxruntime_may_have_a_form_of_its_own(self, model, images, tmp_path, target):
        """Either file is proven; only the one for onnxruntime computes a BatchNormalization's statistics."""
        patched(model, target, images)
        for runtime in ("portable", "ort"):
            assert normswap.to_onnx(model, tmp_path / f"{runtime}.onnx", example=images, runtime=runtime).verdict

        portable = onnx.load(tmp_path / "portable.onnx").graph
        constants = {initializer.name for initializer in portable.initializer}
        for node in portable.node:
            assert node.op_type != "BatchNormalization" or set(node.input[1:]) <= constants

    def test_an_unknown_runtime(self, model, images, tmp_path):
        """A runtime that is none is refused with those that are."""
        with pytest.raises(
            InputError, match=r"^expected a runtime out of portable, ort, web, received runtime='tensorrt'$"
        ):
            normswap.to_onnx(model, tmp_path / "m.onnx", example=images, runtime="tensorrt")


class TestHalf:
    @pytest.mark.parametrize("target", ["bn", "sn", "brn", "gn"])
    def test_weights_are_half_and_norms_are_not(self, model, images, tmp_path, target):
        """Every weight that is no norm's is float16, inputs and outputs stay float32, and the answer is near."""
        if target != "bn":
            patched(model, target, images)
        report = normswap.to_onnx(model, tmp_path / "m.onnx", example=images, half=True)
        proto = onnx.load(tmp_path / "m.onnx")
        graph, told = proto.graph, {entry.key: entry.value for entry in proto.metadata_props}
        types = {i.name: i.data_type for i in graph.initializer}

        assert report.verdict
        assert json.loads(told["normswap.verdict"])["tolerance"] == 1e-2
        assert types["head.weight"] == onnx.TensorProto.FLOAT16
        assert {types[name] for name in types if name.startswith("bn/")} <= {
            onnx.TensorProto.FLOAT,
            onnx.TensorProto.INT64,
        }
        assert [v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)] == [onnx.TensorProto.FLOAT] * 2
        expected = model(images).detach().numpy()
        np.testing.assert_allclose(answer(tmp_path / "m.onnx", images), expected, atol=0.01 * np.abs(expected).max())

    @pytest.mark.parametrize("target", ["sn", "gn", "in"])
    def test_values_whose_squares_overflow(self, tmp_path, target):
        """Activations of 600 have squares that float16 has not; the norm of the file stays finite and right."""
        model = patched(trained_(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))), target, torch.randn(2, 3, 8, 8))
        x = 600 + 300 * torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        normswap.to_onnx(model, tmp_path / "m.onnx", example=x, half=True)
        expected = model(x).detach().numpy()

        for found in (
            answer_of_first_input(tmp_path / "m.onnx", x),
            ReferenceEvaluator(str(tmp_path / "m.onnx")).run(None, {"input": x.numpy()})[0],
        ):
            assert np.isfinite(found).all()
            assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()

    def test_a_weight_beyond_float16(self, model, images, tmp_path):
        """A weight that would become infinite is named."""
        model.head.weight.data[0, 0] = 1e6
        message = "expected weights up to 65504 for float16, received head.weight with 1e+06; leave half=True out"
        with pytest.raises(UnsupportedError, match=exactly(message)):
            normswap.to_onnx(model, tmp_path / "m.onnx", example=images, half=True)
        assert list(tmp_path.iterdir()) == []


def answer_of_first_input(path, x):
    runner = onnxruntime.InferenceSession(str(path))
    return runner.run(None, {runner.get_inputs()[0].name: x.numpy()})[0]


class TestSizes:
    @pytest.mark.parametrize("target", ["sn", "gn", GroupNorm(groups=2), "brn"])
    def test_open_sizes_take_any(self, model, images, tmp_path, target):
        """With open sizes a file takes images of any height and width, odd ones too."""
        report = normswap.to_onnx(
            patched(model, target, images), tmp_path / "m.onnx", example=images, dynamic_size=True
        )
        entry = onnxruntime.InferenceSession(str(tmp_path / "m.onnx")).get_inputs()[0]
        x = torch.randn(3, 3, 17, 23)

        assert report.verdict
        assert entry.shape == ["batch", 3, "height", "width"]
        np.testing.assert_allclose(answer(tmp_path / "m.onnx", x), model(x).detach(), atol=1e-4)

    def test_fixed_sizes_refuse_others(self, model, images, tmp_path):
        """Without, onnxruntime itself says which size it got and which it expected."""
        normswap.to_onnx(model, tmp_path / "m.onnx", example=images)

        with pytest.raises(Exception, match=r"(?s)Got: 17 Expected: 12"):
            answer(tmp_path / "m.onnx", torch.randn(3, 3, 17, 12))

    @pytest.mark.parametrize("target", ["sn", "gn", "brn"])
    def test_an_empty_batch_has_an_empty_answer(self, target, model, images, tmp_path):
        """Where sizes are fixed, an empty batch gets an empty answer."""
        normswap.to_onnx(patched(model, target, images), tmp_path / "m.onnx", example=images)

        assert len(answer(tmp_path / "m.onnx", torch.randn(0, 3, 12, 12))) == 0


class TestPrunedGates:
    def test_small_gates_go_and_the_model_stays(self, model, images, tmp_path):
        """Statistics below the threshold are not computed; what that changes is told, and the model is as it was."""
        patched(model, SwitchNorm(), images)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        whole = normswap.to_onnx(model, tmp_path / "whole.onnx", example=images)
        pruned = normswap.to_onnx(model, tmp_path / "pruned.onnx", example=images, prune_gates=0.1)

        assert pruned.verdict
        assert len(whole.kept) == 2
        assert len(pruned.folded) + sum("linear" in reason for reason in pruned.kept.values()) == 2
        assert operators(tmp_path / "pruned.onnx")["Sqrt"] == 0
        assert pruned.notes[0] == (
            "left out the mean instance, mean layer, variance instance, variance layer gates of stem.1, bn"
        )
        told = float(re.search(r"moves by (\S+) of its scale$", pruned.notes[1])[1])
        moved = np.abs(answer(tmp_path / "pruned.onnx", images) - answer(tmp_path / "whole.onnx", images)).max()
        assert moved / model(images).detach().abs().max() == pytest.approx(told, rel=0.1)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    @pytest.mark.parametrize("threshold", [-0.1, 0.5])
    def test_a_threshold_out_of_range(self, model, images, tmp_path, threshold):
        """One that could leave no gate is refused."""
        message = f"expected `prune_gates` from 0 to below 1/3, received prune_gates={threshold}"
        with pytest.raises(InputError, match=exactly(message)):
            normswap.to_onnx(model, tmp_path / "m.onnx", example=images, prune_gates=threshold)


class TestFiles:
    def test_weights_beside_the_file(self, model, images, tmp_path, monkeypatch):
        """Weights too many for one file lie beside it under its name; the pair moves together and is proven."""
        monkeypatch.setattr(exporter, "ONE_FILE", 100)
        report = normswap.to_onnx(patched(model, "sn", images), tmp_path / "m.onnx", example=images)
        (tmp_path / "there").mkdir()
        for name in ("m.onnx", "m.onnx.data"):
            os.replace(tmp_path / name, tmp_path / "there" / name)

        assert report.verdict
        assert report.size == sum(file.stat().st_size for file in (tmp_path / "there").iterdir())
        np.testing.assert_allclose(answer(tmp_path / "there" / "m.onnx", images), model(images).detach(), atol=1e-4)

    def test_a_failure_leaves_the_old_pair(self, model, images, tmp_path, monkeypatch):
        """Where verification fails, an older file and its weights stay as they were."""
        monkeypatch.setattr(exporter, "ONE_FILE", 100)
        normswap.to_onnx(model, tmp_path / "m.onnx", example=images)
        old = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
        monkeypatch.setattr(exporter, "verify", lambda *_, **__: exporter.Verdict((), ("wrong",)))
        with pytest.raises(normswap.errors.VerificationError):
            normswap.to_onnx(model, tmp_path / "m.onnx", example=images, overwrite=True)

        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == old

    def test_a_pair_takes_the_place_of_a_pair(self, model, images, tmp_path, monkeypatch):
        """New weights have another name till the new file is there, for the old one to be whole; then the old go."""
        monkeypatch.setattr(exporter, "ONE_FILE", 100)
        (tmp_path / "m.onnx.1.data").write_text("someone's")
        normswap.to_onnx(model, tmp_path / "m.onnx", example=images)
        normswap.to_onnx(patched(model, "gn", images), tmp_path / "m.onnx", example=images, overwrite=True)

        assert sorted(os.listdir(tmp_path)) == ["m.onnx", "m.onnx.1.data", "m.onnx.2.data"]
        assert (tmp_path / "m.onnx.1.data").read_text() == "someone's"
        np.testing.assert_allclose(answer(tmp_path / "m.onnx", images), model(images).detach(), atol=1e-4)

        monkeypatch.setattr(exporter, "ONE_FILE", 2**31)
        normswap.to_onnx(model, tmp_path / "m.onnx", example=images, overwrite=True)
        assert sorted(os.listdir(tmp_path)) == ["m.onnx", "m.onnx.1.data"]

    def test_layers_that_are_no_batch_norms_stay_right(self, tmp_path):
        """InstanceNorm with running statistics and channels-last LayerNorm stay right beside a patched norm."""

        class Last(nn.LayerNorm):
            def forward(self, x):
                return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

        model = nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.InstanceNorm2d(6, track_running_stats=True), Last(6)
        )
        x = torch.randn(2, 3, 9, 9)
        report = normswap.to_onnx(patched(trained_(model), "sn", x), tmp_path / "m.onnx", example=x)

        assert report.verdict
        assert operators(tmp_path / "m.onnx")["LayerNormalization"] == 1

    @pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
    def test_a_missing_package_is_named(self, tmp_path, package):
        """A package that is not installed is named with the command that installs it, without a traceback."""
        (tmp_path / "net.py").write_text(
            "from torch import nn\ndef build():\n    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))\n"
        )
        code = f"import sys; sys.modules[{package!r}] = None; from normswap.cli import main; main()"
        arguments = ["export", f"{tmp_path}/net.py:build", "--input-shape", "3,8,8", "-o", f"{tmp_path}/m.onnx"]
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)

        assert done.returncode == 6
        assert "Traceback" not in done.stderr
        assert "pip install 'normswap[onnx]'" in done.stderr
        assert not (tmp_path / "m.onnx").exists()


def test_command_line(tmp_path):
    """`export` takes the options and tells nodes, size and the time of a bundle's file beside its original's."""
    layers = "nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()"
    (tmp_path / "net.py").write_text(f"from torch import nn\ndef build():\n    return nn.Sequential({layers})\n")
    run = CliRunner().invoke
    bundle, file = str(tmp_path / "bundle"), str(tmp_path / "m.onnx")
    patch = ["patch", f"{tmp_path}/net.py:build", "--to", "sn", "--input-shape", "3,8,8", "-o", bundle]
    assert run(main, patch, catch_exceptions=False).exit_code == 0
    options = ["--runtime", "ort", "--dynamic-size", "--opset", "21", "--json"]
    result = run(main, ["export", bundle, "-o", file, *options], catch_exceptions=False)
    shown = json.loads(result.stdout)

    assert result.exit_code == 0
    assert [row["file"] for row in shown["files"]] == ["its original", file]
    assert [row["nodes"] for row in shown["files"]] == [2, shown["nodes"]]
    assert all(row["least, batch 1"] <= row["median ms, batch 1"] for row in shown["files"])
    assert shown["verdict"]["passed"]

    result = run(main, ["export", bundle, "-o", file, "--overwrite", "--no-latency", "--json"], catch_exceptions=False)
    assert list(json.loads(result.stdout)["files"][0]) == ["file", "nodes", "MB"]


def test_a_model_that_amplifies_rounding(tmp_path, monkeypatch):
    """Where the fast forms fail verification the file is written centred, and says so."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
    x = 30 + torch.randn(2, 3, 40, 40)
    normswap.patch(trained_(model), "gn", example=x)
    monkeypatch.setattr("normswap.export.forms.SAFE", float("inf"))
    monkeypatch.setattr("normswap.export.forms.LONG_SUM", 0)
    model[0].bias.data += 300
    report = normswap.to_onnx(model, tmp_path / "m.onnx", example=x)

    assert report.verdict
    assert report.kept == {"1": "its statistics are taken from each sample (centred)"}
    assert re.fullmatch(r"written again with every norm centred: as fast as can be, it was off by \S+", report.notes[0])
