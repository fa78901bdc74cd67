"""PyTorch models to files of ExecuTorch, proved there where it is installed."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from torch import nn

import normswap
from normswap.cli import main
from normswap.errors import MissingDependencyError, UnsupportedError
from normswap.export.devices import to_executorch
from normswap.export.torch.volumes import VOLUMES
from normswap.models.torch import resnet_v1
from normswap.verification.elsewhere import Elsewhere
from normswap.verification.runtimes.child import RuntimeFailedError
from normswap.verification.runtimes.known import RUNTIMES, Runtime

from ..helpers import exactly
from .models import trained_
from .test_runtimes import SUBJECTS

STUB = Path(__file__).parent.parent / "stub_runtime.py"
needs_executorch = pytest.mark.skipif(find_spec("executorch") is None, reason="executorch is missing")


class Answers(nn.Module):
    """A network of one convolution that answers in the ways that a file has to sort out."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, image, *, shift):
        """Return the input itself, one value twice, a number and a constant, by name."""
        y = self.bn(self.conv(image)) + shift[:, None, None, None]
        return {"same": image, "y": [y, y], "count": 2 * image.shape[0], "constant": torch.arange(3.0)}


def volumes():
    """A network whose every layer is of volumes."""
    return nn.Sequential(
        nn.Conv3d(3, 8, 3, padding="same", dilation=(1, 2, 1)), nn.BatchNorm3d(8), nn.MaxPool3d(2), nn.ReLU(),
        nn.ConvTranspose3d(8, 6, 2, stride=2, groups=2), nn.BatchNorm3d(6), nn.Upsample(scale_factor=2),
    )  # fmt: skip


@needs_executorch
class TestInExecuTorch:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("subject", "target"),
        [("1-d", "sn"), ("2-d", "sn"), ("2-d", "brn"), ("2-d", "gn"), ("3-d", "sn"), ("3-d", "gn"), ("tokens", "brn")],
    )
    def test_every_norm(self, tmp_path, subject, target):
        """The file computes what the patched model does, on any axes and for any number of samples."""
        torch.manual_seed(0)
        model, example = SUBJECTS[subject]()
        trained_(model)
        normswap.patch(model, target, example=example)

        report = to_executorch(model, tmp_path / "net.pte", example=example)

        assert report.verdict
        assert {check.batch for check in report.verdict.checks} >= {1, 2, 3, 5} or subject == "tokens"
        assert {check.runtime for check in report.verdict.checks} == {"executorch"}
        assert {name: shape[0] for name, shape in report.inputs.items()} == dict.fromkeys(report.inputs, "batch")
        assert (report.size, report.notes) == ((tmp_path / "net.pte").stat().st_size, [])

    @pytest.mark.slow
    @pytest.mark.parametrize("target", ["sn", "brn", "gn"])
    def test_a_resnet(self, tmp_path, target):
        """A deep network is equal too; ExecuTorch's own GroupNorm is off by 2e-5 there."""
        torch.manual_seed(0)
        model = trained_(resnet_v1(18, classes=10, small_images=True)).eval()
        image = torch.randn(2, 3, 32, 32)
        normswap.patch(model, target, example=image)

        verdict = to_executorch(model, tmp_path / "net.pte", example=image).verdict

        assert verdict
        assert verdict.max_rel < 1e-5

    def test_volumes(self, tmp_path):
        """Convolutions of volumes, the transposed too, and pooling are written by those of maps."""
        torch.manual_seed(0)
        model, example = trained_(volumes()).eval(), torch.randn(2, 3, 6, 8, 8)
        normswap.patch(model, "gn", example=example)

        assert to_executorch(model, tmp_path / "net.pte", example=example).verdict

    def test_outputs(self, tmp_path):
        """Outputs have the model's names; the input itself, one value twice, numbers and constants are outputs."""
        torch.manual_seed(0)
        model = trained_(Answers()).eval()
        example = normswap.Inputs(torch.randn(2, 3, 8, 8), shift=torch.randn(2))

        report = to_executorch(model, tmp_path / "net.pte", example=example)

        assert report.inputs == {"image": ["batch", 3, 8, 8], "shift": ["batch"]}
        with Elsewhere("executorch", tmp_path / "net.pte", None, 60) as there:
            assert there.outputs == ["same", "y_0", "y_1", "count", "constant"]

    def test_most_samples(self, tmp_path):
        """The batch is open up to 32 samples, or the example's; what is more is refused by number."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
        for samples, most in ((1, 32), (40, 40)):
            path = tmp_path / f"{samples}.pte"
            to_executorch(model, path, example=torch.randn(samples, 3))
            with Elsewhere("executorch", path, None, 60) as there:
                child = there._child
                assert child.run({"input": np.zeros((most, 3), "float32")})["output"].shape == (most, 4)
                with pytest.raises(RuntimeFailedError, match=exactly(f"it takes at most {most} samples at once")):
                    child.run({"input": np.zeros((most + 1, 3), "float32")})

    def test_a_fixed_batch(self, tmp_path):
        """A model that fixes its batch has it fixed, with a note."""

        class Two(nn.Sequential):
            def forward(self, x):
                first, second = super().forward(x)
                return first - second

        model = Two(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()

        report = to_executorch(model, tmp_path / "net.pte", example=torch.randn(2, 3))

        assert report.inputs == {"x": [2, 3]}
        assert report.notes == ["the model fixes size 0 of x: the file takes 2 alone"]
        assert {check.batch for check in report.verdict.checks} == {2}

    def test_another_model(self, tmp_path):
        """A file of other weights fails, by the output and the runtime."""
        torch.manual_seed(0)
        model, example = SUBJECTS["2-d"]()
        to_executorch(model.eval(), tmp_path / "net.pte", example=example)
        with torch.no_grad():
            next(model.parameters()).mul_(1.01)

        verdict = normswap.verify(model, tmp_path / "net.pte", example=example, runtime="executorch")

        assert not verdict
        assert ", executorch, optimisation on)" in str(verdict)

    def test_a_damaged_file(self, tmp_path):
        """What ExecuTorch does not read is refused with its reason, or it crashes, and this process goes on."""
        model, path = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval(), tmp_path / "net.pte"
        to_executorch(model, path, example=torch.randn(2, 3))
        path.write_bytes(path.read_bytes()[:200])

        with pytest.raises(
            normswap.errors.NormswapError, match=r"^expected (a file that executorch loads|executorch to)"
        ):
            normswap.verify(model, path, runtime="executorch")

    def test_a_file_of_others(self, tmp_path):
        """A file that does not tell its names is refused with what writes one that does."""
        from executorch.exir import to_edge

        model = nn.Sequential(nn.Linear(3, 4), nn.ReLU()).eval()
        program = to_edge(torch.export.export(model, (torch.randn(2, 3),))).to_executorch()
        (tmp_path / "net.pte").write_bytes(program.buffer)

        message = (
            f"expected a file that executorch loads, received {tmp_path / 'net.pte'}, which it refuses: it does not "
            "tell the names of its inputs and outputs, as a file of normswap export does; update executorch, or "
            "leave it out of runtime"
        )
        with pytest.raises(UnsupportedError, match=exactly(message)):
            normswap.verify(model, tmp_path / "net.pte", runtime="executorch")

    def test_operators_that_executorch_lacks(self, tmp_path):
        """They are named, and no file is left."""
        model = nn.Sequential(nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4), nn.AvgPool3d(2)).eval()

        message = "expected a model that ExecuTorch can hold, received operators that it lacks: aten::avg_pool3d.out"
        with pytest.raises(UnsupportedError, match=exactly(message)):
            to_executorch(model, tmp_path / "net.pte", example=torch.randn(2, 3, 6, 6, 6))
        assert list(tmp_path.iterdir()) == []

    def test_what_torch_does_not_export(self, tmp_path):
        """A model that torch.export fails on is told by the reason and the place."""

        class Deciding(nn.Module):
            def __init__(self):
                super().__init__()
                self.bn = nn.BatchNorm1d(3)

            def forward(self, x):
                return self.bn(x) if x.sum() > 0 else x

        with pytest.raises(
            UnsupportedError, match=r"^expected a model torch\.export can export, received Deciding on which it fails: "
        ):
            to_executorch(Deciding().eval(), tmp_path / "net.pte", example=torch.ones(2, 3))

    def test_command(self, tmp_path, monkeypatch):
        """The file is written, proved and verified by commands, the one telling of the other."""
        monkeypatch.chdir(tmp_path)
        Path("net.py").write_text(
            "import torch\nfrom torch import nn\ndef build():\n    torch.manual_seed(0)\n"
            "    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 3)).eval()\n"
        )
        export = ["export", "net.py:build", "--input-shape", "3,8,8", "--runtime", "executorch", "-o", "net.pte"]

        written = CliRunner().invoke(main, [*export, "--json"])

        assert written.exit_code == 0, written.stderr
        told = json.loads(written.stdout)
        assert told["verdict"]["passed"] is True
        assert [each["name"] for each in told["verdict"]["runtimes"]] == ["executorch"]
        verified = CliRunner().invoke(main, ["verify", "net.py:build", "net.pte", "--runtime", "executorch"])
        assert verified.exit_code == 0, verified.stderr


class TestRefusals:
    def test_missing(self, tmp_path, monkeypatch):
        """Without ExecuTorch there is nothing to write with, and a file that is there is not proved."""
        message = r"^expected executorch for runtime='executorch', received none \(.*\): pip install executorch$"
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
        monkeypatch.setitem(sys.modules, "executorch", None)
        for name in [name for name in sys.modules if name.startswith("executorch.")]:
            monkeypatch.delitem(sys.modules, name)
        with pytest.raises(MissingDependencyError, match=message):
            to_executorch(model, tmp_path / "net.pte", example=torch.randn(2, 3))
        assert list(tmp_path.iterdir()) == []
        stub = Runtime("executorch", (sys.executable, str(STUB), "missing"), "pip install executorch", "ExecuTorch")
        monkeypatch.setitem(RUNTIMES, "executorch", stub)
        (tmp_path / "net.pte").write_bytes(b"<\0\0\0ET12")
        with pytest.raises(MissingDependencyError, match=r"^expected stub for runtime='executorch', received none"):
            normswap.verify(model, tmp_path / "net.pte", runtime="executorch")

    def test_options_of_an_onnx_file(self):
        """An option that nothing reads is an error."""
        export = ["export", "m", "-o", "f.pte", "--runtime", "executorch"]
        half = CliRunner().invoke(main, [*export, "--half"])
        size = CliRunner().invoke(main, [*export, "--dynamic-size"])

        assert (half.exit_code, size.exit_code) == (2, 2)
        assert "expected no option of an ONNX file beside --runtime executorch, received --half" in half.stderr
        message = "expected the example's own size, which ExecuTorch plans its memory for, received --dynamic-size"
        assert message in size.stderr


AXES = [
    ((3,), (1,), (0,), (1,)),
    ((2, 3, 1), (2, 1, 3), (1, 2, 0), (2, 1, 1)),
    ((1, 1, 2), (3, 2, 2), (0, 0, 1), (1, 2, 2)),
]


class TestVolumes:
    """What takes the place of torch's operators on volumes is what they compute."""

    aten = torch.ops.aten

    @pytest.mark.parametrize("groups", [1, 2])
    @pytest.mark.parametrize(("kernel", "stride", "padding", "dilation"), AXES)
    def test_convolutions(self, kernel, stride, padding, dilation, groups):
        """Of any stride, padding and dilation, in groups, and transposed."""
        torch.manual_seed(0)
        x, bias, sizes = torch.randn(2, 4, 7, 8, 9).double(), torch.randn(6).double(), kernel * (3 // len(kernel))
        weight, back = torch.randn(6, 4 // groups, *sizes).double(), torch.randn(4, 6 // groups, *sizes).double()
        extra = [
            max(s, d) - 1 for s, d in zip(stride * (3 // len(stride)), dilation * (3 // len(dilation)), strict=True)
        ]
        conv, transposed = VOLUMES[self.aten.conv3d.default], VOLUMES[self.aten.conv_transpose3d.input]
        same = VOLUMES[self.aten.conv3d.padding]

        torch.testing.assert_close(
            conv(x, weight, bias, stride, padding, dilation, groups),
            F.conv3d(x, weight, bias, stride, padding, dilation, groups),
        )
        torch.testing.assert_close(
            transposed(x, back, bias, stride, padding, extra, groups, dilation),
            F.conv_transpose3d(x, back, bias, stride, padding, extra, groups, dilation),
        )
        for word in ("same", "valid"):
            torch.testing.assert_close(
                same(x, weight, None, [1], word, dilation, groups), F.conv3d(x, weight, None, 1, word, dilation, groups)
            )

    @pytest.mark.parametrize("ceil", [False, True])
    def test_pooling(self, ceil):
        """The largest in a window, padded or not, of strides of its own or the window's."""
        torch.manual_seed(0)
        x, pool = torch.randn(2, 4, 7, 8, 9), VOLUMES[self.aten.max_pool3d.default]
        for window in (((2,),), ((3, 2, 2), (2, 1, 3), (1, 0, 1), (1, 2, 1))):
            assert torch.equal(pool(x, *window, ceil_mode=ceil), self.aten.max_pool3d(x, *window, ceil_mode=ceil))
