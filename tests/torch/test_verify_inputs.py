"""What the verifier runs a file on: free heights and widths, several inputs, and float16."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import normswap
from normswap.verification.reference import SIZES
from normswap.verification.verdict import HALF_TOLERANCE

from .models import Residual, trained_


class Strided(nn.Module):
    """A network that adds what it shrank and grew again: heights and widths have to be divisible by 4."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(3, 4, 4, stride=4)
        self.up = nn.ConvTranspose2d(4, 3, 4, stride=4)

    def forward(self, x):
        """Return images of the size of ``x``."""
        return x + self.up(self.down(x))


def freed(path, *names):
    """Make height and width of the inputs and outputs of a file free, as a dynamic export does."""
    proto = onnx.load(path)
    for value in [*proto.graph.input, *proto.graph.output]:
        for size, name in zip(list(value.type.tensor_type.shape.dim)[2:], names, strict=False):
            size.dim_param = name
    del proto.graph.value_info[:]
    onnx.save(proto, path)
    return path


def spatial(model, path):
    """The heights and widths a verification runs a model on, and the verdict."""
    sizes = []
    model.register_forward_pre_hook(lambda module, args: sizes.append(tuple(args[0].shape[2:])))
    return sizes, normswap.verify(model, path)


class TestFreeSizes:
    def test_every_other_batch_has_another_size(self, tmp_path):
        """Where height and width are free, every other batch has another size, the second an odd one."""
        model = trained_(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)))
        normswap.to_onnx(model, tmp_path / "m.onnx", example=torch.zeros(2, 3, 12, 12), check=False)
        sizes, verdict = spatial(model, freed(tmp_path / "m.onnx", "height", "width"))

        assert verdict
        assert verdict.notes == ()
        assert set(sizes) == {SIZES[0][:2], SIZES[1][:2]} == {(64, 64), (77, 101)}

    def test_one_name_is_one_size(self, tmp_path):
        """Dimensions of one name are given one size."""
        model = trained_(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)))
        normswap.to_onnx(model, tmp_path / "m.onnx", example=torch.zeros(2, 3, 12, 12), check=False)
        sizes, verdict = spatial(model, freed(tmp_path / "m.onnx", "side", "side"))

        assert verdict
        assert set(sizes) == {(64, 64), (77, 77)}

    def test_sizes_the_model_does_not_take_are_passed_over(self, tmp_path):
        """A size on which the model itself fails is no fault of the file: the next is tried."""
        model = Strided().eval()
        normswap.to_onnx(model, tmp_path / "m.onnx", example=torch.zeros(2, 3, 12, 12), check=False)
        sizes, verdict = spatial(model, freed(tmp_path / "m.onnx", "height", "width"))

        assert verdict
        assert {size for size in sizes if size[1] % 4 == 0} == {(64, 64), (96, 160)}

    def test_a_file_right_at_one_size_only_fails(self, tmp_path):
        """A file that says it takes any size and does not is a failure, with what onnxruntime says."""
        shape = helper.make_tensor("shape", TensorProto.INT64, [2], [-1, 3 * 64 * 64])
        values = [
            helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, "height", "width"]),
            helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", "values"]),
        ]
        nodes = [helper.make_node("Reshape", ["input", "shape"], ["output"])]
        graph = helper.make_graph(nodes, "g", values[:1], values[1:], [shape])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
        onnx.save(model, tmp_path / "m.onnx")
        verdict = normswap.verify(nn.Flatten(), tmp_path / "m.onnx")

        assert not verdict
        assert all(check.passed for check in verdict.checks)
        assert verdict.problems[0].startswith(
            "onnxruntime fails on inputs of shape (2, 3, 77, 101), which the model takes: "
        )


class Two(nn.Module):
    """A model of two inputs, one of them integers."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(4, 3)
        self.head = nn.Linear(3, 2)

    def forward(self, index, x):
        """Return two outputs by name."""
        y = self.head(x)
        return {"scores": y, "sum": y + self.head(self.table(index))}


def test_several_inputs_and_outputs_are_compared_by_name(tmp_path):
    """Inputs of all types are drawn, outputs are compared by name, and an order that is not the model's fails."""
    model = Two().eval()
    path = tmp_path / "m.onnx"
    example = (torch.zeros(2, dtype=torch.int64), torch.zeros(2, 3))
    normswap.to_onnx(model, path, example=example, check=False)
    verdict = normswap.verify(model, path)
    assert verdict
    assert {check.output for check in verdict.checks} == {"scores", "sum"}

    proto = onnx.load(path)
    inputs, outputs = list(proto.graph.input), list(proto.graph.output)
    for values, changed in ((proto.graph.input, inputs), (proto.graph.output, outputs)):
        del values[:]
        values.extend(reversed(changed))
        onnx.save(proto, path)
        (problem,) = normswap.verify(model, path).problems
        kind, names = ("inputs", "index, x") if changed is inputs else ("outputs", "scores, sum")
        assert problem == f"expected the {kind} {names}, received {', '.join(reversed(names.split(', ')))}"
        del values[:]
        values.extend(changed)


@pytest.mark.parametrize("how", ["dtype", "rank", "size"])
def test_outputs_otherwise_than_declared_fail(how, tmp_path):
    """A file whose outputs are of another type, rank or size than the model's fails before a number is compared."""
    shape = {"dtype": ["batch", 4], "rank": ["batch", 4, 1], "size": ["batch", 4]}[how]
    kind = TensorProto.DOUBLE if how == "dtype" else TensorProto.FLOAT
    values = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4]),
        helper.make_tensor_value_info("output", kind, shape),
    ]
    axes = helper.make_tensor("axes", TensorProto.INT64, [1], [2])
    node = {
        "dtype": helper.make_node("Cast", ["x"], ["output"], to=TensorProto.DOUBLE),
        "rank": helper.make_node("Unsqueeze", ["x", "axes"], ["output"]),
        "size": helper.make_node("Identity", ["x"], ["output"]),
    }[how]
    graph = helper.make_graph([node], "g", values[:1], values[1:], [axes] if how == "rank" else [])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.save(model, tmp_path / "m.onnx")

    class Front(nn.Module):
        def forward(self, x):
            """Return all of ``x``, or its first two columns."""
            return x[:, :2] if how == "size" else x * 1

    received = {"dtype": "float64 (?, 4)", "rank": "float32 (?, 4, 1)", "size": "float32 (?, 4)"}[how]
    returned = "(1, 2)" if how == "size" else "(1, 4)"
    assert normswap.verify(Front(), tmp_path / "m.onnx").problems == (
        f"expected the output output of float32 {returned}, received {received}",
    )


def halved(path, *, inputs):
    """Turn a file to float16: weights and activations, and inputs and outputs where asked for."""
    proto = onnx.load(path)
    for tensor in proto.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    del proto.graph.value_info[:]
    if inputs:
        for value in [*proto.graph.input, *proto.graph.output]:
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
    else:
        (entry,), (result,) = proto.graph.input, proto.graph.output
        for node in proto.graph.node:
            node.input[:] = ["half" if name == entry.name else name for name in node.input]
            node.output[:] = ["rounded" if name == result.name else name for name in node.output]
        proto.graph.node.insert(0, helper.make_node("Cast", [entry.name], ["half"], to=TensorProto.FLOAT16))
        proto.graph.node.append(helper.make_node("Cast", ["rounded"], [result.name], to=TensorProto.FLOAT))
    onnx.save(proto, path)
    return path


class TestHalf:
    @pytest.mark.parametrize("inputs", [True, False])
    def test_a_correct_file_passes(self, model, images, tmp_path, inputs):
        """A float16 file passes with bounds of its own, in onnxruntime and in ONNX's own evaluator."""
        normswap.patch(model, "brn")
        normswap.to_onnx(model, tmp_path / "m.onnx", example=images, check=False)
        verdict = normswap.verify(model, halved(tmp_path / "m.onnx", inputs=inputs))

        assert verdict, verdict.explain("m.onnx")
        assert {check.provider for check in verdict.checks} == {"cpu", "onnx.reference"}
        assert {check.tolerance for check in verdict.checks} == {HALF_TOLERANCE}
        assert "x100" not in {check.inputs for check in verdict.checks}
        assert 1e-5 < verdict.max_rel < 2e-3

    def test_a_fault_is_found_in_its_layer(self, model, images, tmp_path):
        """A fault above what float16 rounds is found in its layer, even where the outputs hardly show it."""
        path = tmp_path / "m.onnx"
        normswap.patch(model, "brn")
        normswap.to_onnx(model, path, example=images, check=False)
        proto = onnx.load(halved(path, inputs=True))
        second = [node for node in proto.graph.node if node.op_type == "Conv"][1]
        weight = next(i for i in proto.graph.initializer if i.name == second.input[1])
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float16(1.25), weight.name))
        onnx.save(proto, path)
        verdict = normswap.verify(model, path)

        assert verdict.first_diverging == "bn"
        assert not verdict

    def test_what_overflows_is_found(self, tmp_path):
        """Squares of activations around 600 overflow in float16; onnxruntime on the CPU does not show it."""
        values = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["batch", 8]) for name in ("x", "output")]
        large = numpy_helper.from_array(np.array(600, np.float16), "large")
        nodes = [
            helper.make_node("Add", ["x", "large"], ["moved"]),
            helper.make_node("Mul", ["moved", "moved"], ["square"]),
            helper.make_node("Sqrt", ["square"], ["output"]),
        ]
        graph = helper.make_graph(nodes, "g", values[:1], values[1:], [large])
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
        onnx.save(proto, tmp_path / "m.onnx")

        class Far(nn.Module):
            def forward(self, x):
                """Return √(x + 600)²."""
                return torch.sqrt((x + 600) ** 2)

        verdict = normswap.verify(Far(), tmp_path / "m.onnx")

        assert not verdict
        assert all(check.passed for check in verdict.checks if check.provider == "cpu")
        assert [check.finite for check in verdict.checks if check.provider == "onnx.reference"] == [False]
        assert verdict.first_infinite == "square of Mul"


def test_data_for_a_file_of_several_inputs(tmp_path):
    """An entry of the data has an array for each input, as an example has; with one for two it is refused."""
    model = Two().eval()
    example = (torch.zeros(2, dtype=torch.int64), torch.zeros(2, 3))
    normswap.to_onnx(model, tmp_path / "m.onnx", example=example, check=False)
    with pytest.raises(normswap.errors.InputError) as caught:
        normswap.verify(model, tmp_path / "m.onnx", data=[np.zeros((2, 3), np.float32)])

    assert str(caught.value) == (
        "expected data of 2 arrays, one for each input of the file, received 1; give each, in their order or by name"
    )
    verdict = normswap.verify(model, tmp_path / "m.onnx", data=[example])
    assert verdict
    assert "data" in {check.inputs for check in verdict.checks}


def test_a_model_that_normalizes_by_its_batch_is_held_at_every_size(images, tmp_path):
    """A file made at one batch size of a model that mixes its batch is held to the model at every size."""
    model = trained_(Residual())
    normswap.to_onnx(model, tmp_path / "m.onnx", example=images, check=False)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean, module.running_var, module.track_running_stats = None, None, False

    assert normswap.verify(model, tmp_path / "m.onnx").first_diverging == "stem.1"


def test_scaled_inputs_that_float32_does_not_determine_are_left_out(tmp_path):
    """Where a model loses its digits on inputs x100, as sines of ten thousands do, those are left out, noted."""

    class Waves(nn.Sequential):
        def forward(self, x):
            return torch.sin(100 * super().forward(x))

    model = trained_(Waves(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    x = torch.randn(2, 3, 32, 32)
    normswap.to_onnx(model, tmp_path / "m.onnx", example=x, check=False)
    verdict = normswap.verify(model, tmp_path / "m.onnx")

    assert verdict
    assert {check.inputs for check in verdict.checks} == {"x1", "x0.1"}
    (note,) = verdict.notes
    assert note.startswith("inputs x100 left out: float32 does not determine the model there, output is off by ")
