"""One example, of whatever form, serves plan, patch, drift, calibrate, export and verification alike."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import normswap
from normswap import Inputs

from .models import trained_

X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
GAIN = torch.rand(16, 4, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Scores of images; the forwards below say how they are given."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 4)

    def scores(self, x):
        """Return scores of images."""
        return self.head(self.norm(self.conv(x)).mean((2, 3)))


class Plain(Net):
    def forward(self, x):
        """Return scores."""
        return self.scores(x)


class Single(Net):
    def forward(self, x):
        """Return scores, whatever floats it takes."""
        return self.scores(x.float())


class Keywords(Net):
    def forward(self, pixels=None, gain=None, as_mapping=None):
        """Return scores, or a mapping of them."""
        y = self.scores(pixels) if gain is None else self.scores(pixels) * gain
        return {"scores": y} if as_mapping else y


class KeywordsAlone(Net):
    def forward(self, *, pixels, gain):
        """Return scores times a gain."""
        return self.scores(pixels) * gain


class AnyKeywords(Net):
    def forward(self, pixels, **more):
        """Return scores times a gain."""
        return self.scores(pixels) * more["gain"]


class Pair(Net):
    def forward(self, pair):
        """Return scores of a sum."""
        return self.scores(pair[0] + pair[1])


class OneMapping(Net):
    def forward(self, batch):
        """Return scores times a gain."""
        return self.scores(batch["x"]) * batch["gain"]


class Flags(Net):
    def forward(self, x, flag=False, mode="plain", nothing=None, times=1):
        """Return scores as the flags say."""
        y = self.scores(x) * (2 if flag else 1) + (1 if mode == "more" else 0)
        return (y - 1 if nothing is None else y) * times


CASES = {
    "a mapping": (Keywords, {"pixels": X, "gain": GAIN}),
    "a mapping in another order": (Keywords, {"gain": GAIN, "pixels": X}),
    "None and a flag by keyword": (Keywords, {"pixels": X, "gain": None, "as_mapping": True}),
    "keywords alone": (KeywordsAlone, {"gain": GAIN, "pixels": X}),
    "any keywords": (AnyKeywords, Inputs(X, gain=GAIN)),
    "a list": (Pair, [X, X + 1]),
    "a list in a tuple": (Pair, ([X, X + 1],)),
    "arrays in a list": (Pair, ([X.numpy(), X.numpy() + 1],)),
    "a tuple in a tuple": (Pair, ((X, X + 1),)),
    "one mapping": (OneMapping, Inputs({"x": X, "gain": GAIN})),
    "flags, texts and numbers": (Flags, (X, True, "more", None, 3)),
    "flags by keyword": (Flags, Inputs(X, flag=True, nothing=0)),
    "doubles": (Plain, X.double()),
    "doubles of NumPy": (Plain, X.numpy().astype(np.float64)),
    "doubles the model takes": (Single, X.double()),
    "halves": (Plain, X.half()),
    "axes in another order": (Plain, X.transpose(2, 3)),
    "with a gradient": (Plain, X.clone().requires_grad_()),
}


@pytest.mark.parametrize("case", CASES)
def test_examples_of_every_form(case, tmp_path):
    """It is taken by all alike, and the file is proved on it."""
    build, example = CASES[case]
    model = trained_(build())
    original = copy.deepcopy(model)
    assert normswap.plan(model, "gn", example=example).having("replace")
    report = normswap.patch(model, "gn", example=example)
    assert report.drift(example)
    assert normswap.calibrate(model, original, [example])
    written = normswap.to_onnx(model, tmp_path / "m.onnx", example=example, data=[example])

    assert {"example", "data"} <= {check.inputs for check in written.verdict.checks}
    assert normswap.verify(model, tmp_path / "m.onnx", example=example)
    assert normswap.verify(model, tmp_path / "m.onnx", data=[example])


def test_keywords_are_known_without_an_example(tmp_path):
    """What a forward takes by keyword alone is given by the names in the file."""
    model = trained_(KeywordsAlone())
    normswap.to_onnx(model, tmp_path / "m.onnx", example={"pixels": X, "gain": GAIN}, check=False)

    assert normswap.verify(model, tmp_path / "m.onnx")
