"""What a file is proved on: inputs as its user has them, made of the example and the data."""

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

import normswap

from .models import trained_


class Net(nn.Module):
    """Scores of images, with a table beside for models that take ids."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.table = nn.Embedding(50, 8)
        self.head = nn.Linear(8, 4)

    def maps(self, x):
        """Return the maps behind the norm."""
        return self.norm(self.conv(x))

    def scores(self, x):
        """Return scores of images."""
        return self.head(self.maps(x).mean((2, 3)))


class Ids(Net):
    def forward(self, ids):
        """Return scores of sequences of token ids, which may be floats."""
        return self.head(self.norm(self.table(ids.long()).transpose(1, 2)[..., None]).mean((2, 3)))


class Lengths(Net):
    def forward(self, x, lengths):
        """Return the scores of each image's first columns; of none there is no mean."""
        mask = (torch.arange(x.shape[3]) < lengths[:, None]).float()[:, None, None]
        return self.head((self.maps(x) * mask).sum((2, 3)) / mask.sum((2, 3)) / x.shape[2])


class Masked(Net):
    def forward(self, x, mask):
        """Return scores of the columns in a mask, which has to have one."""
        mask = mask[:, None, None].float()
        return self.head((self.maps(x) * mask).sum((2, 3)) / mask.sum((2, 3)))


class LogMel(Net):
    def forward(self, x):
        """Return scores of the logarithm of what is above zero."""
        return self.scores(torch.log(x))


class Bytes(Net):
    def forward(self, x):
        """Return scores of images in bytes."""
        return self.scores(x.float() / 255)


class Odd(Net):
    def forward(self, x):
        """Return scores of probabilities, off [0, 1] of nothing."""
        return self.scores(torch.log(x) - torch.log1p(-x))


MASK = torch.arange(8) < torch.tensor([[3], [8]])
IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.1
CASES = {
    "ids": (Ids, torch.arange(24).reshape(2, 12) + 26),
    "ids in floats": (Ids, torch.arange(24.0).reshape(2, 12) + 26),
    "lengths": (Lengths, (torch.randn(2, 3, 8, 8), torch.tensor([5, 8]))),
    "a mask of bool": (Masked, (torch.randn(2, 3, 8, 8), MASK)),
    "a mask of int64": (Masked, (torch.randn(2, 3, 8, 8), MASK.long())),
    "a mask of floats": (Masked, (torch.randn(2, 3, 8, 8), MASK.float())),
    "what is above zero": (LogMel, IMAGES),
    "probabilities": (Odd, IMAGES),
    "bytes": (Bytes, torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)),
}


@pytest.mark.parametrize("target", ["brn", "gn"])
@pytest.mark.parametrize("case", CASES)
def test_inputs_that_are_not_any_numbers(case, target, tmp_path):
    """A correct file passes of a model that takes ids, lengths, masks or a range of numbers alone."""
    build, example = CASES[case]
    model = trained_(build())
    normswap.patch(model, target)
    verdict = normswap.to_onnx(model, tmp_path / "m.onnx", example=example).verdict

    assert verdict
    assert {"example"} < {check.inputs for check in verdict.checks}
    assert {check.batch for check in verdict.checks} == {1, 2, 3, 5}
    assert normswap.verify(model, tmp_path / "m.onnx", data=[example])


def zeroed(path, rows):
    """Zero rows of the table in a file."""
    proto = onnx.load(path)
    for tensor in proto.graph.initializer:
        if tensor.dims[:] == [50, 8]:
            array = numpy_helper.to_array(tensor).copy()
            array[rows] = 0
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(proto, path)


class TestTables:
    @pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.float32])
    @pytest.mark.parametrize("row", [2, 31, 49])
    def test_every_row_is_in_the_proof(self, row, kind, tmp_path):
        """One wrong row of a table fails, whether an example, data or neither reaches it; ids may be floats."""
        model = trained_(Ids())
        shown = torch.tensor([[0, 1, 0, 1, 31, 1]]).to(kind)
        written = normswap.to_onnx(model, tmp_path / "m.onnx", example=shown)
        assert written.verdict.coverage == {"table": (50, 50)}
        assert str(written.verdict).splitlines()[-2] == "table: 50 of 50 rows reached"
        assert written.verdict.to_dict()["coverage"] == {"table": {"reached": 50, "rows": 50}}

        zeroed(tmp_path / "m.onnx", [row])
        unsaid = [{}] if kind != torch.float32 else []  # what floats are, nothing tells
        for said in (*unsaid, {"example": shown}, {"data": [shown]}):
            assert not normswap.verify(model, tmp_path / "m.onnx", **said)

    def test_rows_that_nothing_reaches_are_told(self, tmp_path):
        """Of a table too large for a few samples the verdict says how many rows it speaks of; data adds to them."""
        model = trained_(Ids())
        model.table = nn.Embedding(5000, 8)
        shown = torch.zeros(1, 6, dtype=torch.int64)
        normswap.to_onnx(model, tmp_path / "m.onnx", example=shown)
        few = normswap.verify(model, tmp_path / "m.onnx", example=shown).coverage["table"]
        ids = torch.arange(4200).reshape(700, 6)
        many = normswap.verify(model, tmp_path / "m.onnx", example=shown, data=[ids]).coverage["table"]

        assert few[1] == many[1] == 5000
        assert few[0] < 100 < 4200 <= many[0] < 5000

    def test_data_beyond_a_fixed_batch_is_run_in_parts(self, tmp_path):
        """A file of a fixed batch is run on all of the data, part by part."""

        class Fixed(Ids):
            def forward(self, ids):
                return torch.stack([super(Fixed, self).forward(ids[i : i + 1])[0] for i in range(ids.shape[0])])

        model = trained_(Fixed())
        model.table = nn.Embedding(5000, 8)
        example = torch.tensor([[0, 1], [1, 0]])
        written = normswap.to_onnx(model, tmp_path / "m.onnx", example=example, check=False)
        verdict = normswap.verify(model, tmp_path / "m.onnx", data=[torch.arange(200, 210).reshape(5, 2)])

        assert written.inputs == {"ids": [2, 2]}
        assert verdict
        assert sum(check.inputs == "data" for check in verdict.checks) == 2 * 3

    def test_a_reference_tells_it_too(self, tmp_path):
        """A stored reference of any number of inputs holds what they are, and what they reach."""
        model = trained_(Ids())
        example = torch.arange(12).reshape(2, 6)
        normswap.to_onnx(model, tmp_path / "m.onnx", example=example)
        own = normswap.verify(model, tmp_path / "m.onnx", example=example, save_reference=tmp_path / "r.npz")
        held = normswap.verify_against(tmp_path / "r.npz", tmp_path / "m.onnx")

        assert held == own


@pytest.mark.parametrize("target", ["in", "gn", "sn"])
@pytest.mark.parametrize("contrast", [0.1, 0.02, 0.005])
def test_images_of_low_contrast(contrast, target, tmp_path):
    """A correct file passes on images around one grey, also where it was made without any."""
    model = trained_(nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)))
    normswap.patch(model, target)
    grey = 0.5 + contrast * (torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)) - 0.5)
    normswap.to_onnx(model, tmp_path / "m.onnx", example=torch.randn(2, 3, 32, 32))

    assert normswap.verify(model, tmp_path / "m.onnx", data=[grey])


def test_looking_leaves_the_model_be(tmp_path):
    """Verifying on an example and data changes no buffer, mode or hook of the model."""
    model = trained_(Ids())
    normswap.patch(model, "sn")
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    example = torch.arange(12).reshape(2, 6)
    normswap.to_onnx(model, tmp_path / "m.onnx", example=example)
    normswap.verify(model, tmp_path / "m.onnx", example=example, data=[example])

    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_data_that_does_not_fit(tmp_path):
    """Data of other shapes than the file's is refused, with both."""
    model = trained_(Lengths())
    example = (torch.randn(2, 3, 8, 8), torch.tensor([5, 8]))
    normswap.to_onnx(model, tmp_path / "m.onnx", example=example, check=False)
    with pytest.raises(normswap.errors.InputError) as caught:
        normswap.verify(model, tmp_path / "m.onnx", data=[(np.zeros((2, 3, 4, 8), np.float32), np.ones(2, np.int64))])

    assert str(caught.value) == (
        "expected data of the shapes the file takes, received x (batch, 3, 8, 8) with (2, 3, 4, 8); give such, or "
        "export the model with dynamic_size=True"
    )
