"""Export and verification of PyTorch models."""

import json
import os
import runpy
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import normswap
from normswap import GroupNorm, SwitchNorm
from normswap.errors import InputError, OutputExistsError, UnsupportedError
from normswap.export.fold import scale_weight
from normswap.layers.torch import SwitchNorm1d, SwitchNorm2d, SwitchNorm3d

from ..helpers import exactly
from .models import trained_

TARGETS = ["bn", "sn", "brn", "gn", "ln", "in"]
NET = """
import normswap
import torch
from torch import nn


def export(path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)).eval()
    x = torch.randn(2, 3, 8, 8)
    normswap.patch(model, "sn", example=x, exclude=["3"])
    normswap.to_onnx(model, path, example=x)
"""


def export(model, path, example, target="bn", **options):
    """Patch (unless to "bn") and export."""
    if target != "bn":
        normswap.patch(model, target, example=example)
    return normswap.to_onnx(model, path, example=example, **options)


class ChannelsLast(nn.Linear):
    """A linear layer on a sequence (N, L, 4) whose output is (N, 6, L), as a BatchNorm1d takes it."""

    def __init__(self, bias):
        super().__init__(4, 6, bias=bias)

    def forward(self, x):
        return super().forward(x).transpose(1, 2)


class Between(nn.Module):
    """A linear layer, what ``between`` does to its channels, which come second or last, and a norm."""

    def __init__(self, layer, channels, between):
        super().__init__()
        self.layer, self.between = layer, between
        self.last = isinstance(layer, nn.Linear)
        self.one, self.two = nn.Parameter(torch.randn(channels)), nn.Parameter(torch.rand(channels) + 0.5)
        self.norm = nn.BatchNorm1d(channels) if self.last else nn.BatchNorm2d(channels)

    def forward(self, x):
        y = self.layer(x)
        if self.last:
            return self.norm(self.between(y, self.one, self.two).transpose(1, 2))
        return self.norm(self.between(y, self.one.view(-1, 1, 1), self.two.view(1, -1, 1, 1)))


def places(y):
    """Return a constant that differs along the last axis of a map, or along a sequence."""
    return torch.arange(float(y.shape[-1])) if y.dim() == 4 else torch.arange(float(y.shape[1])).view(-1, 1)


class Moved(nn.Module):
    """A layer, and a norm behind what ``there`` makes of its output."""

    def __init__(self, layer, there, channels):
        super().__init__()
        self.layer, self.there, self.norm = layer, there, nn.BatchNorm1d(channels)

    def forward(self, x):
        return self.norm(self.there(self.layer(x))).relu()


def there_and_back(y):
    """Return a sequence as it is, by way of four dimensions and of channels that come last."""
    return y[:, None].transpose(1, 3).squeeze(-1).transpose(1, 2)


def shuffled(y):
    """Return a map whose channels are in another order, as ShuffleNet has it."""
    return y.unflatten(1, (2, 3)).transpose(1, 2).flatten(1, 2).flatten(2)


BEFORE = {
    "linear": (lambda: nn.Linear(4, 6), 6, (5, 4)),
    "linear without bias": (lambda: nn.Linear(4, 6, bias=False), 6, (5, 4)),
    "convolution": (lambda: nn.Conv2d(3, 6, 3, padding=1), 6, (3, 5, 7)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, bias=False), 6, (4, 5, 7)),
}
CONSTANTS = {
    "a shift": lambda y, one, two: y + one,
    "shifts in a row": lambda y, one, two: two + ((y + one) + 3.0),
    "scales in a row": lambda y, one, two: two * (y * one) * 0.5,
    "all of them": lambda y, one, two: ((y - one) * two + one) / two - 1.5,
    "swapped": lambda y, one, two: 2.0 - (one - y * two),
    "negated": lambda y, one, two: -(y / 4.0) + one,
}
OTHERS = {
    "a shift for each place": lambda y, one, two: y + places(y),
    "both": lambda y, one, two: (y + one) * (places(y) + 1),
    "a square": lambda y, one, two: (y + one) * (y + one),
    "a division by it": lambda y, one, two: two / (y * y + 1.0),
}
MOVED = {
    "rows of all samples": (lambda: Moved(nn.Linear(4, 6), lambda y: y.flatten(0, 1), 6), (5, 4)),
    "rows of a grid": (lambda: Moved(nn.Linear(4, 6, bias=False), lambda y: y.reshape(-1, 6), 6), (2, 5, 4)),
    "as many places as channels": (lambda: Moved(nn.Linear(4, 6), lambda y: y.flatten(0, 1), 6), (6, 4)),
    "a map as a sequence": (lambda: Moved(nn.Conv2d(3, 6, 3), lambda y: y.flatten(2), 6), (3, 6, 8)),
    "a map of one value": (lambda: Moved(nn.Conv2d(3, 6, 4), lambda y: y.flatten(1), 6), (3, 4, 4)),
    "squeezed": (lambda: Moved(nn.Conv2d(3, 6, (1, 3)), lambda y: y.squeeze(2), 6), (3, 1, 8)),
    "there and back": (lambda: Moved(nn.Conv1d(3, 6, 3), there_and_back, 6), (3, 8)),
    "a part of it": (lambda: Moved(nn.Linear(4, 6), lambda y: y[:, 1:3].transpose(1, 2), 6), (5, 4)),
    "the first of it": (lambda: Moved(nn.Linear(4, 6), lambda y: y[:, 0], 6), (5, 4)),
    "shuffled": (lambda: Moved(nn.Conv2d(3, 6, 3), shuffled, 6), (3, 6, 8)),
    "shifted between": (lambda: Moved(nn.Linear(4, 6), lambda y: (y.unsqueeze(1) - 2).flatten(0, 2), 6), (5, 4)),
}


def operators(path):
    return [node.op_type for node in onnx.load(path).graph.node]


def outputs(path, *arrays):
    runner = onnxruntime.InferenceSession(str(path))
    return runner.run(None, dict(zip((i.name for i in runner.get_inputs()), arrays, strict=True)))


class TestFile:
    @pytest.mark.parametrize("target", TARGETS)
    def test_computes_what_the_model_computes(self, proven, target):
        """The file passes its own verification and equals the model at another batch size and seed."""
        model, path, report = proven(target)
        x = torch.randn(3, 3, 12, 12)

        assert report.verdict
        np.testing.assert_allclose(outputs(path, x.numpy())[0], model(x).detach(), atol=1e-5)

    @pytest.mark.parametrize("target", TARGETS)
    def test_holds_opset_ir_and_plain_operators_alone(self, proven, target):
        """Opset 20, IR 9, plain operators alone, and nothing in the file but what belongs there."""
        path = proven(target).path
        proto = onnx.load(path)

        assert (proto.ir_version, [(o.domain, o.version) for o in proto.opset_import]) == (9, [("", 20)])
        assert proto.producer_name == "normswap"
        assert all(not node.metadata_props and not node.doc_string and not node.domain for node in proto.graph.node)
        assert "GroupNormalization" not in operators(path)
        assert b"/site-packages" not in path.read_bytes()

    def test_two_exports_are_byte_identical(self, tmp_path):
        """The same model gives the same bytes in another process, whatever its hash seed, and no path is in them."""
        (tmp_path / "net.py").write_text(NET)
        script = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import net; net.export(sys.argv[1])"
        environment = {**os.environ, "PYTHONHASHSEED": "1"}
        subprocess.run([sys.executable, "-c", script, str(tmp_path / "other.onnx")], check=True, env=environment)
        runpy.run_path(str(tmp_path / "net.py"))["export"](tmp_path / "own.onnx")

        written = [(tmp_path / f"{name}.onnx").read_bytes() for name in ("own", "other")]
        assert written[0] == written[1]
        assert str(tmp_path).encode() not in written[0]
        assert b"stack_trace" not in written[0]

    @pytest.mark.parametrize("target", ["sn", "gn"])
    @pytest.mark.parametrize(("opset", "ir"), [(17, 8), (18, 8), (19, 9), (21, 10), (22, 10), (23, 11), (24, 12)])
    def test_other_opsets_get_their_lowest_ir(self, model, images, tmp_path, opset, ir, target):
        """Another opset gets the lowest IR that is legal for it, and the norms keep their forms."""
        report = export(model, tmp_path / "m.onnx", images, target, opset=opset)
        proto = onnx.load(tmp_path / "m.onnx")

        assert report.verdict
        assert ([(o.domain, o.version) for o in proto.opset_import], proto.ir_version) == ([("", opset)], ir)
        assert "GroupNormalization" not in operators(tmp_path / "m.onnx")

    def test_an_unsupported_opset(self, model, images, tmp_path):
        """An opset out of range is refused before anything is written."""
        with pytest.raises(UnsupportedError, match="^expected an opset from 17 to 24, received opset=7$"):
            export(model, tmp_path / "m.onnx", images, opset=7)
        assert list(tmp_path.iterdir()) == []

    def test_an_example_of_one_leaves_the_batch_free(self, model, images, tmp_path):
        """A batch of one as example still leaves the batch free, by name."""
        export(model, tmp_path / "m.onnx", images[:1], "sn")
        entry = onnxruntime.InferenceSession(str(tmp_path / "m.onnx")).get_inputs()[0]

        assert (entry.name, entry.shape) == ("x", ["batch", 3, 12, 12])

    def test_what_is_recorded(self, model, images, tmp_path):
        """The file tells what each norm is and where it was folded or why not."""
        report = export(model, tmp_path / "m.onnx", images, GroupNorm(groups=2), metadata={"task": "digits"})
        stored = {p.key: json.loads(p.value) for p in onnx.load(tmp_path / "m.onnx").metadata_props}

        assert stored["normswap.norms"]["bn"] == {"kind": "gn", "eps": 1e-3, "groups": 2, "form": "instance"}
        assert stored["normswap.task"] == "digits"
        assert stored["normswap.verdict"] == {"passed": True, "checks": len(report.verdict.checks), "tolerance": 1e-5}
        assert report.kept == dict.fromkeys(["stem.1", "bn"], "its statistics are taken from each sample (instance)")
        assert report.nodes == len(operators(tmp_path / "m.onnx"))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
    def test_other_dtypes_are_refused(self, model, images, tmp_path, dtype):
        """Weights that onnxruntime could not run are refused with the way out."""
        name = str(dtype).removeprefix("torch.")
        message = f"expected float32 weights, received weights of dtype {name}: convert with model.float()"
        with pytest.raises(UnsupportedError, match=exactly(message)):
            export(model.to(dtype), tmp_path / "m.onnx", images.to(dtype))
        assert list(tmp_path.iterdir()) == []

    def test_a_model_in_training_mode_is_exported_as_at_inference(self, model, images, tmp_path):
        """It is exported as at inference, with a note, and its own flags stay."""
        model.train()
        model.bn.eval()
        report = export(model, tmp_path / "m.onnx", images)

        assert report.notes == ["the model was in training mode: exported in inference mode"]
        assert (model.training, model.bn.training) == (True, False)

    def test_an_existing_file_stays(self, model, images, tmp_path):
        """An existing file stays unless overwriting is asked for."""
        path = tmp_path / "m.onnx"
        path.write_text("old")
        with pytest.raises(OutputExistsError):
            export(model, path, images)
        assert path.read_text() == "old"

        assert export(model, path, images, overwrite=True).verdict

    def test_an_example_is_needed(self, model, tmp_path):
        """A torch model does not tell its input's shape."""
        message = "expected an example input to export, received example=None"
        with pytest.raises(InputError, match=exactly(message)):
            normswap.to_onnx(model, tmp_path / "m.onnx")

    def test_a_model_torch_cannot_export(self, tmp_path):
        """What torch refuses is reported in one line, and no file is left."""

        class Untraceable(nn.Module):
            def forward(self, x):
                return x * float(x.sum().item()) if x.sum() > 0 else x

        with pytest.raises(UnsupportedError, match="^expected a model torch.onnx.export can export, received Untrac"):
            normswap.to_onnx(Untraceable(), tmp_path / "m.onnx", example=torch.randn(2, 3))
        assert list(tmp_path.iterdir()) == []

    def test_several_inputs_and_outputs_keep_name_and_order(self, tmp_path):
        """Names, order and number of inputs and outputs are the model's own."""

        class Many(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

            def forward(self, left, right):
                y = self.bn(self.conv(left))
                return {"sum": y + right, "parts": (y, [right * 2])}

        example = (torch.randn(2, 3, 4, 4), torch.randn(2, 4, 4, 4))
        report = export(trained_(Many()), tmp_path / "m.onnx", example)
        runner = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))

        assert report.verdict
        assert [i.name for i in runner.get_inputs()] == ["left", "right"]
        assert [o.name for o in runner.get_outputs()] == ["sum", "parts_0", "parts_1_0"]


class TestFold:
    @pytest.mark.parametrize("target", ["bn", "brn", SwitchNorm("exact")])
    def test_batch_norm_is_folded(self, proven, target):
        """BatchNorm, BatchRenorm and a one-hot SwitchNorm leave the same operators: none of their own."""
        _, path, report = proven(target)

        assert report.folded == {"stem.1": "Conv", "bn": "Conv"}
        assert sorted(set(operators(path))) == ["Add", "Conv", "Gemm", "ReduceMean", "Relu"]

    def test_a_branch_before_the_norm_keeps_it(self, images, tmp_path):
        """A convolution whose output is used elsewhere keeps its values: the BatchNorm stays."""

        class Branch(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

            def forward(self, x):
                y = self.conv(x)
                return self.bn(y) + y

        report = export(trained_(Branch()), tmp_path / "m.onnx", images)

        assert report.verdict
        assert report.kept == {"bn": "the output of the Conv before it is used elsewhere too"}

    @pytest.mark.parametrize("plain", [True, False])
    def test_a_shared_convolution_has_weights_for_each_norm(self, images, tmp_path, plain):
        """One convolution with two norms, or one norm and none, gives each its own weights."""

        class Shared(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = nn.Conv2d(3, 3, 1)
                self.first, self.second = nn.BatchNorm2d(3), nn.Identity() if plain else nn.BatchNorm2d(3)

            def forward(self, x):
                return self.second(self.conv(self.first(self.conv(x)).relu()))

        report = export(trained_(Shared()), tmp_path / "m.onnx", images)

        assert report.verdict
        assert set(report.folded) == ({"first"} if plain else {"first", "second"})

    def test_a_shared_norm_is_folded_twice(self, images, tmp_path):
        """One BatchNorm after two convolutions is folded into both."""

        class Shared(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.second, self.bn = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

            def forward(self, x):
                return self.bn(self.second(self.bn(self.first(x)).relu()))

        report = export(trained_(Shared()), tmp_path / "m.onnx", images)

        assert report.verdict
        assert report.folded == {"bn": "Conv", "bn#2": "Conv"}

    @pytest.mark.parametrize(
        ("linear", "norm", "shape"),
        [
            (lambda: nn.ConvTranspose2d(4, 6, 3), lambda: nn.BatchNorm2d(6), (4, 7, 7)),
            (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), lambda: nn.BatchNorm2d(6), (4, 7, 7)),
            (lambda: nn.Conv2d(4, 6, 3, groups=2), lambda: nn.BatchNorm2d(6, affine=False), (4, 7, 7)),
            (lambda: nn.Conv1d(4, 6, 3, bias=False), lambda: nn.BatchNorm1d(6), (4, 9)),
            (lambda: nn.Conv3d(4, 6, 3), lambda: nn.BatchNorm3d(6), (4, 5, 5, 5)),
            (lambda: nn.Conv3d(4, 6, 3, bias=False), lambda: nn.BatchNorm3d(6), (4, 5, 5, 5)),
            (lambda: nn.Conv3d(4, 6, 3, 2, 1, groups=2, bias=False), lambda: nn.BatchNorm3d(6), (4, 5, 5, 5)),
            (lambda: nn.Conv3d(4, 6, 3, padding="same", bias=False), lambda: nn.BatchNorm3d(6), (4, 5, 5, 5)),
            (lambda: nn.ConvTranspose3d(4, 6, 3, bias=False), lambda: nn.BatchNorm3d(6), (4, 5, 5, 5)),
            (lambda: nn.Linear(4, 6), lambda: nn.BatchNorm1d(6), (4,)),
            (lambda: nn.Linear(4, 6, bias=False), lambda: nn.BatchNorm1d(6, bias=False), (4,)),
            (lambda: ChannelsLast(True), lambda: nn.BatchNorm1d(6), (5, 4)),
            (lambda: ChannelsLast(False), lambda: nn.BatchNorm1d(6), (5, 4)),
        ],
    )
    def test_every_linear_layer_takes_the_norm_in(self, tmp_path, linear, norm, shape):
        """Grouped, transposed, biasless and fully connected layers take the norm in."""
        model = trained_(nn.Sequential(linear(), norm()))
        report = export(model, tmp_path / "m.onnx", torch.randn(2, *shape))

        assert report.verdict
        assert list(report.folded) == ["1"]
        assert "BatchNormalization" not in operators(tmp_path / "m.onnx")

    @pytest.mark.parametrize("target", ["sn", "gn", "in"])
    def test_a_volume_behind_a_convolution_without_bias(self, tmp_path, target):
        """A file of norms that stay holds the convolution as it is: with two inputs, no bias."""
        model = trained_(nn.Sequential(nn.Conv3d(4, 6, 3, bias=False), nn.BatchNorm3d(6)))
        normswap.patch(model, target)

        assert export(model, tmp_path / "m.onnx", torch.randn(2, 4, 5, 5, 5)).verdict
        assert [len(node.input) for node in onnx.load(tmp_path / "m.onnx").graph.node if node.op_type == "Conv"] == [2]

    @pytest.mark.parametrize(
        ("build", "reason"),
        [
            (
                lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)),
                "it follows the input, not a linear layer",
            ),
            (
                lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)),
                "it follows Relu, not a linear layer",
            ),
            (
                lambda: nn.Sequential(nn.Flatten(2), nn.Linear(144, 6), nn.BatchNorm1d(3)),
                "it is no scale and shift for each channel of the MatMul before it",
            ),
            (
                lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(2), nn.BatchNorm1d(4)),
                "it follows Relu, not a linear layer",
            ),
            (
                lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.BatchNorm1d(576)),
                "it is no scale and shift for each channel of the Conv before it",
            ),
        ],
    )
    def test_no_fold_into_the_wrong_layer(self, images, tmp_path, build, reason):
        """A norm before a padded convolution, or behind an activation, stays."""
        report = export(trained_(build()), tmp_path / "m.onnx", images)

        assert report.verdict
        assert list(report.kept.values()) == [reason]

    def test_through_a_permutation_and_its_inverse(self, tmp_path, images):
        """What moves the channels to the end and back is nothing, where nothing between reads them there."""

        class There(nn.Module):
            def __init__(self, read):
                super().__init__()
                self.conv, self.bn, self.read = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), read

            def forward(self, x):
                moved = self.conv(x).permute(0, 2, 3, 1)
                y = self.bn(moved.permute(0, 3, 1, 2))
                return (y, moved) if self.read else y

        free = export(trained_(There(False)), tmp_path / "free.onnx", images)
        read = export(trained_(There(True)), tmp_path / "read.onnx", images)

        assert free.folded == {"bn": "Conv"}
        assert [node.op_type for node in onnx.load(tmp_path / "free.onnx").graph.node] == ["Conv"]
        assert read.verdict
        assert read.kept == {"bn": "the output of the Conv before it is used elsewhere too"}

    @pytest.mark.parametrize("between", CONSTANTS.values(), ids=CONSTANTS)
    @pytest.mark.parametrize(("layer", "channels", "shape"), BEFORE.values(), ids=BEFORE)
    def test_constants_between_are_taken_in(self, tmp_path, layer, channels, shape, between):
        """However many constants are added, taken off, multiplied with or divided by per channel: none gets lost."""
        model = trained_(Between(layer(), channels, between))
        report = export(model, tmp_path / "m.onnx", torch.randn(2, *shape), check=False)

        assert list(report.folded) == ["norm"]
        assert not {"BatchNormalization", "Mul", "Div", "Sub"} & set(operators(tmp_path / "m.onnx"))
        assert normswap.verify(model, tmp_path / "m.onnx", example=torch.randn(2, *shape))

    @pytest.mark.parametrize("between", OTHERS.values(), ids=OTHERS)
    @pytest.mark.parametrize(("layer", "channels", "shape"), BEFORE.values(), ids=BEFORE)
    def test_what_is_no_line_per_channel_stays(self, tmp_path, layer, channels, shape, between):
        """A constant for each position, a product of two values and a division by one keep their norm."""
        model = trained_(Between(layer(), channels, between))
        report = export(model, tmp_path / "m.onnx", torch.randn(2, *shape), check=False)

        assert list(report.kept) == ["norm"]
        assert normswap.verify(model, tmp_path / "m.onnx", example=torch.randn(2, *shape))

    @pytest.mark.parametrize(
        ("kind", "dynamic"), [*((kind, False) for kind in MOVED), ("a map as a sequence", True), ("shuffled", True)]
    )
    def test_channels_are_followed_through_other_shapes(self, tmp_path, kind, dynamic):
        """Where the channels stay together, or even change their order, the norm goes into the layer before."""
        build, shape = MOVED[kind]
        model, x = trained_(build()), torch.randn(2, *shape)
        decisions = normswap.patch(model, "brn", example=x).replaced
        report = export(model, tmp_path / "m.onnx", x, check=False, dynamic_size=dynamic)

        assert list(report.folded) == ["norm"] == [d.site.name for d in decisions if d.folds is not False]
        assert "BatchNormalization" not in operators(tmp_path / "m.onnx")
        assert normswap.verify(model, tmp_path / "m.onnx", example=torch.randn(2, *shape))

    def test_norms_in_a_row_all_go(self, tmp_path, images):
        """A norm behind one that was folded is folded into the same layer."""
        model = trained_(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(2), nn.BatchNorm1d(4)))

        assert export(model, tmp_path / "m.onnx", images).folded == {"1": "Conv", "3": "Conv"}
        assert "BatchNormalization" not in operators(tmp_path / "m.onnx")

    @pytest.mark.parametrize(("layer", "channels", "shape"), BEFORE.values(), ids=BEFORE)
    def test_a_fold_that_is_wrong_is_not_taken(self, tmp_path, monkeypatch, layer, channels, shape):
        """Every folded layer is tried before it takes the place of the old: here one channel is off by 1e-4."""
        model = trained_(Between(layer(), channels, lambda y, one, two: y))

        def off(weight, scale, *args, **options):
            return scale_weight(weight, scale * (1 + 1e-4 * (np.arange(channels) == 3)), *args, **options)

        monkeypatch.setattr("normswap.export.fold.scale_weight", off)
        report = export(model, tmp_path / "m.onnx", torch.randn(2, *shape))

        assert report.verdict
        assert next(iter(report.kept.values())).endswith("before it, it would not compute the same")

    @pytest.mark.parametrize("groups", [1, 2])
    def test_the_arithmetic(self, groups):
        """The scaled weight of a transposed convolution is that of its output channels, group by group."""
        conv = nn.ConvTranspose1d(4, 6, 3, groups=groups, bias=False)
        rng = np.random.default_rng(0)
        scale = rng.uniform(0.5, 2, 6)
        x = torch.randn(2, 4, 8)
        expected = conv(x).detach().double().numpy() * scale[:, None]
        weight = scale_weight(conv.weight.detach().double().numpy(), scale, "ConvTranspose", groups=groups)
        folded = nn.functional.conv_transpose1d(x.double(), torch.from_numpy(weight), groups=groups)

        np.testing.assert_allclose(folded.numpy(), expected, atol=1e-6)


class TestNumbers:
    @pytest.mark.parametrize("target", ["sn", SwitchNorm("even"), SwitchNorm("warm", "none"), "gn"])
    @pytest.mark.parametrize("size", [1, 5])
    def test_small_maps(self, tmp_path, target, size):
        """1x1 maps and a single map give what torch gives."""
        model = trained_(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)))

        assert export(model, tmp_path / "m.onnx", torch.randn(2, 3, size, size), target).verdict

    @pytest.mark.parametrize("shape", [(6,), (6, 5), (6, 4, 4), (6, 3, 4, 4)])
    @pytest.mark.parametrize("target", ["sn", "gn"])
    def test_every_rank(self, tmp_path, target, shape):
        """Vectors, sequences, images and volumes."""
        norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm1d, 3: nn.BatchNorm2d, 4: nn.BatchNorm3d}[len(shape)](6)

        assert export(trained_(nn.Sequential(norm)), tmp_path / "m.onnx", torch.randn(2, *shape), target).verdict

    @pytest.mark.parametrize("statistics", ["moving", "none"])
    @pytest.mark.parametrize(
        ("norm", "shape"),
        [(SwitchNorm1d, (6,)), (SwitchNorm1d, (6, 5)), (SwitchNorm2d, (6, 24, 24)), (SwitchNorm3d, (6, 3, 2, 4))],
    )
    def test_layers_that_copy_others_have_the_same_forms(self, tmp_path, norm, shape, statistics):
        """What switchablenorms computes is written as our own is, with at most three operators more."""
        layers = [norm(6, batch_statistics=statistics, compat=compat) for compat in ("switchablenorms", None)]
        paths = [tmp_path / f"{place}.onnx" for place in range(2)]
        for layer, path in zip(layers, paths, strict=True):
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for part in layer.state_dict().values():
                    if part.is_floating_point() and part.dim():
                        part.uniform_(0.2, 1.0, generator=generator)
            report = export(nn.Sequential(layer).eval(), path, torch.randn(2, *shape))

            assert report.verdict
            assert report.kept == {"0": "its statistics are taken from each sample (moments)"}
            assert report.folded == {}
        theirs, own = (len(operators(path)) for path in paths)
        assert theirs <= own + 3

    def test_a_hard_gate_of_a_layer_that_copies_others_folds(self, tmp_path, images):
        """With its gates on the batch statistics it is a BatchNorm, as our own is."""
        model = trained_(nn.Sequential(nn.Conv2d(3, 6, 3), SwitchNorm2d(6, compat="switchablenorms"))).eval()
        with torch.no_grad():
            model[1].running_var.uniform_(0.5, 2)
            model[1].mean_weight.copy_(torch.tensor([-200.0, -200.0, 0.0]))
            model[1].var_weight.copy_(torch.tensor([-200.0, -200.0, 0.0]))

        assert export(model, tmp_path / "m.onnx", images).folded == {"1": "Conv"}

    def test_mean_far_above_deviation(self, tmp_path):
        """With mean/std = 1e4 the file is off by what rounds the mean to float32, and by no more."""
        model = nn.Sequential(nn.BatchNorm2d(4)).eval()
        model[0].running_mean.fill_(1e4)
        normswap.patch(model, SwitchNorm("even"))
        normswap.to_onnx(model, tmp_path / "m.onnx", example=torch.randn(2, 4, 8, 8), check=False)
        x = torch.randn(3, 4, 8, 8) + 1e4

        exact = model.double()(x.double())
        found = (torch.from_numpy(outputs(tmp_path / "m.onnx", x.numpy())[0]).double() - exact).abs().max()
        assert found <= np.spacing(np.float32(1e4))
