"""Keras models to TFLite files, proved in LiteRT where it is installed."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import keras
import numpy as np
import pytest
from click.testing import CliRunner
from keras import layers

import normswap
from normswap.cli import main
from normswap.errors import InputError, MissingDependencyError, UnsupportedError
from normswap.export.devices import to_executorch, to_litert
from normswap.verification.runtimes.known import RUNTIMES, Runtime

from ..helpers import exactly
from .exporting import settled, small_net

STUB = Path(__file__).parent.parent / "stub_runtime.py"
needs_litert = pytest.mark.skipif(find_spec("ai_edge_litert") is None, reason="ai-edge-litert is missing")


def several():
    """Two inputs, one of whole numbers, to two outputs whose names are in no order."""
    keras.utils.set_random_seed(0)
    image, word = keras.Input((8, 8, 3), name="picture"), keras.Input((), dtype="int32", name="aside")
    x = layers.BatchNormalization()(layers.Conv2D(6, 3, groups=3)(image))
    x = layers.GlobalAveragePooling2D()(layers.ReLU()(x)) + layers.Embedding(7, 6)(word)
    return settled(keras.Model([image, word], [layers.Dense(4, name="z")(x), layers.Dense(2, name="a")(x)]))


@needs_litert
class TestInLiteRT:
    @pytest.mark.parametrize("target", ["sn", "brn", "gn", "in"])
    @pytest.mark.parametrize("build", [small_net, several])
    def test_every_norm(self, tmp_path, build, target):
        """The file computes what the patched model does, for any number of samples."""
        model = build()
        normswap.patch(model, target)

        report = to_litert(model, tmp_path / "net.tflite")

        assert report.verdict
        assert {check.batch for check in report.verdict.checks} >= {1, 2, 3, 5}
        assert {check.runtime for check in report.verdict.checks} == {"litert"}
        assert {name: shape[0] for name, shape in report.inputs.items()} == dict.fromkeys(report.inputs, "batch")
        assert (report.size, report.verdict.notes) == ((tmp_path / "net.tflite").stat().st_size, ())
        assert normswap.verify(model, tmp_path / "net.tflite", runtime="litert")

    def test_constant_statistics_leave_nothing(self, tmp_path):
        """BatchRenorm is folded by the converter: what is left are the other layers."""
        model = small_net()
        before = to_litert(model, tmp_path / "bn.tflite").nodes
        normswap.patch(model, "brn")

        assert to_litert(model, tmp_path / "brn.tflite").nodes == before

    def test_free_sizes(self, tmp_path):
        """Height and width stay open where the model leaves them so, and are tried."""
        model = small_net(shape=(None, None, 3))
        normswap.patch(model, "sn")
        image = np.random.default_rng(0).normal(size=(2, 12, 10, 3)).astype("float32")

        report = to_litert(model, tmp_path / "net.tflite", example=image, dynamic_size=True)

        assert report.inputs == {"image": ["batch", None, None, 3]}
        assert normswap.verify(model, tmp_path / "net.tflite", runtime="litert")

    def test_another_model(self, tmp_path):
        """A file of other weights fails, by the output and the runtime."""
        model = small_net()
        normswap.patch(model, "gn")
        to_litert(model, tmp_path / "net.tflite")
        layer = model.get_layer("conv")
        layer.set_weights([weight * 1.01 + 0.001 for weight in layer.get_weights()])

        verdict = normswap.verify(model, tmp_path / "net.tflite", runtime="litert")

        assert not verdict
        assert ", litert, optimisation on)" in str(verdict)

    def test_a_damaged_file(self, tmp_path):
        """What LiteRT does not read is refused with its reason, or it crashes, and this process goes on."""
        model = small_net()
        path = tmp_path / "net.tflite"
        to_litert(model, path)
        path.write_bytes(path.read_bytes()[:200])

        with pytest.raises(normswap.errors.NormswapError, match=r"^expected (a file that litert loads|litert to load)"):
            normswap.verify(model, path, runtime="litert")

    def test_without_the_framework(self, tmp_path):
        """A stored reference serves LiteRT too, whose outputs have no order."""
        model = several()
        normswap.patch(model, "sn")
        normswap.to_onnx(model, tmp_path / "net.onnx")
        to_litert(model, tmp_path / "net.tflite")
        assert normswap.verify(model, tmp_path / "net.onnx", save_reference=tmp_path / "r.npz")

        assert normswap.verify_against(tmp_path / "r.npz", tmp_path / "net.tflite", runtime="litert")

    def test_command(self, tmp_path, monkeypatch):
        """The file is written, proved and verified by commands, the one telling of the other."""
        monkeypatch.chdir(tmp_path)
        small_net().save("net.keras")
        assert CliRunner().invoke(main, ["patch", "net.keras", "--to", "gn", "-o", "net-gn"]).exit_code == 0

        export = ["export", "net-gn", "--runtime", "litert", "-o", "net.tflite"]
        written = CliRunner().invoke(main, export)
        told = json.loads(CliRunner().invoke(main, [*export, "--overwrite", "--json"]).stdout)

        assert written.exit_code == 0, written.stderr
        assert told["verdict"]["passed"] is True
        assert [each["name"] for each in told["verdict"]["runtimes"]] == ["litert"]
        assert "next: normswap verify net-gn net.tflite --runtime litert --data DATA\n" in written.stderr
        verified = CliRunner().invoke(main, ["verify", "net-gn", "net.tflite", "--runtime", "litert"])
        assert verified.exit_code == 0, verified.stderr


class TestRefusals:
    def test_torch(self, tmp_path):
        """A PyTorch model is sent to ONNX, which runs where LiteRT does."""
        torch = pytest.importorskip("torch")
        message = (
            "expected a Keras model for LiteRT, received one of torch; write an ONNX file, which onnxruntime, OpenVINO "
            "and onnxruntime-web run on every device that LiteRT does, or a file for ExecuTorch"
        )
        with pytest.raises(UnsupportedError, match=exactly(message)):
            to_litert(torch.nn.Sequential(torch.nn.Linear(2, 2)), tmp_path / "net.tflite")

    def test_another_backend(self, tmp_path, monkeypatch):
        """TensorFlow's converter needs TensorFlow's graph."""
        model = small_net()
        monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
        message = (
            "expected the tensorflow backend for LiteRT, received backend='jax'; save the model as .keras and export "
            "it with KERAS_BACKEND=tensorflow"
        )
        with pytest.raises(UnsupportedError, match=exactly(message)):
            to_litert(model, tmp_path / "net.tflite", example=np.zeros((2, 8, 8, 3), "float32"))

    def test_operators_that_tflite_lacks(self, tmp_path):
        """They are named, and no file is left."""
        image = keras.Input((4,))
        model = keras.Model(image, keras.ops.erfinv(layers.Dense(3, activation="tanh")(image)))

        with pytest.raises(
            UnsupportedError,
            match=r"^expected a model that TFLite can hold, received operators that it lacks: .*Erfinv",
        ):
            to_litert(model, tmp_path / "net.tflite")
        assert list(tmp_path.iterdir()) == []

    def test_missing(self, tmp_path, monkeypatch):
        """Without LiteRT nothing is proved, so nothing is written."""
        stub = Runtime("litert", (sys.executable, str(STUB), "missing"), "pip install ai-edge-litert", reads="TFLite")
        monkeypatch.setitem(RUNTIMES, "litert", stub)

        with pytest.raises(
            MissingDependencyError, match=r"for runtime='litert', received none \(.*\): pip install ai-edge"
        ):
            to_litert(small_net(), tmp_path / "net.tflite")
        assert list(tmp_path.iterdir()) == []

    def test_options_of_an_onnx_file(self):
        """An option that nothing reads is an error."""
        result = CliRunner().invoke(
            main, ["export", "m", "-o", "f.tflite", "--runtime", "litert", "--half", "--opset", "17"]
        )

        assert result.exit_code == 2
        assert "expected no option of an ONNX file beside --runtime litert, received --opset, --half" in result.stderr

    def test_executorch(self, tmp_path):
        """A Keras model has LiteRT."""
        message = "expected a PyTorch model for ExecuTorch, received one of keras; write a TFLite file for LiteRT"
        with pytest.raises(UnsupportedError, match=exactly(message)):
            to_executorch(small_net(), tmp_path / "net.pte")

    def test_a_tflite_file_in_onnxruntime(self, tmp_path):
        """It says which runtime reads the file."""
        path = tmp_path / "net.tflite"
        to_litert(small_net(), path, check=False)

        message = f"expected an ONNX file for onnxruntime, received {path}, which is for litert"
        with pytest.raises(InputError, match=exactly(message)):
            normswap.verify(small_net(), path)
