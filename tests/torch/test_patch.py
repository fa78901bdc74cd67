"""The patcher on PyTorch models: nothing about a model changes but its BatchNorms.

Test names end in the number of the hard case they settle.
"""

import copy
import hashlib
import re

import pytest
import torch
from torch import nn

import normswap
from normswap import BatchRenorm, GroupNorm, Recipe, SwitchNorm
from normswap.errors import InputError, UnsupportedError
from normswap.layers.torch import SwitchNorm1d, SwitchNorm2d, SwitchNorm3d

from .conftest import TARGETS, trained_


def fingerprint(model):
    """A hash of everything in the state dict, names and types included."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def batch_norms(model):
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


class TestIdentity:
    @pytest.mark.parametrize("target", TARGETS)
    def test_one_batch_norm_twice_in_one_parent_1(self, target):
        """Both names lead to the one replacement."""
        norm = nn.BatchNorm2d(4)
        model = nn.Sequential(norm, nn.ReLU(), norm)
        report = normswap.patch(model, target)

        assert model[0] is model[2]
        assert batch_norms(model) == []
        assert report.replaced[0].site.aliases == ("2",)

    def test_one_batch_norm_in_two_parents_2(self):
        """A BatchNorm shared by two parents becomes one object, its statistics shared."""
        norm = nn.BatchNorm2d(4)
        model = nn.Sequential(nn.Sequential(norm), nn.Sequential(norm))
        normswap.patch(model, "sn")

        assert model[0][0] is model[1][0]
        assert isinstance(model[0][0], SwitchNorm2d)

    def test_an_alias_in_a_plain_list_3(self, images):
        """A forward that reaches the norm through a plain list runs the replacement."""

        class Listed(nn.Module):
            def __init__(self):
                super().__init__()
                self.norm = nn.BatchNorm2d(3)
                self.plain = [self.norm]

            def forward(self, x):
                return self.plain[0](x)

        model = trained_(Listed())
        normswap.patch(model, "gn")

        assert model.plain[0] is model.norm
        torch.testing.assert_close(
            model(images), nn.functional.group_norm(images, 1, model.norm.weight, model.norm.bias)
        )

    @pytest.mark.parametrize("target", TARGETS)
    def test_the_root_is_a_batch_norm_4(self, target):
        """A bare BatchNorm is patched like any; the report's model is the object itself."""
        model = nn.BatchNorm2d(4)
        report = normswap.patch(model, target)

        assert report.model is model
        assert not isinstance(model, nn.BatchNorm2d)

    def test_not_in_place_5(self, model):
        """inplace=False leaves the model bit-identical, hooks that cannot be pickled included."""
        model.bn.register_forward_hook(lambda module, inputs, output: None)
        before = fingerprint(model)
        report = normswap.patch(model, "gn", inplace=False)

        assert report.model is not model
        assert fingerprint(model) == before
        assert len(batch_norms(model)) == 2
        assert batch_norms(report.model) == []

    def test_patching_twice_6(self, model):
        """A second patch with the same target changes nothing and counts what was done before."""
        normswap.patch(model, "sn")
        before = fingerprint(model)
        report = normswap.patch(model, "sn")

        assert fingerprint(model) == before
        assert str(report) == "0 replaced, 2 already patched, 0 skipped"

    def test_another_target_on_a_patched_model_6(self, model):
        """A third kind on a patched layer is refused by name."""
        normswap.patch(model, "sn")
        message = (
            "expected BatchNorms that can be replaced, received 2 that cannot:\n"
            "  stem.1 (SwitchNorm2d): already patched to sn: undo that first, or patch the original model to gn\n"
            "  bn (SwitchNorm2d): already patched to sn: undo that first, or patch the original model to gn\n"
            "leave such a layer as it is with --exclude NAME (exclude=[NAME])"
        )
        with pytest.raises(UnsupportedError, match=f"^{re.escape(message)}$"):
            normswap.patch(model, "gn")

    @pytest.mark.parametrize("target", [*TARGETS, SwitchNorm("even", "frozen"), SwitchNorm("warm", "none")])
    def test_undo_7(self, model, images, target):
        """undo() restores types, keys and outputs bit for bit, and leaves no mark behind."""
        before, output, types = fingerprint(model), model(images), [type(m) for m in model.modules()]
        normswap.patch(model, target).undo()

        assert fingerprint(model) == before
        assert [type(m) for m in model.modules()] == types
        assert torch.equal(model(images), output)
        assert normswap.plan(model, "gn").having("done") == []

    def test_undo_after_training_is_refused_7(self, model):
        """Once a GroupNorm has been trained no BatchNorm computes what it does."""
        report = normswap.patch(model, "gn")
        with torch.no_grad():
            model.bn.weight.add_(1)
        message = (
            "expected untrained replacements, received 1 that have changed since the patch (first: bn); "
            "no BatchNorm computes what they do: reload the original model"
        )
        with pytest.raises(UnsupportedError, match=f"^{re.escape(message)}$"):
            report.undo()

    def test_undo_of_a_trained_batch_renorm_keeps_what_it_learned_7(self, model, images):
        """A BatchRenorm computes a BatchNorm, so undo gives the BatchNorm with the trained values."""
        report = normswap.patch(model, "brn")
        with torch.no_grad():
            model.bn.weight.add_(1)
        output = model(images)
        report.undo()

        assert type(model.bn) is nn.BatchNorm2d
        torch.testing.assert_close(model(images), output)

    def test_all_or_nothing_8(self):
        """One layer of fifty that cannot be replaced: the model stays as it was, the layer is named."""
        model = trained_(nn.Sequential(*[nn.BatchNorm2d(12 if k == 30 else 16) for k in range(50)]))
        before = fingerprint(model)
        message = (
            "expected BatchNorms that can be replaced, received 1 that cannot:\n"
            "  30 (BatchNorm2d): expected groups to divide the 12 channels, received groups=8; use groups=4, "
            "groups='auto', or indivisible='gcd'\n"
            "leave such a layer as it is with --exclude NAME (exclude=[NAME])"
        )
        with pytest.raises(UnsupportedError, match=f"^{re.escape(message)}$"):
            normswap.patch(model, GroupNorm(groups=8))

        assert fingerprint(model) == before
        assert len(batch_norms(model)) == 50

    def test_a_bad_value_is_found_before_anything_is_touched_8(self):
        """A NaN statistic in the last layer leaves the first untouched too."""
        model = trained_(nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4)))
        model[1].running_var[2] = torch.nan
        message = "1: expected finite parameters and variances >= 0, received 1 non-finite values in var"
        with pytest.raises(InputError, match=f"^{message}$"):
            normswap.patch(model, "sn")

        assert len(batch_norms(model)) == 2

    @pytest.mark.parametrize("target", TARGETS)
    def test_no_selected_batch_norm_remains_9(self, model, target):
        """What the report says was replaced is replaced, and what it skipped is there."""
        report = normswap.patch(model, target, exclude=["stem.*"])

        assert [d.site.name for d in report.replaced] == ["bn"]
        assert [(d.site.name, d.note) for d in report.skipped] == [("stem.1", "excluded")]
        assert [n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)] == ["stem.1"]


class TestTypes:
    def test_an_overridden_forward_is_refused(self):
        """A subclass that computes more would lose it, so it is named instead."""

        class WithActivation(nn.BatchNorm2d):
            def forward(self, x):
                return super().forward(x).relu()

        with pytest.raises(UnsupportedError, match="0 \\(WithActivation\\): WithActivation overrides forward"):
            normswap.patch(nn.Sequential(WithActivation(3)), "gn")

    def test_a_subclass_that_computes_the_same_is_patched(self):
        """A subclass without a forward of its own is a BatchNorm."""

        class Renamed(nn.BatchNorm2d):
            pass

        assert len(normswap.patch(nn.Sequential(Renamed(3)), "gn").replaced) == 1

    def test_an_uninitialised_lazy_batch_norm_is_refused(self):
        """A lazy BatchNorm needs one forward pass; after it, it is patched."""
        model = nn.Sequential(nn.LazyBatchNorm2d())
        with pytest.raises(UnsupportedError, match="0 \\(LazyBatchNorm2d\\): not initialised yet: run one forward"):
            normswap.patch(model, "gn")
        model(torch.randn(2, 3, 4, 4))

        assert len(normswap.patch(model, "gn").replaced) == 1

    def test_other_norms_are_left_alone(self):
        """InstanceNorm, GroupNorm and LayerNorm are no sites."""
        model = nn.Sequential(
            nn.InstanceNorm2d(4, track_running_stats=True), nn.GroupNorm(2, 4), nn.LayerNorm(4), nn.BatchNorm2d(4)
        )

        assert [d.site.name for d in normswap.patch(model, "gn").replaced] == ["3"]

    @pytest.mark.parametrize("target", TARGETS)
    @pytest.mark.parametrize("options", [{"affine": False}, {"bias": False}])
    def test_missing_parameters(self, target, options):
        """Without scale or shift the function is kept all the same."""
        model = trained_(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, **options)))
        x = torch.randn(2, 3, 5, 5)
        expected = model(x)
        patched = normswap.patch(model, target).model(x)

        assert torch.isfinite(patched).all()
        if target == "brn":
            assert torch.equal(patched, expected)
            assert model[1].bias is None

    @pytest.mark.parametrize("target", ["sn", "gn", "brn"])
    def test_without_running_statistics(self, target):
        """There is nothing to match: gamma and beta are copied and the plan says so."""
        model = nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False))
        torch.nn.init.uniform_(model[0].weight)
        weight = model[0].weight.detach().clone()
        report = normswap.patch(model, target)

        assert torch.equal(model[0].weight, weight)
        assert report.replaced[0].note.startswith("no running statistics: gamma and beta are copied")

    def test_ranks(self):
        """Each rank of BatchNorm becomes the layer of its rank."""
        model = nn.ModuleList([nn.BatchNorm1d(4), nn.BatchNorm2d(4), nn.BatchNorm3d(4)])
        normswap.patch(model, "sn")

        assert [type(m) for m in model] == [SwitchNorm1d, SwitchNorm2d, SwitchNorm3d]

    def test_sync_batch_norm_takes_its_rank_from_the_example(self):
        """A SyncBatchNorm serves any rank: an example tells which."""
        model = trained_(nn.Sequential(nn.SyncBatchNorm(4)))
        with pytest.raises(UnsupportedError, match="a SyncBatchNorm takes any rank: give an example input"):
            normswap.patch(model, "sn")
        normswap.patch(model, "sn", example=torch.randn(2, 4, 3, 3))

        assert type(model[0]) is SwitchNorm2d

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_wrapped_models_are_refused(self, model):
        """TorchScript has no Python to patch, and a wrapped model is to be patched before."""
        with pytest.raises(UnsupportedError, match="^expected a module with Python code, received TorchScript"):
            normswap.patch(torch.jit.script(nn.BatchNorm2d(3)), "gn")
        with pytest.raises(UnsupportedError, match="^expected an unwrapped model, received a DataParallel; patch"):
            normswap.patch(nn.DataParallel(model), "gn")

    def test_a_quantization_aware_module_is_refused(self):
        """The BatchNorm inside a fused QAT convolution is no layer of its own."""
        from torch.ao.nn.intrinsic import qat
        from torch.ao.quantization import get_default_qat_qconfig

        model = nn.Sequential(qat.ConvBn2d(3, 4, 1, qconfig=get_default_qat_qconfig("fbgemm")))
        with pytest.raises(UnsupportedError, match="0.bn \\(BatchNorm2d\\): part of a quantization-aware module"):
            normswap.patch(model, "gn")


class TestSelection:
    @pytest.mark.parametrize(
        ("selection", "replaced"),
        [
            ({"include": ["stem.*"]}, ["stem.1"]),
            ({"include": ["re:.*bn"]}, ["bn"]),
            ({"exclude": ["re:stem\\.\\d"]}, ["bn"]),
            ({"where": lambda module, name: module.eps == 1e-3}, ["bn"]),
        ],
    )
    def test_patterns(self, model, selection, replaced):
        """Globs, regular expressions and a function choose the layers."""
        assert [d.site.name for d in normswap.patch(model, "gn", **selection).replaced] == replaced

    def test_a_pattern_without_a_match(self, model):
        """A pattern that matches nothing is a mistake, not a wish."""
        message = "expected a pattern that matches a BatchNorm, received 'layer4.*'; names begin stem.1, bn"
        with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
            normswap.plan(model, "gn", exclude=["layer4.*"])

    @pytest.mark.parametrize(
        ("build", "found"),
        [(lambda: nn.Conv2d(1, 1, 1), "none"), (lambda: nn.BatchNorm2d(3), "1 BatchNorms, all skipped")],
    )
    def test_nothing_to_do(self, build, found):
        """A model without a BatchNorm to replace is refused."""
        message = f"expected a model with BatchNorm layers to replace, received {found}"
        with pytest.raises(UnsupportedError, match=f"^{message}$"):
            normswap.patch(build(), "gn", where=lambda module, name: False)

    def test_a_model_of_neither_framework(self):
        """Anything but a model of a supported framework is named."""
        message = "expected a torch.nn.Module or a Keras 3 model, received builtins.dict"
        with pytest.raises(InputError, match=f"^{message}$"):
            normswap.patch({}, "gn")

    def test_an_example_that_does_not_fit(self, model):
        """An example the model cannot take is the caller's mistake, and the mode is restored."""
        model.train()
        with pytest.raises(InputError, match="^expected an example the model accepts, received one on which it fails"):
            normswap.plan(model, "gn", example=torch.zeros(1, 9, 4, 4))

        assert all(m.training for m in model.modules())
        assert not model.bn._forward_pre_hooks


class TestRecipe:
    @pytest.mark.parametrize("target", [*TARGETS, SwitchNorm("even", "none"), BatchRenorm(2, 1)])
    def test_replay_is_bit_equal(self, model, images, target):
        """A recipe made with an example gives the same model from a fresh copy, without the example."""
        fresh = copy.deepcopy(model)
        report = normswap.patch(model, target, example=images)
        normswap.patch(fresh, Recipe.from_json(report.recipe.to_json()))

        assert fingerprint(fresh) == fingerprint(model)

    def test_a_recipe_for_another_model(self, model):
        """Names and widths that do not fit are listed."""
        recipe = normswap.patch(nn.Sequential(nn.BatchNorm2d(4)), "gn").recipe
        message = "expected a recipe made for this model, received one that does not fit:\n  0: no such BatchNorm"
        with pytest.raises(InputError, match=f"^{message}$"):
            normswap.patch(model, recipe)

    def test_a_recipe_may_leave_layers_out(self, model):
        """Sites a recipe does not name are skipped."""
        recipe = normswap.plan(model, "gn", include=["bn"]).recipe()

        assert [d.note for d in normswap.patch(model, recipe).skipped] == ["not in the recipe"]
