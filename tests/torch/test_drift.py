"""How far a patched PyTorch model is from the original: `report.drift`, and what the plan says of it beforehand."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import normswap
from normswap import BatchRenorm, GroupNorm, SwitchNorm
from normswap.convert.recipe import Rule, Rules
from normswap.errors import InputError, UnsupportedError
from normswap.patchers import measured_drift as drift
from normswap.patchers.measured_drift import drift_between
from normswap.patchers.patch import plans

from ..helpers import exactly
from .models import TARGETS, FrozenBatchNorm2d, fingerprint, trained_


def by_hand(patched, original, name, x):
    """The relative root mean square and maximum of one layer's drift, or for "output" of the model's."""
    seen = []
    for net in (patched, original):
        outputs = []
        module = net if name == "output" else net.get_submodule(name)
        handle = module.register_forward_hook(lambda m, i, o, outputs=outputs: outputs.append(o))
        with torch.no_grad():
            net(x)
        handle.remove()
        seen.append(torch.cat([o.double().flatten() for o in outputs]))
    new, old = seen
    return float((new - old).norm() / old.norm()), float((new - old).abs().max() / old.abs().max())


class Heads(nn.Module):
    """A model with a shared layer, one that is never called, and several outputs."""

    def __init__(self):
        super().__init__()
        self.norm, self.unused, self.plain = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x):
        """Return two outputs, one after two passes through the shared layer."""
        y = self.norm(x)
        return {"deep": self.norm(y * 3), "both": (self.plain(x), None), "count": 1}


class TestDrift:
    @pytest.mark.parametrize("target", TARGETS)
    def test_against_the_original_by_hand(self, model, images, target):
        """Each layer and the output, as a copy of the original computes them."""
        original = copy.deepcopy(model)
        report = normswap.patch(model, target, example=images)
        found = report.drift(images)

        assert [each.name for each in found] == ["stem.1", "bn", "output"]
        for each in found:
            assert (each.rms, each.max) == pytest.approx(by_hand(model, original, each.name, images), abs=1e-6)
        for each, same in zip(drift_between(model, original, ["stem.1", "bn"], images), found, strict=True):
            assert (each.name, each.rms, each.max) == (
                same.name,
                *(pytest.approx(x, abs=1e-6) for x in (same.rms, same.max)),
            )

    def test_nothing_changes(self, model, images):
        """State, classes, hooks, attributes and each module's mode are as before, also where the example fails."""
        report = normswap.patch(model, "gn")
        model.train()
        model.bn.eval()
        model.bn.register_forward_hook(lambda *_: None)

        def everything():
            contents = [(type(m), dict(vars(m)), dict(m._forward_hooks), m.training) for m in model.modules()]
            return fingerprint(model), contents

        before = everything()
        report.drift(images)
        assert everything() == before
        message = "expected an example the model accepts, received one on which it fails: "
        with pytest.raises(InputError, match=f"^{message}"):
            report.drift(torch.zeros(1, 9, 4, 4))

        assert everything() == before
        report.undo()

    def test_in_rounds(self, model, images, monkeypatch):
        """With room for one layer at a time the figures are the same."""
        report = normswap.patch(model, "in")
        found = report.drift(images)
        monkeypatch.setattr(drift, "HELD", 1)

        assert report.drift(images) == found

    def test_shared_layers_and_several_outputs(self):
        """A layer called twice counts both calls, one never called is left out, every output has its name."""
        model, x = trained_(Heads()), torch.randn(3, 4, 5, 5)
        original = copy.deepcopy(model)
        report = normswap.patch(model, "gn")
        found = {each.name: each for each in report.drift(x)}

        assert list(found) == ["norm", "plain", "output[deep]", "output[both][0]"]
        assert found["norm"].rms == pytest.approx(by_hand(model, original, "norm", x)[0], abs=1e-6)
        assert found["output[both][0]"].rms == found["plain"].rms

    @pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}])
    @pytest.mark.parametrize("target", ["gn", "sn", "brn"])
    def test_a_batch_norm_without(self, options, target):
        """Without scale and shift, or without running statistics, the original is what it was."""
        model, x = trained_(nn.Sequential(nn.BatchNorm2d(4, **options))), torch.randn(3, 4, 5, 5)
        original = copy.deepcopy(model)
        layer, _ = normswap.patch(model, target, include=["*"]).drift(x)

        assert (layer.rms, layer.max) == pytest.approx(by_hand(model, original, "0", x), abs=1e-6)

    def test_a_frozen_batch_norm(self):
        """Buffers for scale and shift are the original's too."""
        model, x = nn.Sequential(FrozenBatchNorm2d(4)), torch.randn(3, 4, 5, 5)
        model[0].weight.uniform_(1, 2)
        original = copy.deepcopy(model)
        layer, _ = normswap.patch(model, "gn", include=["*"]).drift(x)

        assert layer.rms == pytest.approx(by_hand(model, original, "0", x)[0], abs=1e-6)

    def test_a_traced_graph(self, model, images):
        """A graph's calls of batch_norm are compared as the layers they become."""
        graph = torch.export.export(copy.deepcopy(model), (images,)).module()
        report = normswap.patch(graph, "gn")
        expected = normswap.patch(model, "gn").drift(images)

        for found, same in zip(report.drift(images), expected, strict=True):
            assert (found.rms, found.max) == pytest.approx((same.rms, same.max), abs=1e-5)

    def test_zeros(self):
        """Where the original is zero throughout, no share says how far the other is."""
        assert drift._share(0.0, 0.0) == 0.0
        assert drift._share(1.0, 0.0) is None

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_what_is_not_finite(self, model, images, value):
        """No share says how far outputs are that hold NaN or infinities."""
        images[0, 0, 0, 0] = value
        found = normswap.patch(model, "gn").drift(images)

        assert [(each.rms, each.max) for each in found] == [(None, None)] * 3

    def test_other_shapes(self):
        """Outputs whose shapes differ, such as lists of boxes, are not compared."""
        distance = drift._Distance()
        distance.add(np.zeros((2, 4)), np.zeros((3, 4)))

        assert distance.drift("boxes") == drift.Drift("boxes", None, None)

    @pytest.mark.parametrize("calls", [(1, 2), (2, 1), (1, 0)])
    def test_calls_that_are_not_as_many(self, images, calls):
        """What cannot be compared call by call is None, and the rest is told."""

        class Counting(nn.Module):
            """Calls its norm as often as it is told, the other way each time."""

            def __init__(self):
                super().__init__()
                self.bn, self.last, self.calls = nn.BatchNorm2d(3), nn.BatchNorm2d(3), [*calls]

            def forward(self, x):
                for _ in range(self.calls[0]):
                    x = self.bn(x)
                self.calls.reverse()
                return self.last(x)

        report = normswap.patch(trained_(Counting()), "in")
        bn, last, output = report.drift(images)

        assert (bn.name, bn.rms, bn.max) == ("bn", None, None)
        assert last.name == "last"
        assert min(last.rms, last.max, output.rms, output.max) > 0

    def test_outputs_that_are_not_the_same(self, images):
        """An output that one of the two does not give is None."""

        class Alternating(nn.Module):
            """Returns another output every other time."""

            def __init__(self):
                super().__init__()
                self.bn, self.name = nn.BatchNorm2d(3), "b"

            def forward(self, x):
                self.name = "a" if self.name == "b" else "b"
                return {"y": self.bn(x), self.name: x}

        found = {drift.name: drift.rms for drift in normswap.patch(trained_(Alternating()), "brn").drift(images)}

        assert found == {"bn": 0.0, "output[y]": 0.0, "output[a]": None, "output[b]": None}


class TestRefusals:
    def test_after_training(self, model, images):
        """Once a layer has learned, the rest may have too, and no undo brings the original back."""
        report = normswap.patch(model, "gn")
        with torch.no_grad():
            model.bn.weight += 1
        message = (
            "expected untrained replacements, received 1 that have changed since the patch (first: bn); "
            "what else has changed is not known: compare with the original model, loaded again"
        )
        with pytest.raises(UnsupportedError, match=exactly(message)):
            report.drift(images)

    def test_after_undo(self, model, images):
        """A patch that was undone has no drift."""
        report = normswap.patch(model, "gn")
        report.undo()
        with pytest.raises(UnsupportedError, match="^expected a patched model, received one whose patch was undone$"):
            report.drift(images)


class TestPlan:
    def test_mixed_rules_replay_bit_equal(self, model, images):
        """What rules made is a recipe of exact sites, which makes the same of a fresh copy without the example."""
        fresh = copy.deepcopy(model)
        anchored = SwitchNorm("even", "frozen")
        rules = Rules((Rule(GroupNorm(groups=2), "stem.*"), Rule(anchored, depth=(0.5, 1), stage=0)))
        report = normswap.patch(model, rules, example=images)
        recipe = normswap.Recipe.from_json(report.recipe.to_json())

        assert [choice.target.kind for choice in recipe.choices] == ["gn", "sn"]
        assert normswap.patch(fresh, recipe).recipe == recipe
        assert fingerprint(fresh) == fingerprint(model)

    @pytest.mark.parametrize(
        "target",
        [BatchRenorm(), SwitchNorm("exact"), SwitchNorm("exact", "frozen"), SwitchNorm(), GroupNorm(),
         SwitchNorm("exact", "none")],
    )  # fmt: skip
    def test_what_folds_at_export(self, model, images, tmp_path, target):
        """The plan's `folds` is what the exporter does with a norm behind a convolution."""
        plan = normswap.plan(model, target, example=images)
        normswap.patch(model, target)
        folded = normswap.to_onnx(model.eval(), tmp_path / "m.onnx", example=images).folded

        assert {d.site.name for d in plan.decisions if d.folds} == set(folded)

    def test_several_targets_on_one_look(self, model, images):
        """Plans for several targets are those for each, from one dry run."""
        expected = [normswap.plan(model, target, example=images) for target in TARGETS]
        calls = []
        model.register_forward_hook(lambda *_: calls.append(1))

        assert plans(model, TARGETS, example=images) == expected
        assert len(calls) == 1

    def test_expected_drift(self, model):
        """The plan knows it from the model's values, before anything is touched; a meta model has none."""
        before = fingerprint(model)
        plans = [normswap.plan(model, target) for target in ("brn", "sn", "ln", "in")]

        for site in zip(*(plan.decisions for plan in plans), strict=True):
            none, little, more, most = (decision.drift for decision in site)
            assert 0 == none < little < more < most < 1
        assert fingerprint(model) == before
        assert [d.drift for d in normswap.plan(model.to("meta"), "gn").decisions] == [None, None]
