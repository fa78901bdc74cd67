"""Int8 files: what is quantized, what stays float, and whether rounding is told apart from faults."""

import json
import re

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import normswap
from normswap.errors import InputError, UnsupportedError, UsageError, VerificationError
from normswap.export import int8
from normswap.verification.quantized import Quantized

from ..helpers import commanded, exactly
from .models import CODE, Residual, trained_


def drawn(count=48):
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def network(target="bn"):
    torch.manual_seed(0)
    model = trained_(Residual())
    if target != "bn":
        normswap.patch(model, target, example=drawn(2))
    return model


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The function that returns the network patched to a target, its int8 file, its float file and the report."""
    made = {}

    def export(target):
        if target not in made:
            folder, model = tmp_path_factory.mktemp("int8"), network(target)
            normswap.to_onnx(model, folder / "float.onnx", example=drawn(2), check=False)
            report = normswap.to_onnx(model, folder / "int8.onnx", example=drawn(2), int8=drawn())
            made[target] = model, folder / "int8.onnx", folder / "float.onnx", report
        return made[target]

    return export


@pytest.mark.parametrize("target", ["bn", "sn", "brn", "gn"])
def test_weights_are_int8_and_norms_are_not(files, target):
    """Every weight of a linear layer is stored per channel in int8; no node of a norm reads what was rounded."""
    _, path, _, report = files(target)
    proto = onnx.load(path)
    quantized = Quantized(proto)
    rounded = {output for pair in quantized.pairs.values() for output in pair.decoded}
    norms = {name for name in report.kept if target != "bn"}

    assert report.verdict
    assert report.to_dict()["int8"] == {
        "layers": 3,
        "left": {},
        "noise_db": pytest.approx(report.int8.noise_db, abs=0.1),
    }
    assert report.int8.noise_db > int8.ENOUGH
    weights = [stored for stored in quantized.stored.values() if stored.codes.dtype == np.int8]
    assert sorted(stored.by.scale.shape for stored in weights) == [(5,), (8,), (8,)]
    assert [node.name for node in proto.graph.node
            if node.name.rpartition("/")[0] in norms and rounded.intersection(node.input)] == []  # fmt: skip
    assert [value.name for value in proto.graph.output] == ["output"]
    assert proto.producer_name == "normswap"


@pytest.mark.parametrize("target", ["bn", "sn", "gn"])
def test_is_near_the_float_file(files, target):
    """On inputs nothing was chosen by, the difference is a tenth of the answers' own and less, and not nothing."""
    _, path, plain, _ = files(target)
    x = {"x": torch.randn(64, 3, 12, 12).numpy()}
    found, expected = (onnxruntime.InferenceSession(str(file)).run(None, x)[0] for file in (path, plain))

    assert 0 < (found - expected).std() < 0.1 * expected.std()


def changed(path, folder, change):
    proto = onnx.load(path)
    change(proto)
    onnx.save(proto, folder / "faulty.onnx")
    return folder / "faulty.onnx"


def reads(index, op_type, dtype):
    """The name of what the first node of a type reads at an index: of QuantizeLinear, or of what decodes a dtype."""

    def find(proto):
        stored = {tensor.name: tensor for tensor in proto.graph.initializer}
        for node in proto.graph.node:
            codes = stored.get(node.input[0])
            if node.op_type == op_type and (None if codes is None else numpy_helper.to_array(codes).dtype) == dtype:
                return node.input[index]
        raise AssertionError(op_type)

    return find


def multiplied(find, draw):
    """What puts ``draw`` of a stored tensor in its place."""

    def change(proto):
        tensor = next(tensor for tensor in proto.graph.initializer if tensor.name == find(proto))
        array = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array(np.asarray(draw(array.copy())).astype(array.dtype), tensor.name))

    return change


def zeroed(array):
    array[1] = 0
    return array


def negated(array):
    array[1] *= -1
    return array


def without_a_pair(proto):
    decode = next(n for n in proto.graph.node if n.op_type == "DequantizeLinear" and n.input[0].startswith("x_"))
    for node in proto.graph.node:
        node.input[:] = ["x" if name == decode.output[0] else name for name in node.input]
    proto.graph.node.remove(decode)
    proto.graph.node.remove(next(node for node in proto.graph.node if node.op_type == "QuantizeLinear"))


def without_relu(proto):
    next(node for node in reversed(proto.graph.node) if node.op_type == "Relu").op_type = "Identity"


WEIGHT, BIAS = np.dtype(np.int8), np.dtype(np.int32)
FAULTS = {
    "scale x2": (multiplied(reads(1, "QuantizeLinear", None), lambda a: 2 * a), "is rounded by steps of"),
    "scale /2": (multiplied(reads(1, "QuantizeLinear", None), lambda a: a / 2), "is rounded by steps of"),
    "zero point": (multiplied(reads(2, "QuantizeLinear", None), lambda a: a + 1), "has the zero point"),
    "weight scale": (multiplied(reads(1, "DequantizeLinear", WEIGHT), lambda a: 2 * a), "of its steps, of which half"),
    "scales permuted": (multiplied(reads(1, "DequantizeLinear", WEIGHT), np.flip), "of its steps, of which half"),
    "channel zeroed": (multiplied(reads(0, "DequantizeLinear", WEIGHT), zeroed), "of its steps, of which half"),
    "channel negated": (multiplied(reads(0, "DequantizeLinear", WEIGHT), negated), "of its steps, of which half"),
    "bias": (multiplied(reads(1, "DequantizeLinear", BIAS), lambda a: 2 * a), "of its steps, of which half"),
    "no pair": (without_a_pair, "expected what is rounded to be what the file tells of, received another: x"),
    "no ReLU": (without_relu, "first diverging layer"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("target", ["bn", "sn"])
def test_faults_are_told_from_rounding(files, tmp_path, target, fault):
    """What is wrong by more than a rounding fails, and is named; the file as it was passes with the same call."""
    model, path, plain, _ = files(target)
    change, said = FAULTS[fault]
    given = {"example": drawn(2), "data": drawn(16), "float_file": plain}

    verdict = normswap.verify(model, changed(path, tmp_path, change), **given)

    assert not verdict
    assert said in str(verdict)
    if fault == "no ReLU":
        assert normswap.verify(model, path, **given)


def test_noise_is_told(files):
    """With data the verdict tells how far below the outputs the noise is, and without that nothing was measured."""
    model, path, plain, _ = files("sn")

    with_data = normswap.verify(model, path, data=drawn(16), float_file=plain)
    without = normswap.verify(model, path, example=drawn(2), float_file=plain)

    assert [re.sub(r"\d\d\.\d", "N", note) for note in with_data.notes] == [
        "int8: on data the noise is N dB below output"
    ]
    assert without.notes == ("int8: no data to measure the noise of rounding on",)


def test_too_much_noise(files, monkeypatch):
    """A file with more noise on data than is allowed fails, though it is rounded as it says."""
    model, path, plain, _ = files("sn")
    monkeypatch.setattr("normswap.verification.int8.LEAST", 90.0)

    verdict = normswap.verify(model, path, data=drawn(16), float_file=plain)

    assert re.fullmatch(r"output has noise \d\d\.\d dB below it on data, of which 90 are expected", verdict.problems[0])


def test_what_makes_most_noise_is_left_in_float(tmp_path, monkeypatch):
    """Where the output has more noise than it may, what alone makes much of it is left, and named, the worst first."""
    monkeypatch.setattr(int8, "ENOUGH", 60.0)
    monkeypatch.setattr(int8, "HARM", 60.0)

    report = normswap.to_onnx(network("gn"), tmp_path / "m.onnx", example=drawn(2), int8=drawn())

    left = report.int8.left
    assert 0 < len(left) <= int8.MOST_LEFT * 8
    assert list(left.values()) == sorted(left.values())
    assert not set(left) & {*report.int8.ranges}
    assert f"{next(iter(left))} ({next(iter(left.values()))} dB)" in report.notes[-1]


def test_a_layer_left_in_float_reads_what_was_not_rounded(tmp_path, monkeypatch):
    """A float weight between what is rounded would be rounded by onnxruntime, all channels by one step."""

    def stem(found, *_):
        return {name for name, stored in found.stored.items() if stored.name == "bn.folded_weight"}

    monkeypatch.setattr(int8, "_harmful", stem)

    report = normswap.to_onnx(network(), tmp_path / "m.onnx", example=drawn(2), int8=drawn())

    proto = onnx.load(tmp_path / "m.onnx")
    decoded = {output for pair in Quantized(proto).pairs.values() for output in pair.decoded}
    layer = next(node for node in proto.graph.node if "bn.folded_weight" in node.input)
    assert decoded.isdisjoint(layer.input)
    assert all(any(each in node.input for node in proto.graph.node) for each in decoded)
    assert report.verdict


def test_no_file_is_left_of_a_failed_proof(tmp_path, monkeypatch):
    """A quantizer that errs writes no file, and the message says in what."""
    quantize = int8.quantize

    def wrong(*arguments):
        proto, report = quantize(*arguments)
        multiplied(reads(1, "QuantizeLinear", None), lambda a: 2 * a)(proto)
        return proto, report

    monkeypatch.setattr(int8, "quantize", wrong)

    with pytest.raises(VerificationError, match=r"x is rounded by steps of \S+, its range is one of"):
        normswap.to_onnx(network(), tmp_path / "m.onnx", example=drawn(2), int8=drawn())
    assert list(tmp_path.iterdir()) == []


REFUSED = [
    (
        {"int8": drawn(15)},
        InputError,
        "expected 16 inputs or more to calibrate int8 on, received 15",
    ),
    (
        {"int8": torch.randn(32, 1, 12, 12)},
        InputError,
        "expected data of the shapes the file takes, received x (batch, 3, 12, 12) with (32, 1, 12, 12); give such, "
        "or export the model with dynamic_size=True",
    ),
    (
        {"int8": torch.full((32, 3, 12, 12), torch.nan)},
        InputError,
        "expected finite inputs to calibrate on, received some of which x is not finite",
    ),
    (
        {"int8": drawn(1).repeat(48, 1, 1, 1)},
        InputError,
        "expected 16 inputs or more to calibrate int8 on, received 48, of which 47 repeat others",
    ),
    (
        {"int8": [drawn(15), drawn(15)]},
        InputError,
        "expected 16 inputs or more to calibrate int8 on, received 30, of which 15 repeat others",
    ),
    (
        {"int8": True},
        InputError,
        "expected batches of inputs as the model takes them, received True",
    ),
    ({"int8": drawn(), "half": True}, UsageError, "expected one of half and int8, received both"),
    ({"int8": drawn(), "opset": 13}, UnsupportedError, "expected an opset from 17 to 24, received opset=13"),
]


@pytest.mark.parametrize(("options", "error", "message"), REFUSED)
def test_refusals(tmp_path, options, error, message):
    """What does not fit is refused, with what was expected and received, and no file is left."""
    with pytest.raises(error, match=exactly(message)):
        normswap.to_onnx(network(), tmp_path / "m.onnx", example=drawn(2), **options)
    assert list(tmp_path.iterdir()) == []


def test_more_than_protobuf_holds(tmp_path, monkeypatch):
    """A model too large for one protobuf message, which the quantizer works on, is refused with both sizes."""
    monkeypatch.setattr(int8, "MOST_BYTES", 1000)
    message = r"expected a model of 1000 bytes or less for int8, received one of \d{4}"
    with pytest.raises(UnsupportedError, match=f"^{message}$"):
        normswap.to_onnx(network(), tmp_path / "m.onnx", example=drawn(2), int8=drawn())
    assert list(tmp_path.iterdir()) == []


class Tokens(nn.Module):
    """Attention over token ids with a mask that is added, as transformers have it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.norm, self.dense = nn.Embedding(50, 16), nn.BatchNorm1d(16), nn.Linear(16, 16)

    def forward(self, ids, mask):
        x = self.dense(self.norm(self.embedding(ids).transpose(1, 2)).transpose(1, 2)).relu()
        x = torch.softmax(x @ x.transpose(1, 2) / 4 + mask[:, None], -1) @ x
        return x @ self.embedding.weight.T


def tokens(count, hidden=-torch.inf):
    ids = torch.randint(0, 50, (count, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(count, 7)
    mask[:, 5:] = hidden
    return ids, mask


def test_a_mask_of_infinities(tmp_path):
    """Whole numbers stay as they are, and -inf in a mask is no fault where it is not rounded."""
    model = Tokens().eval()

    report = normswap.to_onnx(model, tmp_path / "m.onnx", example=tokens(2), int8=[tokens(32)])

    assert report.verdict
    assert "mask" not in report.int8.ranges


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((tokens(32)[0] + 50, tokens(32)[1]), "expected inputs that the file takes to calibrate int8 on, received "
         "ids (batch, 7) with (32, 7), mask (batch, 7) with (32, 7): "),
        ((tokens(32)[0], tokens(20)[1]), "expected inputs that the file takes to calibrate int8 on, received "
         "ids (batch, 7) with (32, 7), mask (batch, 7) with (20, 7): "),
        ((tokens(32)[0] + 0.5, tokens(32)[1]), "expected int64 for ids (batch, 7), received 44.5 of float32; "
         "give numbers of that type"),
        (tokens(32)[:1], "expected data of 2 arrays, one for each input of the file, received 1; "
         "give each, in their order or by name"),
        (tokens(32, torch.nan), "expected finite inputs to calibrate on, received some of which mask is not finite"),
    ],
)  # fmt: skip
def test_tokens_that_the_model_does_not_take(tmp_path, given, message):
    """Ids beyond the table, unequal numbers, halves, a missing input and NaN are refused as such, not by a crash."""
    with pytest.raises(InputError) as caught:
        normswap.to_onnx(Tokens().eval(), tmp_path / "m.onnx", example=tokens(2), int8=[given])

    assert str(caught.value).startswith(message)
    assert message.endswith(": ") or str(caught.value) == message
    assert list(tmp_path.iterdir()) == []


def test_frames_of_clips_stay_together(tmp_path):
    """A model that takes multiples of eight frames is calibrated on batches as they are given."""

    class Clips(Residual):
        def forward(self, x):
            return super().forward(x).view(-1, 8, 5).mean(1)

    torch.manual_seed(0)

    assert normswap.to_onnx(trained_(Clips()), tmp_path / "m.onnx", example=drawn(8), int8=[drawn(48)]).verdict


def test_what_rounding_may_choose_otherwise(tmp_path):
    """Of outputs that are chosen by comparing numbers (classes, how many are left) the file is proven as well."""

    class Chosen(Residual):
        def forward(self, x):
            scores = super().forward(x)
            return scores, scores.argmax(1), scores[scores > scores.mean()]

    torch.manual_seed(0)

    report = normswap.to_onnx(trained_(Chosen()), tmp_path / "m.onnx", example=drawn(2), int8=drawn())

    assert report.verdict
    assert {check.optimisation for check in report.verdict.checks if check.output == "output_1"} == {"off"}
    assert {check.optimisation for check in report.verdict.checks if check.output == "output_0"} == {"off", "on"}


def test_an_iterator_of_data_serves_both_proofs(tmp_path):
    """Data that can be iterated over once proves the int8 file too, not the float file alone."""

    def checks(data):
        report = normswap.to_onnx(
            network(), tmp_path / "m.onnx", example=drawn(2), int8=drawn(), data=data, overwrite=True
        )
        return len(report.verdict.checks)

    assert checks(iter([drawn(5)])) == checks([drawn(5)]) > checks(None)


def test_the_file_tells_what_it_was_allowed(tmp_path):
    """What the file says of its proof is the largest difference that was allowed, not what float files are."""
    report = normswap.to_onnx(network(), tmp_path / "m.onnx", example=drawn(2), int8=drawn())

    told = {entry.key: entry.value for entry in onnx.load(tmp_path / "m.onnx").metadata_props}["normswap.verdict"]
    allowed = max(check.tolerance for check in report.verdict.checks)
    assert json.loads(told) == {"passed": True, "checks": len(report.verdict.checks), "tolerance": allowed}
    assert allowed > 1e-4


def test_one_layer_may_be_left(tmp_path, monkeypatch):
    """Of a model with little to quantize one value or weight may be left in float."""
    monkeypatch.setattr(int8, "ENOUGH", 90.0)
    monkeypatch.setattr(int8, "HARM", 90.0)
    model = nn.Linear(12, 4).eval()

    report = normswap.to_onnx(model, tmp_path / "m.onnx", example=drawn(2), int8=drawn())

    assert len(report.int8.left) == 1


def test_no_noise_is_no_number():
    """Without a difference on the inputs kept aside nothing is told in decibels."""
    report = int8.Int8(3)

    assert report.notes == ["int8: 3 layers, no noise measured in the output on inputs kept aside"]
    assert report.to_dict() == {"layers": 3, "left": {}, "noise_db": None}


def test_nothing_to_quantize(tmp_path):
    """A model without convolutions and dense layers is refused."""
    message = "expected a model with convolutions or dense layers for int8, received one without"
    with pytest.raises(UnsupportedError, match=exactly(message)):
        normswap.to_onnx(nn.BatchNorm2d(3).eval(), tmp_path / "m.onnx", example=drawn(2), int8=drawn())


def test_a_model_that_is_quantized_already(files):
    """A file that has codes itself is refused, since they could not be told from those that would be added."""
    message = "expected a model in float for int8, received one that rounds values to codes itself"
    with pytest.raises(UnsupportedError, match=exactly(message)):
        int8.quantize(files("bn")[1], [{"x": drawn(4).numpy()}], ())


def test_a_bias_of_several_layers(tmp_path):
    """A layer that is called on two inputs has codes of its bias for each; both are held against the one in float."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

        def forward(self, x):
            y = self.conv(x).relu()
            return self.head(y.mean((2, 3))), self.head(y.amax((2, 3)))

    model = Twice().eval()

    assert normswap.to_onnx(model, tmp_path / "m.onnx", example=drawn(2), int8=drawn()).verdict
    stored = Quantized(onnx.load(tmp_path / "m.onnx")).stored.values()
    assert sorted(each.name for each in stored if each.codes.dtype == np.int32) == [
        "conv.bias",
        "head.bias",
        "head.bias",
    ]


class Products(nn.Module):
    """Products that are multiplied by numbers, or have a matrix added, beside one that is a dense layer."""

    def __init__(self):
        super().__init__()
        self.weight, self.row = nn.Parameter(torch.randn(12, 8)), nn.Parameter(torch.randn(1, 8))
        self.bias = nn.Parameter(torch.randn(8))

    def forward(self, x):
        x = x.flatten(1)[:, :12]
        multiplied = torch.addmm(self.bias, x, self.weight, beta=0.5, alpha=2.0)
        return torch.addmm(self.row, x, self.weight) + multiplied, torch.addmm(self.bias, x, self.weight)


LAYERS = {
    "products": lambda: [Products()],
    "pooling": lambda: [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(8, 4, 3), nn.MaxPool2d(2)],
    "transposed": lambda: [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 4, 3, stride=2), nn.Conv2d(4, 2, 1)],
    "transposed in groups": lambda: [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 4, 3, groups=2)],
    "depthwise": lambda: [nn.Conv2d(3, 8, 1), nn.Hardswish(), nn.Conv2d(8, 8, 3, groups=8), nn.SiLU()],
    "dense": lambda: [nn.Flatten(2), nn.Linear(144, 16), nn.ReLU(), nn.Linear(16, 3), nn.Softmax(-1)],
}


@pytest.mark.parametrize("name", LAYERS)
def test_other_layers(tmp_path, name):
    """Pooling between, transposed and depthwise convolutions, dense layers on sequences: the file is proven."""
    torch.manual_seed(0)
    model = nn.Sequential(*LAYERS[name]()).eval()

    assert normswap.to_onnx(model, tmp_path / "m.onnx", example=drawn(2), int8=drawn()).verdict


def metadata(change):
    """What changes what the file tells of its quantization."""

    def apply(proto):
        entry = next(entry for entry in proto.metadata_props if entry.key == "normswap.int8")
        entry.value = json.dumps(change(json.loads(entry.value)))

    return apply


def node(op_type, dtype, change):
    """What changes the first node of a type: of QuantizeLinear, or of what decodes a dtype."""

    def apply(proto):
        scale = reads(1, op_type, dtype)(proto)
        change(next(each for each in proto.graph.node if each.op_type == op_type and each.input[1] == scale))

    return apply


def without_zero(decode):
    decode.input[2] = ""


def with_a_computed_scale(quantize):
    quantize.input[1] = "x"


FORGED = {
    "no ranges": (metadata(lambda told: {**told, "ranges": {}}),
                  "expected what is rounded to be what the file tells of, received another: bn"),
    "NaN ranges": (metadata(lambda told: {**told, "ranges": {name: [np.nan] * 2 for name in told["ranges"]}}),
                   "its range is one of nan"),
    "no zero point": (node("DequantizeLinear", WEIGHT, without_zero),
                      "stem.1.folded_weight has not one step above 0, or one for each channel, and whole numbers"),
    "many scales": (multiplied(reads(1, "QuantizeLinear", None), lambda a: np.stack([a, a])),
                    "x is not rounded to whole numbers by one step above 0"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FORGED)
def test_forged_files(files, tmp_path, kind):
    """A file that is not as normswap writes it fails by what is wrong in it, whatever it tells of itself."""
    model, path, plain, _ = files("bn")
    change, said = FORGED[kind]

    verdict = normswap.verify(model, changed(path, tmp_path, change), example=drawn(2), float_file=plain)

    assert not verdict
    assert said in str(verdict)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (node("QuantizeLinear", None, with_a_computed_scale),
         "expected scales and zero points that the file stores, received x, computed"),
        (metadata(lambda told: {**told, "ranges": []}), "expected an object"),
    ],
)  # fmt: skip
def test_forged_files_that_cannot_be_read(files, tmp_path, change, said):
    """A file whose steps or ranges cannot be told is refused."""
    model, path, plain, _ = files("bn")

    with pytest.raises(InputError, match=re.escape(said)):
        normswap.verify(model, changed(path, tmp_path, change), example=drawn(2), float_file=plain)


def test_the_float_file_belongs_to_an_int8_file(files, tmp_path):
    """Neither is verified with the other missing, nor against a reference; a float file of another model is refused."""
    model, path, plain, _ = files("bn")
    other = tmp_path / "other.onnx"
    normswap.to_onnx(nn.Conv2d(3, 2, 1).eval(), other, example=drawn(2), check=False)

    for given, message in (
        ({}, f"expected the float file that {path} in int8 was made of, received float_file=None"),
        ({"float_file": other}, "expected stem.1.folded_weight of shape (8, 3, 3, 3) in the float file of an int8 "
         "file, received none; give the one that it was made of"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=exactly(message)):
            normswap.verify(model, path, **given)
    message = (
        "expected runtime='onnxruntime' for a file in int8, which is proved there alone, received runtime='openvino'"
    )
    with pytest.raises(InputError, match=exactly(message)):
        normswap.verify(model, path, float_file=plain, runtime=["onnxruntime", "openvino"])
    message = f"expected an int8 file beside a float file, received {plain} in float and float_file={plain}"
    with pytest.raises(InputError, match=exactly(message)):
        normswap.verify(model, plain, float_file=plain)
    assert normswap.verify(model, plain, save_reference=tmp_path / "r.npz")
    message = (
        f"expected a file in float beside a reference, received {path} in int8, which is held against its model and "
        "its float file"
    )
    with pytest.raises(InputError, match=exactly(message)):
        normswap.verify_against(tmp_path / "r.npz", path)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that runs a command in a folder with a bundle and data; returns exit code, --json, and text."""
    (tmp_path / "net.py").write_text(CODE)
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "data.npz", x=rng.integers(0, 255, (48, 8, 8, 3), np.uint8), y=rng.integers(0, 3, 48))
    np.savez(tmp_path / "few.npz", x=rng.integers(0, 255, (8, 8, 8, 3), np.uint8), y=rng.integers(0, 3, 8))
    np.savez(tmp_path / "other.npz", x=rng.integers(0, 255, (48, 9, 9, 3), np.uint8), y=rng.integers(0, 3, 48))
    monkeypatch.chdir(tmp_path)

    for target in ("gn", "sn"):
        assert commanded("patch", "net.py:build", "--to", target, "-o", target)[0] == 0
    return commanded


def test_on_the_command_line(run, tmp_path):
    """Export, verify and evaluate know an int8 file; a fault in it exits 5."""
    code, said, _ = run("export", "gn", "--int8", "--calibrate", "data.npz", "-o", "gn.int8.onnx", "--json")
    assert (code, said["int8"]["layers"], said["int8"]["left"]) == (0, 2, {})
    code, said, _ = run("verify", "gn", "gn.int8.onnx", "--data", "data.npz", "--json")
    assert (code, said["passed"]) == (0, True)
    assert re.fullmatch(r"int8: on data the noise is \d+\.\d dB below output", said["notes"][-1])
    code, said, _ = run("evaluate", "gn.int8.onnx", "--data", "data.npz", "--against", "gn", "--json")
    assert code == 0
    assert said["agreement"] > 80

    assert run("report", "gn.int8.onnx", "--against", "gn", "-o", "page.html")[0] == 0

    changed(tmp_path / "gn.int8.onnx", tmp_path, FAULTS["channel zeroed"][0])
    code, said, _ = run("verify", "gn", "faulty.onnx", "--json")
    assert (code, said["passed"]) == (5, False)
    assert re.fullmatch(
        r"0.weight is off by \d+(\.\d+)? of its steps, of which half a one is rounding", said["problems"][0]
    )


def test_pruned_on_the_command_line(run):
    """A file without some gates is held against the model with them: it differs, as its float file does."""
    pruned = ("--prune-gates", "0.3")
    code, _, _ = run("export", "sn", "--int8", "--calibrate", "data.npz", *pruned, "--no-latency", "-o", "sn.onnx")
    assert code == 0

    code, said, _ = run("verify", "sn", "sn.onnx", "--json")

    assert code == 5
    assert (said["problems"], said["first_diverging"]) == ([], "1")


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--int8"], 2, "expected --calibrate DATA beside --int8"),
        (["--int8", "--half", "--calibrate", "data.npz"], 2, "expected one of --half and --int8"),
        (["--calibrate", "data.npz"], 2,
         "expected --int8 beside what is said of its calibration, received --calibrate"),
        (["--int8", "--calibrate", "data.npz", "--runtime", "litert"], 2,
         "expected no option of an ONNX file beside --runtime litert, received --int8"),
        (["--int8", "--calibrate", "few.npz"], 3, "expected 16 inputs or more to calibrate int8 on, received 8"),
        (["--int8", "--calibrate", "other.npz"], 3, "expected `x` of shape (N, 8, 8, 3), received (48, 9, 9, 3)"),
        (["--int8", "--calibrate", "data.npz", "--opset", "13"], 4,
         "expected an opset from 17 to 24, received opset=13"),
    ],
)  # fmt: skip
def test_refusals_on_the_command_line(run, tmp_path, options, code, message):
    """What does not fit exits as the table has it, and leaves no file."""
    found, _, text = run("export", "gn", *options, "-o", "m.onnx")

    assert found == code
    assert message in " ".join(text.split())
    assert not (tmp_path / "m.onnx").exists()
