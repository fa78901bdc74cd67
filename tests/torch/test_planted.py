"""Faults in rows of tables, in one output of several, and in what a file declares of its sizes: all are found."""

import onnx
import pytest
import torch
from torch import nn

import normswap
from normswap.verification.sizes import contradictions

from ..planting import SPOILT, behind, dropped, edited, resized, spoil_rows, swapped, twice
from .models import trained_


class Words(nn.Module):
    """Scores of words, of which most are never seen."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.norm, self.head = nn.Embedding(3000, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)

    def forward(self, ids):
        """Return scores of ids (N, T)."""
        return self.head(self.norm(self.table(ids).transpose(1, 2)).mean(2))


IDS = torch.arange(12).reshape(2, 6)


@pytest.fixture
def words(tmp_path):
    """A model of words, and its file."""
    model = trained_(Words())
    normswap.patch(model, "sn", example=IDS)
    normswap.to_onnx(model, tmp_path / "m.onnx", example=IDS)
    return model, tmp_path / "m.onnx"


class TestRows:
    @pytest.mark.parametrize("how", SPOILT)
    @pytest.mark.parametrize("rows", [[2999, 2222], [3, 8]])
    def test_rows_are_compared_whether_reached_or_not(self, words, how, rows):
        """Rows other than the model's are found and named, be they among those that the proof reaches or not."""
        model, path = words
        assert normswap.verify(model, path, example=IDS, save_reference=path.with_suffix(".npz"))
        edited(path, spoil_rows, table=(3000, 8), rows=rows, how=how)
        verdict = normswap.verify(model, path, example=IDS)

        told = f"expected the rows of table, received others in 2 of 3000: {min(rows)}, {max(rows)}"
        assert verdict.problems == (told,)
        assert not verdict
        assert normswap.verify_against(path.with_suffix(".npz"), path).problems == (told,)

    def test_many_rows_are_not_all_listed(self, words):
        """Of many rows the first are named."""
        model, path = words
        edited(path, spoil_rows, table=(3000, 8), rows=list(range(500, 600)), how="zeroed")
        (problem,) = normswap.verify(model, path, example=IDS).problems

        assert problem == (
            "expected the rows of table, received others in 100 of 3000: "
            "500, 501, 502, 503, 504, 505, 506, 507, …"
        )  # fmt: skip

    def test_rows_in_float16(self, words, tmp_path):
        """Rounded rows are the model's; zeroed ones are not."""
        model, _ = words
        path = tmp_path / "half.onnx"
        normswap.to_onnx(model, path, example=IDS, half=True)
        assert normswap.verify(model, path, example=IDS)
        edited(path, spoil_rows, table=(3000, 8), rows=[2222], how="zeroed")
        assert normswap.verify(model, path, example=IDS).problems == (
            "expected the rows of table, received others in 1 of 3000: 2222",
        )

    def test_a_table_of_other_size(self, words):
        """A table with fewer rows is told as such."""
        model, path = words
        model.table = nn.Embedding.from_pretrained(torch.cat([model.table.weight, torch.zeros(5, 8)]))
        assert normswap.verify(model, path, example=IDS).problems[0] == (
            "expected the table of table of 3005 rows, received one of 3000"
        )


class Heads(nn.Module):
    """Outputs within others, of one shape; one number for all of them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.BatchNorm2d(8)
        self.heads = nn.ModuleList(nn.Linear(8, 4) for _ in range(3))

    def forward(self, x):
        """Return maps, scores thrice, and a mean."""
        maps = self.norm(self.conv(x))
        a, b, c = (head(maps.mean((2, 3))) for head in self.heads)
        return {"maps": maps, "scores": [a, (b, c / 1000)], "mean": maps.mean()}


X = torch.randn(2, 3, 12, 20, generator=torch.Generator().manual_seed(0))
NAMES = ("maps", "scores_0", "scores_1_0", "scores_1_1", "mean")


@pytest.fixture
def heads(tmp_path):
    """A model of several outputs, and its file, whose height and width are open."""
    model = trained_(Heads())
    normswap.patch(model, "gn", example=X)
    normswap.to_onnx(model, tmp_path / "m.onnx", example=X, dynamic_size=True)
    return model, tmp_path / "m.onnx"


class TestOutputs:
    @pytest.mark.parametrize("name", NAMES)
    def test_one_output_of_several(self, heads, name):
        """Any one output that is a thousandth larger fails, and is named."""
        model, path = heads
        verdict = normswap.verify(model, edited(path, behind, name=name, operator="Mul", operand=1.001))
        assert {check.output for check in verdict.checks if not check.passed} == {name}

    @pytest.mark.parametrize("name", ["maps", "scores_1_0", "mean"])
    def test_an_output_dropped(self, heads, name):
        """An output that is not there is missed."""
        model, path = heads
        assert normswap.verify(model, edited(path, dropped, name=name)).problems == (
            f"expected the outputs {', '.join(NAMES)}, received {', '.join(n for n in NAMES if n != name)}",
        )

    def test_outputs_swapped_or_twice(self, heads, tmp_path):
        """Outputs of one shape that are each other, or one of them both, fail."""
        model, path = heads
        other = tmp_path / "other.onnx"
        other.write_bytes(path.read_bytes())
        names = ("scores_0", "scores_1_1")
        verdict = normswap.verify(model, edited(path, swapped, names=names))
        assert {check.output for check in verdict.checks if not check.passed} == set(names)
        verdict = normswap.verify(model, edited(other, twice, name="scores_1_1", other="scores_1_0"))
        assert {check.output for check in verdict.checks if not check.passed} == {"scores_1_1"}


def told(received):
    """What is said of an input that takes less than it was exported with."""
    return (
        f"expected the input x (batch, 3, height, width), as which it was exported, received ({received})",
    )  # fmt: skip


class TestSizes:
    @pytest.mark.parametrize("where", [("input",), ("input", "output", "value_info")])
    @pytest.mark.parametrize(
        ("sizes", "received"),
        [
            ({"batch": 2}, "2, 3, height, width"),
            ({"width": 20}, "batch, 3, height, 20"),
            ({"width": "height"}, "batch, 3, height, height"),
            ({"height": "batch"}, "batch, 3, batch, width"),
            ({"width": "height", "height": "width"}, "batch, 3, width, height"),
        ],
    )
    def test_inputs_take_what_they_were_exported_with(self, heads, sizes, received, where):
        """A size that was open and is fixed, or is called like another, fails, though the file computes the same."""
        model, path = heads
        edited(path, resized, sizes=sizes, where=where)
        assert normswap.verify(model, path).problems[:1] == told(received)

    def test_a_size_opened_since(self, tmp_path):
        """A file that takes more than it was exported with passes where it computes what the model does."""
        model = trained_(Heads())
        normswap.to_onnx(model, tmp_path / "m.onnx", example=X)
        edited(tmp_path / "m.onnx", resized, sizes={12: "height", 20: "width"}, where=("input",))
        edited(tmp_path / "m.onnx", resized, sizes={6: "h", 10: "w"}, where=("output", "value_info"))
        assert normswap.verify(model, tmp_path / "m.onnx")

    def test_another_fixed_size(self, tmp_path):
        """A fixed size is the one that was exported, also where the model would take the other one."""
        model = trained_(Heads())
        normswap.to_onnx(model, tmp_path / "m.onnx", example=X)
        edited(tmp_path / "m.onnx", resized, sizes={20: 24}, where=("input",))
        edited(tmp_path / "m.onnx", resized, sizes={10: 12}, where=("output", "value_info"))
        assert normswap.verify(model, tmp_path / "m.onnx").problems[:1] == (
            "expected the input x (batch, 3, 12, 20), as which it was exported, received (batch, 3, 12, 24)",
        )

    def test_names_of_outputs(self, heads):
        """What an output calls its sizes is what the inputs call so, or comes of them."""
        model, path = heads
        (before,) = [value for value in onnx.load(path).graph.output if value.name == "maps"]
        names = [size.dim_param for size in before.type.tensor_type.shape.dim]
        assert [*names[:1], *names[2:]] == ["batch", "(((height - 1)//2)) + 1", "(((width - 1)//2)) + 1"]
        for first, second in ((names[2], names[3]), (names[0], names[2])):
            swap = {first: second, second: first}
            edited(path, resized, sizes=swap, where=("output",))
            problems = normswap.verify(model, path).problems[:2]
            assert len(problems) == 2
            assert all(each.startswith("expected one size for each name, received ") for each in problems)
            assert all(each.endswith(" in maps") for each in problems)
            edited(path, resized, sizes=swap, where=("output",))
        assert normswap.verify(model, path)

    @pytest.mark.parametrize(
        ("name", "size"),
        [("n + 1", 5), ("2*n", 8), ("(n - 1)//2 + m", 10), ("n % 3", 1), ("-n", 7), ("f(n)", 7), ("a b", 7)],
    )
    def test_names_that_are_sums(self, name, size):
        """Names that are sums or products of others are held to them; other names are names."""
        values = [
            onnx.helper.make_tensor_value_info(each, onnx.TensorProto.FLOAT, names)
            for each, names in {"x": ["n", "m"], "y": [name]}.items()
        ]
        arrays = {"x": torch.zeros(4, 9), "y": torch.zeros(size), "z": torch.zeros(size + 1)}
        assert list(contradictions(values, arrays)) == []
        values.append(onnx.helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, [name]))
        where = "the inputs" if name[0] in "n2(" else "y"
        assert list(contradictions(values, arrays)) == [
            f"expected one size for each name, received {name} = {size} by {where} and {size + 1} in z"
        ]


class Mean(nn.Module):
    """A model of one number, in which nearly all cancels."""

    def forward(self, x):
        """Return the mean."""
        return x.mean()


def test_one_number_of_what_cancels(tmp_path):
    """One number's own error is that of several draws: a correct file does not fail where it is small by chance."""
    x = torch.randn(3, 16, 14, 14)
    path = tmp_path / "m.onnx"
    normswap.to_onnx(Mean(), path, example=x, check=False)
    edited(path, behind, name="output", operator="Identity")
    generator = torch.Generator().manual_seed(0)
    data = [100 * torch.randn(3, 16, 14, 14, generator=generator) for _ in range(20)]
    data = [each - each.mean() + 0.05 for each in data]
    verdict = normswap.verify(Mean(), path, data=data, save_reference=tmp_path / "r.npz")
    assert verdict, verdict.explain()
    assert normswap.verify_against(tmp_path / "r.npz", path) == verdict
    assert max(check.max_rel for check in verdict.checks) > 1e-5

    assert not normswap.verify(Mean(), edited(path, behind, name="output", operator="Mul", operand=1.01), data=data[:1])
