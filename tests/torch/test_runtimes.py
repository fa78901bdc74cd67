"""Files in other runtimes than onnxruntime: the contract, by a runtime that fails on purpose, and those installed."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx import numpy_helper
from torch import nn

import normswap
from normswap.cli import main
from normswap.errors import InputError, MissingDependencyError, UnsupportedError, VerificationError
from normswap.models.torch import resnet_v1
from normswap.verification.runtimes.known import RUNTIMES, Runtime

from ..helpers import exactly
from .models import trained_

STUB = Path(__file__).parent.parent / "stub_runtime.py"


def has_web():
    """Whether node finds onnxruntime-web from here."""
    asked = "require.resolve('onnxruntime-web', {paths: [process.cwd()]})"
    return (
        shutil.which("node") is not None and not subprocess.run(["node", "-e", asked], capture_output=True).returncode
    )


INSTALLED = [
    pytest.param("openvino", marks=pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is missing")),
    pytest.param("web", marks=pytest.mark.skipif(not has_web(), reason="node or onnxruntime-web is missing")),
]


@pytest.fixture
def stub(monkeypatch):
    """A function that puts a runtime which behaves in a way of its own in OpenVINO's place."""

    def put(way, command=(sys.executable, str(STUB)), **facts):
        monkeypatch.setitem(
            RUNTIMES, "openvino", Runtime("openvino", (*command, way), "pip install openvino", lowers=True, **facts)
        )

    return put


def children():
    """The processes that this one has started and that are still there."""
    own = Path(f"/proc/self/task/{os.getpid()}/children")
    return set(own.read_text().split()) if own.exists() else set()


class TestContract:
    """What any runtime may do to the command that asks it."""

    def test_a_right_one(self, proven, stub):
        """It is held to the same batches, and what it does by default is told beside and does not count."""
        model, path, _ = proven("sn")
        stub("right")

        verdict = normswap.verify(model, path, runtime="openvino")

        assert verdict
        assert [(c.runtime, c.batch, c.inputs, c.optimisation) for c in verdict.checks] == [
            ("openvino", batch, inputs, "on") for batch, inputs in ((1, "x1"), (2, "x0.1"), (5, "x1"), (3, "x100"))
        ]
        (told,) = json.loads(json.dumps(verdict.to_dict()))["runtimes"]
        assert told.pop("default_max_rel") == pytest.approx(0.01, rel=0.01)
        assert told.pop("max_rel") == verdict.max_rel < 5e-6
        assert told == {
            "name": "openvino",
            "version": "1.0",
            "precision": "f32",
            "default_precision": "bf16",
            "checks": 4,
            "failed": 0,
        }
        assert str(verdict).splitlines() == [
            f"openvino 1.0 in f32: 4 checks, largest difference {verdict.max_rel:.1e} of scale; "
            "at its default precision bf16 1.0e-02",
            f"passed: 4 checks, largest difference {verdict.max_rel:.1e} of scale",
        ]

    def test_several(self, proven, stub):
        """Each has its own checks and facts, in the order asked for, once."""
        model, path, _ = proven("sn")
        stub("right")

        verdict = normswap.verify(model, path, runtime=["openvino", "onnxruntime", "openvino"])

        assert verdict
        assert [check.runtime for check in verdict.checks] == ["openvino"] * 4 + ["onnxruntime"] * 8
        assert [ran.name for ran in verdict.runtimes] == ["openvino", "onnxruntime"]

    def test_one_that_is_wrong_among_right_ones(self, proven, stub):
        """A file is right if it is in every runtime asked for; the verdict names the one where it is not."""
        model, path, _ = proven("sn")
        stub("wrong")

        verdict = normswap.verify(model, path, runtime=["onnxruntime", "openvino"])

        assert not verdict
        assert [check.runtime for check in verdict.checks if not check.passed] == ["openvino"] * 4
        assert re.search(
            r"times the framework's own error \(batch \d(, inputs x[\d.]+)?, openvino, optimisation on\)", str(verdict)
        )
        assert normswap.verify(model, path, runtime="onnxruntime")

    def test_one_that_needs_another_form(self, proven, stub):
        """Where a runtime is known to be less exact with an operator, a file that has it is told the way out."""
        told = "note: openvino is less exact with InstanceNormalization than others are: export with runtime='openvino'"

        stub("wrong", inexact="InstanceNormalization")
        with_it, without_it = (normswap.verify(*proven(target)[:2], runtime="openvino") for target in ("gn", "sn"))
        stub("right", inexact="InstanceNormalization")
        right = normswap.verify(*proven("gn")[:2], runtime="openvino")

        assert (bool(with_it), bool(without_it), bool(right)) == (False, False, True)
        assert [told in str(verdict) for verdict in (with_it, without_it, right)] == [True, False, False]

    @pytest.mark.parametrize("way", ["not finite", "another shape"])
    def test_what_is_no_answer(self, proven, stub, way):
        """Values that are not finite or of another shape fail."""
        model, path, _ = proven("sn")
        stub(way)

        verdict = normswap.verify(model, path, runtime="openvino")

        assert not verdict
        assert [check.passed for check in verdict.checks] == [False] * 4

    def test_a_wrong_layer_is_named(self, proven, stub, tmp_path):
        """A file that is wrong is asked for its layers in the runtime, too."""
        model, path, _ = proven("sn")
        proto = onnx.load(path)
        changed = next(tensor for tensor in proto.graph.initializer if tensor.name.endswith("/gamma"))
        changed.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(changed) * np.float32(1.01), changed.name))
        onnx.save(proto, tmp_path / "wrong.onnx")
        stub("right")

        verdict = normswap.verify(model, tmp_path / "wrong.onnx", runtime="openvino")

        assert verdict.first_diverging == normswap.verify(model, tmp_path / "wrong.onnx").first_diverging
        assert f"{verdict.first_diverging}/gamma" == changed.name

    @pytest.mark.parametrize(
        ("way", "reason"),
        [
            ("crashes", "its process was ended by SIGABRT: stub: out of luck"),
            ("ends", "its process ended with exit code 3"),
            ("raises", "five is too many"),
        ],
    )
    def test_a_failure_on_one_batch(self, proven, stub, way, reason):
        """A crash costs its own batch and no other, and is told with the runtime's name and last words."""
        model, path, _ = proven("sn")
        stub(way)

        verdict = normswap.verify(model, path, runtime="openvino")

        assert not verdict
        assert [check.batch for check in verdict.checks] == [1, 2, 3]
        shape = (5, *verdict_shape(path))
        assert verdict.problems == (f"openvino fails on inputs of shape {shape}, which the model takes: {reason}",)

    @pytest.mark.parametrize(
        ("way", "error", "message"),
        [
            (
                "missing",
                MissingDependencyError,
                "expected stub for runtime='openvino', received none (No module named 'stub'): pip install openvino",
            ),
            (
                "refuses",
                UnsupportedError,
                "expected a file that openvino loads, received {path}, which it refuses: no kernel for Conv; update "
                "openvino, or leave it out of runtime",
            ),
            (
                "crashes at load",
                VerificationError,
                "expected openvino to load {path}, received a failure: its process was ended by SIGSEGV; update "
                "openvino, or leave it out of runtime",
            ),
            (
                "hangs at load",
                InputError,
                "expected the file loaded by openvino within 8 s, received none; allow more by timeout",
            ),
            (
                "hangs",
                InputError,
                "expected the file's outputs for inputs of shape {shape} by openvino within 8 s, received none; "
                "allow more by timeout",
            ),
        ],
    )
    def test_no_verdict(self, proven, stub, way, error, message):
        """What is no answer at all is an error with the runtime's name; no process is left."""
        model, path, _ = proven("sn")
        stub(way)
        before = children()

        with pytest.raises(error, match=exactly(message.format(path=path, shape=(5, *verdict_shape(path))))):
            normswap.verify(model, path, runtime="openvino", timeout=8)

        assert children() <= before

    def test_no_command(self, proven, stub):
        """A command that is not there is told with what brings it."""
        model, path, _ = proven("sn")
        stub("", command=("no-such-command",))

        message = "expected no-such-command for runtime='openvino', received none (it is not installed): "
        with pytest.raises(MissingDependencyError, match=exactly(f"{message}pip install openvino")):
            normswap.verify(model, path, runtime="openvino")

    def test_chatter(self, proven, stub):
        """What a runtime prints, however much, is in nobody's way."""
        model, path, _ = proven("sn")
        stub("chats")

        assert normswap.verify(model, path, runtime="openvino")

    def test_a_failure_by_default(self, proven, stub):
        """A runtime that fails at its default precision alone passes, with a note."""
        model, path, _ = proven("sn")
        stub("fails by default")

        verdict = normswap.verify(model, path, runtime="openvino")

        assert verdict
        assert verdict.notes == (
            f"openvino fails at its default precision: expected a file that openvino loads, received {path}, which it "
            "refuses: no bf16 here; update openvino, or leave it out of runtime",
        )
        assert str(verdict).splitlines()[1].endswith("; at its default precision unknown fails")

    def test_without_the_framework(self, proven, stub, tmp_path):
        """A stored reference serves every runtime."""
        model, path, _ = proven("sn")
        assert normswap.verify(model, path, save_reference=tmp_path / "r.npz")

        stub("right")
        assert normswap.verify_against(tmp_path / "r.npz", path, runtime="openvino")
        stub("wrong")
        assert not normswap.verify_against(tmp_path / "r.npz", path, runtime="openvino")

    def test_names(self, proven):
        """A name that is none is refused with those there are."""
        model, path, _ = proven("sn")
        known = "onnxruntime, openvino, web, litert, executorch, ncnn, cuda, tensorrt"

        with pytest.raises(InputError, match=exactly(f"expected a runtime of {known}, received runtime='tvm'")):
            normswap.verify(model, path, runtime=["openvino", "tvm"])
        with pytest.raises(InputError, match=exactly(f"expected a runtime of {known}, received none")):
            normswap.verify(model, path, runtime=[])

    def test_a_file_of_another_kind(self, proven, tmp_path):
        """Which files a runtime reads is told before anything is run."""
        model, path, _ = proven("sn")
        message = f"expected a TFLite file for litert, received {path}, which is for onnxruntime, openvino, web, ncnn, "
        with pytest.raises(InputError, match=exactly(f"{message}cuda, tensorrt")):
            normswap.verify(model, path, runtime="litert")
        (tmp_path / "net.tflite").write_bytes(b"\x1c\0\0\0TFL3")
        message = f"expected an ONNX file for onnxruntime, received {tmp_path / 'net.tflite'}, which is for litert"
        with pytest.raises(InputError, match=exactly(message)):
            normswap.verify(model, tmp_path / "net.tflite")
        (tmp_path / "net.pte").write_bytes(b"<\0\0\0ET12")
        message = f"expected an ONNX file for web, received {tmp_path / 'net.pte'}, which is for executorch"
        with pytest.raises(InputError, match=exactly(message)):
            normswap.verify(model, tmp_path / "net.pte", runtime=["executorch", "web"])
        message = f"expected an ExecuTorch file for executorch, received {tmp_path / 'net.tflite'}, which is for litert"
        with pytest.raises(InputError, match=exactly(message)):
            normswap.verify(model, tmp_path / "net.tflite", runtime="executorch")

    def test_cuda(self, proven):
        """A provider that does not start is missing, as it is here."""
        import onnxruntime

        if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            pytest.skip("it may start here")
        model, path, _ = proven("sn")
        with pytest.raises(
            MissingDependencyError, match=r"^expected onnxruntime-gpu for runtime='cuda', received none"
        ):
            normswap.verify(model, path, runtime="cuda")


def verdict_shape(path):
    """The shape of one sample of a file's one input."""
    (entry,) = onnx.load(path).graph.input
    return tuple(size.dim_value for size in entry.type.tensor_type.shape.dim[1:])


class TestCommand:
    """``normswap verify --runtime``."""

    @pytest.mark.parametrize(
        ("way", "code", "said"),
        [
            ("right", 0, "passed: 4 checks"),
            ("wrong", 5, "openvino, optimisation on)"),
            ("crashes", 5, "openvino fails on inputs of shape (5, 3, 8, 8), which the model takes: its process was"),
            ("crashes at load", 5, "expected openvino to load net.onnx, received a failure: its process was ended"),
            ("missing", 6, "pip install openvino"),
            ("refuses", 4, "expected a file that openvino loads, received net.onnx, which it refuses: no kernel"),
            ("hangs", 3, "by openvino within 8 s, received none; allow more by --timeout"),
        ],
    )
    def test_exit_codes(self, stub, tmp_path, monkeypatch, way, code, said):
        """Each failure has its code of the table, and the message names the runtime."""
        monkeypatch.chdir(tmp_path)
        Path("net.py").write_text(
            "import torch\nfrom torch import nn\ndef build():\n    torch.manual_seed(0)\n"
            "    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 3)).eval()\n"
        )
        options = ["net.py:build", "--input-shape", "3,8,8"]
        assert CliRunner().invoke(main, ["export", *options, "-o", "net.onnx"]).exit_code == 0
        stub(way)

        result = CliRunner().invoke(
            main, ["verify", "net.py:build", "net.onnx", "--runtime", "openvino", "--timeout", "8"]
        )

        assert result.exit_code == code, result.stderr
        assert said in result.stderr

    def test_a_provider_of_no_runtime(self, tmp_path):
        """Providers are onnxruntime's; without it they are an option that nothing reads."""
        result = CliRunner().invoke(main, ["verify", "m", "f.onnx", "--runtime", "openvino", "--provider", "cpu"])

        assert result.exit_code == 2
        assert "expected --runtime onnxruntime beside the providers of it, received --provider\n" in result.stderr


class Words(nn.Module):
    """Tokens and a mask to scores."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 16)
        self.conv, self.bn = nn.Conv1d(16, 16, 3, padding=1), nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 3)

    def forward(self, ids, mask):
        """Return scores of the mean over the tokens that count."""
        x = torch.relu(self.bn(self.conv(self.table(ids).transpose(1, 2))))
        weight = mask[:, None].float()
        return self.head((x * weight).sum(2) / weight.sum(2))


def maps(axes):
    """A network on maps of so many axes, with a convolution in groups and two outputs."""
    conv, norm = getattr(nn, f"Conv{axes}d"), getattr(nn, f"BatchNorm{axes}d")

    class Maps(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = conv(3, 16, 3, padding=1), norm(16)
            self.conv2, self.bn2 = conv(16, 16, 3, stride=2, groups=4), norm(16)

        def forward(self, x):
            x = torch.relu(self.bn1(self.conv1(x)))
            y = torch.relu(self.bn2(self.conv2(x)))
            return y.flatten(2).mean(2), x

    return Maps()


SUBJECTS = {
    "1-d": lambda: (maps(1), torch.randn(2, 3, 20)),
    "2-d": lambda: (maps(2), torch.randn(2, 3, 12, 10)),
    "3-d": lambda: (maps(3), torch.randn(2, 3, 6, 8, 7)),
    "tokens": lambda: (Words(), (torch.randint(0, 50, (4, 12)), torch.ones(4, 12, dtype=torch.long))),
}


@pytest.mark.parametrize("runtime", INSTALLED)
class TestInstalled:
    """Each runtime that is here, as far as it is."""

    @pytest.mark.parametrize("subject", SUBJECTS)
    def test_every_form(self, runtime, subject, tmp_path):
        """The portable file of each kind of norm is the model, and one whose weights were moved is not."""
        torch.manual_seed(0)
        for target in ("sn", "brn", "gn"):
            model, example = SUBJECTS[subject]()
            trained_(model)
            normswap.patch(model, target, example=example)
            path = tmp_path / f"{target}.onnx"
            normswap.to_onnx(model, path, example=example)

            verdict = normswap.verify(model, path, example=example, runtime=runtime)

            assert verdict, f"{target}: {verdict}"
            assert verdict.notes == ()
        with torch.no_grad():
            next(model.parameters()).mul_(1.01)
        wrong = normswap.verify(model, path, example=example, runtime=runtime)
        assert not wrong
        assert wrong.first_diverging == next(iter(model.named_children()))[0]

    def test_free_sizes(self, runtime, tmp_path):
        """A file of free height and width is right at more than one."""
        torch.manual_seed(0)
        for target in ("sn", "gn"):
            model, example = SUBJECTS["2-d"]()
            trained_(model)
            normswap.patch(model, target, example=example)
            normswap.to_onnx(model, tmp_path / f"{target}.onnx", example=example, dynamic_size=True)

            assert normswap.verify(model, tmp_path / f"{target}.onnx", runtime=runtime)

    def test_long_sums(self, runtime, tmp_path):
        """A ResNet with GroupNorms, whose roundings add up, is right in the form that its runtime's sums need."""
        model = resnet_v1(18, classes=4).eval()
        example = torch.randn(2, 3, 32, 32)
        normswap.patch(model, "gn", example=example)
        path = tmp_path / "net.onnx"
        normswap.to_onnx(model, path, example=example, runtime="web" if runtime == "web" else "portable")

        assert normswap.verify(model, path, example=example, runtime=runtime)

    def test_weights_beside_the_file(self, runtime, proven, tmp_path):
        """External data is found where the file is."""
        model, path, _ = proven("gn")
        onnx.save(
            onnx.load(path), tmp_path / "net.onnx", save_as_external_data=True, location="net.data", size_threshold=256
        )

        assert (tmp_path / "net.data").stat().st_size > 0
        assert normswap.verify(model, tmp_path / "net.onnx", runtime=runtime)


@pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is missing")
def test_openvino_tells_nobody(tmp_path, monkeypatch, proven):
    """OpenVINO reports each import of it, by files in the home folder, unless it is kept from that."""
    model, path, _ = proven("sn")
    monkeypatch.setenv("HOME", str(tmp_path))

    assert normswap.verify(model, path, runtime="openvino")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(find_spec("ncnn") is None or find_spec("pnnx") is None, reason="ncnn or pnnx is missing")
class TestInNcnn:
    """ncnn, which takes one sample, of the file that pnnx makes of one of opset 17."""

    @pytest.mark.parametrize("target", ["sn", "brn"])
    @pytest.mark.parametrize("subject", ["1-d", "2-d", "3-d"])
    def test_what_is_right(self, tmp_path, subject, target):
        """Files of norms without InstanceNormalization are the model, and one whose weights were moved is not."""
        torch.manual_seed(0)
        model, example = SUBJECTS[subject]()
        trained_(model)
        normswap.patch(model, target, example=example)
        normswap.to_onnx(model, tmp_path / "net.onnx", example=example, opset=17)

        verdict = normswap.verify(model, tmp_path / "net.onnx", example=example, runtime="ncnn")

        assert verdict
        assert {check.batch for check in verdict.checks} >= {1, 2, 3, 5}
        with torch.no_grad():
            next(model.parameters()).mul_(1.01)
        assert not normswap.verify(model, tmp_path / "net.onnx", example=example, runtime="ncnn")

    @pytest.mark.parametrize(
        ("target", "opset", "form", "why"),
        [
            ("brn", 20, {}, "pnnx loses the axes of ReduceMean from opset 18 on; export it with opset 17"),
            ("gn", 17, {}, "it lacks nn.InstanceNorm1d"),
            ("brn", 17, {"dynamic_size": True}, "x has other sizes than an open batch and fixed ones behind it"),
        ],
    )
    def test_what_would_be_wrong(self, tmp_path, target, opset, form, why):
        """What pnnx and ncnn get wrong without a word, or crash on, is refused with the reason."""
        torch.manual_seed(0)
        model, example = SUBJECTS["2-d"]()
        trained_(model)
        normswap.patch(model, target, example=example)
        path = tmp_path / "net.onnx"
        normswap.to_onnx(model, path, example=example, opset=opset, **form)

        message = f"expected a file that ncnn loads, received {path}, which it refuses: {why}; "
        message += "update ncnn, or leave it out of runtime"
        with pytest.raises(UnsupportedError, match=exactly(message)):
            normswap.verify(model, path, example=example, runtime="ncnn")
