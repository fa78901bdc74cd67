"""Names, outputs and dimensions of exported PyTorch models: the user's own, each its own value."""

import copy
from collections import namedtuple
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

import normswap
from normswap.errors import InputError, UnsupportedError, VerificationError
from normswap.export.torch import trace as tracing

from ..helpers import exactly
from .models import trained_

Pair = namedtuple("Pair", "first second")


@dataclass
class Answer:
    logits: torch.Tensor
    hidden: torch.Tensor | None = None


class Opaque:
    pass


class Body(nn.Module):
    """A convolution and a norm; ``answer`` makes what the model returns of what they compute."""

    def __init__(self, answer=lambda y, x: y):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.answer = answer

    def forward(self, x):
        return self.answer(self.bn(self.conv(x)), x)


@pytest.fixture
def x():
    return torch.randn(2, 3, 4, 4)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "m.onnx"


def exported(model, path, example, **options):
    """Return the report of a verified export, the file's input names and its output names."""
    report = normswap.to_onnx(trained_(model), path, example=example, **options)
    graph = onnx.load(path).graph
    values = [*(v.name for v in graph.input), *(t.name for t in graph.initializer)]
    values += [name for node in graph.node for name in node.output]
    assert len(values) == len(set(values))
    assert report.verdict or not options.get("check", True)
    return report, [v.name for v in graph.input], [v.name for v in graph.output]


class TestNames:
    def test_a_layer_called_like_an_input(self, path, x):
        """The input keeps its name, and the layer's value gets another."""

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.features, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

            def forward(self, features):
                return self.bn(self.features(features).relu())

        assert exported(Net(), path, x)[1:] == (["features"], ["output"])

    def test_a_parameter_called_like_an_input(self, path, x):
        """The input keeps its name."""

        class Net(Body):
            def __init__(self):
                super().__init__()
                self.x = nn.Parameter(torch.full((4, 1, 1), 2.0))

            def forward(self, x):
                return super().forward(x) * self.x

        assert exported(Net(), path, x)[1:] == (["x"], ["output"])

    @pytest.mark.parametrize("computed", [False, True])
    def test_an_output_called_like_a_parameter(self, path, x, computed):
        """The output keeps its name, be it the parameter itself or computed of it."""

        class Net(Body):
            def __init__(self):
                super().__init__()
                self.logit_scale = nn.Parameter(torch.tensor(2.0))

            def forward(self, x):
                scale = self.logit_scale.exp() if computed else self.logit_scale
                return {"out": super().forward(x) * scale, "logit_scale": scale}

        assert exported(Net(), path, x)[1:] == (["x"], ["out", "logit_scale"])

    @pytest.mark.parametrize(
        ("answer", "names"),
        [
            (lambda y, x: {"x": y}, ["x_2"]),
            (lambda y, x: {"x": x, "x_2": y}, ["x_3", "x_2"]),
            (lambda y, x: {"a": [y], "a_0": y * 2}, ["a_0_2", "a_0"]),
            (lambda y, x: {"bn": y * 2, "conv.weight": y.relu()}, ["bn", "conv.weight"]),
        ],
    )
    def test_outputs_that_would_have_the_name_of_something_else(self, path, x, answer, names):
        """A name that is given stays wherever it can; one that is put together, or is an input's, gets a number."""
        assert exported(Body(answer), path, x)[2] == names

    def test_inputs_that_would_have_one_name(self, path, x):
        """An argument keeps its name, and what is in a list gets a number."""

        class Net(Body):
            def forward(self, a, a_0):
                return super().forward(a[0]) + super().forward(a_0 * 2)

        assert exported(Net(), path, ([x], x))[1] == ["a_0_2", "a_0"]


class TestOutputs:
    @pytest.mark.parametrize(
        ("answer", "names"),
        [
            (lambda y, x: {"a": y, "b": y}, ["a", "b"]),
            (lambda y, x: (y, y.detach(), y.view(y.shape), x), [f"output_{index}" for index in range(4)]),
            (lambda y, x: Answer(y, y * 2), ["logits", "hidden"]),
            (lambda y, x: Answer(y), ["logits"]),
            (lambda y, x: (y, [Answer(y, y * 2)], None), ["output_0", "output_1_0_logits", "output_1_0_hidden"]),
            (lambda y, x: Pair(y, y * 2), ["output_0", "output_1"]),
            (lambda y, x: (y, y.square().mean()), ["output_0", "output_1"]),
            (lambda y, x: torch.mean(y.square(), dim=None), ["output"]),
            (lambda y, x: (y, y.shape[2], 0.5, True), [f"output_{index}" for index in range(4)]),
        ],
    )
    def test_each_is_a_value_of_its_own(self, path, x, answer, names):
        """One tensor under several names, inputs, fields, single numbers: all are in the file, and proven."""
        report, _, outputs = exported(Body(answer), path, x)

        assert outputs == names
        assert {check.output for check in report.verdict.checks} == set(names)

    @pytest.mark.parametrize(
        ("answer", "received"),
        [
            (lambda y, x: (y, Opaque()), "received Opaque as output 1; return the tensors in it"),
            (lambda y, x: {"a": {"b": "text"}}, "received str as output a.b; return the tensors in it"),
            (lambda y, x: Opaque(), "received Opaque; return the tensors in it"),
        ],
    )
    def test_what_is_no_tensor_is_refused(self, path, x, answer, received):
        """It is named by its type and place, and no file is left."""
        message = f"expected a model that returns tensors, in tuples, lists, mappings or dataclasses, {received}"
        with pytest.raises(UnsupportedError, match=exactly(message)):
            exported(Body(answer), path, x)
        assert not path.exists()

    def test_nothing_is_refused(self, path, x):
        """A model that returns nothing has no file."""
        message = "expected a model that returns tensors, received one that returns None"
        with pytest.raises(UnsupportedError, match=exactly(message)):
            exported(Body(lambda y, x: None), path, x)

    @pytest.mark.parametrize("where", ["inputs", "outputs"])
    def test_complex_numbers_are_refused(self, path, x, where):
        """ONNX has none, which is said before the export."""
        model, example, received = Body(lambda y, x: torch.fft.fft(y)), x, "output"
        if where == "inputs":
            model, example, received = nn.Sequential(nn.Linear(4, 4)), x.to(torch.complex64), "input"
        message = (
            f"expected {where} of real numbers, which ONNX has alone, received {received} of complex64; let the model "
            "take or return torch.view_as_real of it"
        )
        with pytest.raises(UnsupportedError, match=exactly(message)):
            exported(model, path, example)

    def test_floats_of_another_width_are_taken_as_the_model_computes(self, path, x):
        """An example in float64 is one for a model in float32, as everywhere."""
        exported(Body(), path, x.double())

        assert onnxruntime.InferenceSession(str(path)).get_inputs()[0].type == "tensor(float)"


class TestDimensions:
    @pytest.mark.parametrize("batch", [1, 3])
    def test_a_batch_that_the_model_fixes_is_the_users_own(self, path, batch):
        """It is the example's, not what was made of it for the exporter, and the report says so."""
        model = Body(lambda y, x: torch.stack([y[index].mean((1, 2)) for index in range(y.shape[0])]))
        report, _, _ = exported(model, path, torch.randn(batch, 3, 4, 4))

        assert report.inputs == {"x": [batch, 3, 4, 4]}
        assert report.notes == [f"the model fixes size 0 of x: the file takes {batch} alone"]

    def test_equal_first_sizes_share_a_name_and_others_have_their_own(self, path, x):
        """So a model of images and queries takes any number of either."""

        class Net(Body):
            def forward(self, x, weights, queries):
                return (super().forward(x) * weights).mean((2, 3)) @ queries.T

        example = (x, torch.randn(2, 4, 1, 1), torch.randn(5, 4))
        report, _, _ = exported(Net(), path, example)

        assert report.inputs == {
            "x": ["batch", 3, 4, 4],
            "weights": ["batch", 4, 1, 1],
            "queries": ["queries_dim_0", 4],
        }
        assert onnxruntime.InferenceSession(str(path)).get_outputs()[0].shape == ["batch", "queries_dim_0"]

    def test_a_graph_has_other_numbers_of_nodes_and_edges(self, path):
        """Nodes and the two ends of edges are no one batch."""

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear, self.bn = nn.Linear(5, 8), nn.BatchNorm1d(8)

            def forward(self, x, edge_index):
                y = self.bn(self.linear(x))
                return torch.zeros_like(y).index_add(0, edge_index[1], y[edge_index[0]])

        example = (torch.randn(10, 5), torch.randint(0, 10, (2, 24)))
        report, _, _ = exported(Net(), path, example)

        assert report.inputs == {"x": ["batch", 5], "edge_index": ["edge_index_dim_0", 24]}
        assert {check.batch for check in report.verdict.checks} == {1, 2, 3, 10}  # edges of fewer nodes name those
        assert report.verdict.notes == ()

    @pytest.mark.parametrize("edges", [10, 24])
    def test_sizes_that_are_equal_by_chance(self, path, edges):
        """As many edges as nodes are no batch: the nodes stay open, and the weights are fixed at what the edges are."""

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.linear, self.bn = nn.Linear(5, 8), nn.BatchNorm1d(8)

            def forward(self, x, edge_index, weights):
                y = self.bn(self.linear(x))
                return torch.zeros_like(y).index_add(0, edge_index[1], y[edge_index[0]] * weights[:, None])

        example = (torch.randn(10, 5), torch.randint(0, 10, (2, edges)), torch.rand(edges))
        report, _, _ = exported(Net(), path, example)

        assert report.inputs == {"x": ["batch", 5], "edge_index": ["edge_index_dim_0", edges], "weights": [edges]}
        assert report.notes == [f"the model fixes size 0 of weights: the file takes {edges} alone"]

    @pytest.mark.parametrize("time", [9, 4])
    def test_a_first_size_that_another_one_determines_is_fixed(self, path, time):
        """Lengths beside a signal with time first: the second is the samples', which the file fixes."""

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.bn = nn.BatchNorm1d(3)

            def forward(self, signal, lengths):
                y = self.bn(signal.permute(1, 2, 0))
                return (y * (torch.arange(y.shape[2]) < lengths[:, None])[:, None]).sum(2)

        example = (torch.randn(time, 4, 3), torch.tensor([time, 4, 3, 1]))
        report, _, _ = exported(Net(), path, example)

        assert report.inputs == {"signal": ["batch", 4, 3], "lengths": [4]}
        assert report.notes == ["the model fixes size 0 of lengths: the file takes 4 alone"]

    def test_one_query_beside_a_batch_stays_one(self, path, x):
        """A first size of 1 beside another one is broadcast."""

        class Net(Body):
            def forward(self, x, shift):
                return super().forward(x) + shift

        report, _, _ = exported(Net(), path, (x, torch.randn(1, 4, 1, 1)))

        assert report.inputs == {"x": ["batch", 3, 4, 4], "shift": [1, 4, 1, 1]}
        assert report.notes == []

    def test_an_input_without_dimensions(self, path, x):
        """A single number is an input, too, and leaves the batch free."""

        class Net(Body):
            def forward(self, x, factor):
                return super().forward(x) * factor

        report, _, _ = exported(Net(), path, (x, torch.tensor(2.0)))

        assert report.inputs == {"x": ["batch", 3, 4, 4], "factor": []}

    @pytest.mark.parametrize(
        ("answer", "batch", "inputs"),
        [
            (lambda y, x: y.chunk(2)[0] * y.chunk(2)[1], 4, [4, 3, 4, 4]),
            (lambda y, x: y.view(-1, 2, *y.shape[1:]).sum(1), 4, ["batch", 3, 4, 4]),
            (lambda y, x: y.view(3, -1, *y.shape[1:]).sum(0), 3, ["batch", 3, 4, 4]),
            (lambda y, x: y.reshape(y.shape[0] // 4, 4, *y.shape[1:]).mean(1), 8, ["batch", 3, 4, 4]),
        ],
        ids=["chunks", "pairs", "triples", "frames"],
    )
    def test_a_batch_of_pairs_or_more(self, path, answer, batch, inputs):
        """What the model takes multiples of alone is fixed with a note, or proven on multiples, without example too."""
        model = Body(answer)
        report, _, _ = exported(model, path, torch.randn(batch, 3, 4, 4))

        assert report.inputs == {"x": inputs}
        fixed = inputs[0] == batch
        assert report.notes == ([f"the model fixes size 0 of x: the file takes {batch} alone"] if fixed else [])
        step = {3: 3, 8: 4}.get(batch, 2)
        for verdict in (report.verdict, normswap.verify(model, path)):
            assert verdict
            if not fixed:
                assert len({check.batch for check in verdict.checks}) > 2
                assert all(check.batch % step == 0 for check in verdict.checks)
                (note,) = verdict.notes
                assert note.startswith("the model takes no inputs of batch 1, ")


class TestFailures:
    def test_of_the_exporter_name_the_cause_and_the_place(self, path, x, capfd):
        """The root cause in one line, without colours, with module and line, and nothing else is printed."""
        model = nn.Sequential(nn.Identity(), Body(lambda y, x: y if y.sum() > 0 else x))
        with pytest.raises(UnsupportedError) as raised:
            exported(model, path, x)

        message = str(raised.value)
        assert message.startswith(
            "expected a model torch.onnx.export can export, received Sequential on which it fails: Could not guard on "
            "data-dependent expression"
        )
        assert "\x1b" not in message
        assert "(in 1, test_export_interface.py, line " in message
        assert capfd.readouterr().err == ""

    def test_of_an_operation_name_it_and_its_line(self, path, x):
        """An operation that ONNX lacks is named with the line that calls it."""
        with pytest.raises(UnsupportedError, match="received Body on which it fails: No ONNX function found for .*eig"):
            exported(Body(lambda y, x: torch.linalg.eigvals(y).abs()), path, x)

    @pytest.mark.parametrize(("where", "factor", "traces"), [("bn", 1.001, 2), ("bn", 1.5, 1), ("conv", 1.001, 1)])
    def test_only_what_centring_can_cure_is_written_again(self, path, x, monkeypatch, where, factor, traces):
        """A miss before the first norm is none of its roundings, and one far beyond them is a wrong graph."""
        own, calls = tracing.trace, []

        def off(model, *arguments, **options):
            traced = own(model, *arguments, **options)
            calls.append(traced)
            if where == "bn":
                for norm in traced.norms.values():
                    norm.gamma[:] *= factor
            else:
                weight = ir.tensor(model.conv.weight.detach().numpy() * np.float32(factor), name="conv.weight")
                traced.model.graph.initializers["conv.weight"].const_value = weight
            return traced

        model = Body()
        normswap.patch(trained_(model), normswap.SwitchNorm(), example=x)
        monkeypatch.setattr(tracing, "trace", off)
        with pytest.raises(VerificationError):
            normswap.to_onnx(model, path, example=x)
        assert len(calls) == traces


class Bags(nn.Module):
    """What torch writes as a loop over the bags, whose body returns a constant for one that is empty."""

    def __init__(self, mode):
        super().__init__()
        self.bag = nn.EmbeddingBag(20, 8, mode=mode)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, ids):
        return self.norm(self.bag(ids))


class Chosen(nn.Module):
    """Returns its input out of one branch of a graph."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x):
        x = self.norm(x)
        return torch.cond(x.sum() > 0, lambda x: x.clone(), lambda x: x + 1, (x,))


@pytest.mark.parametrize("target", ["brn", "gn"])
@pytest.mark.parametrize(
    ("model", "example"),
    [
        (Bags("mean"), torch.arange(12).reshape(3, 4)),
        (Bags("max"), torch.arange(12).reshape(3, 4)),
        (Chosen(), torch.linspace(-1, 2, 24).reshape(3, 8)),
    ],
)
def test_graphs_within_nodes_return_what_is_outside(model, example, target, tmp_path):
    """A constant or a value of the graph around is an output of a loop's body or a branch, by a copy."""
    model = trained_(copy.deepcopy(model))
    normswap.patch(model, target, example=example)

    assert normswap.to_onnx(model, tmp_path / "m.onnx", example=example).verdict


def test_an_example_the_model_does_not_take_is_told(tmp_path):
    """In the same words as `patch` tells it, and nothing is written."""
    with pytest.raises(
        InputError,
        match=exactly(
            "expected an example the model accepts, received one on which it fails: Given groups=1, weight of size "
            "[4, 3, 1, 1], expected input[2, 5, 6, 6] to have 3 channels, but got 5 channels instead"
        ),
    ):
        normswap.to_onnx(Body().eval(), tmp_path / "m.onnx", example=torch.randn(2, 5, 6, 6))
    assert not list(tmp_path.iterdir())


class Mapped(Body):
    """Runs its layers in a transform of `torch.func`, where nobody can look at values."""

    def forward(self, x):
        return torch.vmap(lambda each: super(Mapped, self).forward(each))(x[None])[0]


class Branched(Body):
    """Runs its layers in a branch of a graph, where nobody may look on."""

    def forward(self, x):
        one, other = super().forward, lambda x: -super(Branched, self).forward(x)
        return torch.cond(x.sum() > 0, one, other, (x,))


@pytest.mark.parametrize(
    ("kind", "front", "reason"),
    [
        (Mapped, "", "expected a model torch.onnx.export can export, received Mapped on which it fails: Batching rule"),
        (Branched, "conv", "expected a model whose layers can be watched while it runs, received Branched, on which "),
    ],
)
def test_layers_that_cannot_be_watched(kind, front, reason, tmp_path):
    """Such a model is patched, and its export is refused by name."""
    model, x = trained_(kind()), torch.randn(2, 3, 6, 6)
    expected = model(x)
    report = normswap.patch(model, "brn", example=x)

    assert report.plan.decisions[0].site.front == front
    assert torch.equal(model(x), expected)
    with pytest.raises(UnsupportedError, match=f"^{reason}"):
        normswap.to_onnx(model, tmp_path / "m.onnx", example=x)


class Squeezed(Body):
    """Squeezes an axis that may have one value, and here has more."""

    def forward(self, x):
        return super().forward(x).squeeze(1)


class Loops(Body):
    """Takes out the edges from a node to itself, as many as there are, and adds one for each node."""

    def forward(self, x, edges):
        y = super().forward(x).mean((2, 3))
        edges = edges[:, edges[0] != edges[1]]
        edges = torch.cat([edges, torch.arange(len(x)).expand(2, -1)], 1)
        if edges.shape[1] == 0:
            return y
        return torch.zeros_like(y).index_add(0, edges[1], y[edges[0]])


@pytest.mark.parametrize(
    ("model", "example"),
    [
        (Squeezed(), torch.randn(2, 3, 5, 5)),
        (Loops(), (torch.randn(6, 3, 4, 4), torch.tensor([[0, 1, 2, 2, 5], [1, 1, 3, 0, 4]]))),
    ],
)
def test_what_torchs_exporter_writes_wrong_or_only_at_fixed_sizes(model, example, tmp_path):
    """A Squeeze of more than one value, which is none, is left out; sizes that stand in the way are fixed."""
    model = trained_(copy.deepcopy(model))
    normswap.patch(model, "gn", example=example)

    assert normswap.to_onnx(model, tmp_path / "m.onnx", example=example).verdict
