"""The patcher on PyTorch models: which layers are chosen, what is refused, and how a recipe replays it."""

import copy
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import normswap
from normswap import BatchRenorm, GroupNorm, Recipe, SwitchNorm
from normswap.errors import InputError, NormswapError, UnsupportedError, UsageError

from ..helpers import exactly
from .models import (
    TARGETS,
    FrozenBatchNorm2d,
    Functional,
    Unregistered,
    WithActivation,
    fingerprint,
    quantization_aware,
    trained_,
)


def damaged():
    """A BatchNorm with a value that is none."""
    norm = nn.BatchNorm2d(3)
    norm.running_var[1] = torch.nan
    return norm


def pruned():
    """A BatchNorm whose weight a hook computes."""
    return prune.l1_unstructured(nn.BatchNorm2d(3), "weight", 0.5)


def on_the_object():
    """A BatchNorm whose forward somebody has replaced on the object."""
    norm = nn.BatchNorm2d(3)
    norm.forward = norm.forward
    return norm


class TestRefusals:
    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    @pytest.mark.parametrize(
        ("build", "options", "code", "said"),
        [
            (lambda: WithActivation(3), {}, 4, "2 (WithActivation): WithActivation overrides forward"),
            (on_the_object, {}, 4, "2 (BatchNorm2d): its forward was replaced on the object itself"),
            (pruned, {}, 4, "2 (BatchNorm2d): its weight or bias is computed by a hook"),
            (quantization_aware, {"include": ["*"]}, 4, "2.0.bn (BatchNorm2d): part of a quantization-aware module"),
            (
                lambda: torch.jit.script(nn.BatchNorm2d(3)),
                {},
                4,
                "2 (BatchNorm2d): TorchScript has no Python code to change",
            ),
            (lambda: nn.SyncBatchNorm(3), {"target": "sn"}, 4, "2 (SyncBatchNorm): a SyncBatchNorm takes any number"),
            (lambda: nn.BatchNorm2d(1), {"target": "in"}, 4, "2 (BatchNorm2d): a group of one value per sample"),
            (
                lambda: nn.BatchNorm2d(9),
                {"target": GroupNorm(groups=2)},
                4,
                "2 (BatchNorm2d): expected groups to divide the 9",
            ),
            (
                lambda: nn.BatchNorm2d(3, track_running_stats=False),
                {"target": SwitchNorm("warm", "frozen")},
                4,
                "2 (BatchNorm2d): batch_statistics='frozen' needs running statistics to freeze",
            ),
            (Functional, {"example": torch.ones(2, 4, 5, 5)}, 4, "2.forward (batch_norm): called in a forward"),
            (Unregistered, {"example": torch.ones(2, 4, 5, 5)}, 4, "2.forward (batch_norm): called in a forward"),
            (
                lambda: nn.DataParallel(nn.BatchNorm2d(3)),
                {},
                4,
                "received a DataParallel in 2; patch the model and then",
            ),
            (
                lambda: FrozenBatchNorm2d(3),
                {"exclude": ["0"]},
                4,
                "2 BatchNorms, all skipped (excluded; frozen: a constant",
            ),
            (damaged, {}, 3, "received 1 that are not:\n  2.running_var: 1 of 3 not finite"),
            (lambda: nn.BatchNorm2d(3), {"exclude": ["layer4.*"]}, 3, "expected a pattern that matches a BatchNorm"),
            (
                lambda: nn.BatchNorm2d(3),
                {"example": torch.ones(1, 9, 5, 5)},
                3,
                "expected an example the model accepts",
            ),
            (lambda: nn.BatchNorm2d(3), {"target": "xn"}, 3, "expected a target out of sn, brn, gn, ln, in, bn"),
        ],
    )
    def test_a_refused_model_is_untouched(self, build, options, code, said):
        """Whatever is refused is named with the reason, and the whole model's state is as it was."""
        model = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1), build()).eval()
        trained_(model[:1])
        options = dict(options)
        target = options.pop("target", "gn")
        before, types, contents = fingerprint(model), [type(m) for m in model.modules()], copy.copy(vars(model[0]))
        with pytest.raises(NormswapError, match=re.escape(said)) as caught:
            normswap.patch(model, target, **options)

        assert caught.value.exit_code == code
        assert fingerprint(model) == before
        assert [type(m) for m in model.modules()] == types
        assert vars(model[0]) == contents
        assert not model[0]._forward_pre_hooks


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
        with pytest.raises(InputError, match=exactly(message)):
            normswap.plan(model, "gn", exclude=["layer4.*"])

    @pytest.mark.parametrize(
        ("build", "found"),
        [
            (lambda: nn.Conv2d(1, 1, 1), "none"),
            (lambda: nn.BatchNorm2d(3), "1 BatchNorm, all skipped (not selected by `where`)"),
        ],
    )
    def test_nothing_to_do(self, build, found):
        """A model without a BatchNorm to replace is refused."""
        message = f"expected a model with BatchNorm layers to replace, received {found}"
        with pytest.raises(UnsupportedError, match=exactly(message)):
            normswap.patch(build(), "gn", where=lambda module, name: False)

    def test_a_model_of_neither_framework(self):
        """Anything but a model of a supported framework is named."""
        message = "expected a torch.nn.Module or a Keras 3 model, received builtins.dict"
        with pytest.raises(InputError, match=exactly(message)):
            normswap.patch({}, "gn")

    def test_an_example_that_does_not_fit(self, model):
        """An example the model cannot take is the caller's mistake, and the mode is restored."""
        model.train()
        with pytest.raises(InputError, match="^expected an example the model accepts, received one on which it fails"):
            normswap.plan(model, "gn", example=torch.zeros(1, 9, 4, 4))

        assert all(m.training for m in model.modules())
        assert not model.bn._forward_pre_hooks


def test_what_is_no_function(model):
    """It is refused before any layer is asked for."""
    message = "expected `where` as a function of layer and name, or None, received where='stem'"
    with pytest.raises(InputError, match=exactly(message)):
        normswap.plan(model, "gn", where="stem")


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
        with pytest.raises(InputError, match=exactly(message)):
            normswap.patch(model, recipe)

    @pytest.mark.parametrize("equalize", [False, "scale"])
    def test_beside_a_recipe_nothing_else_is_said_of_layers_in_front(self, model, equalize):
        """It tells that itself."""
        recipe = normswap.plan(model, "gn").recipe()
        message = (
            "expected a recipe alone, which tells what layers in front of norms take, received "
            f"equalize={equalize!r} beside it; leave that out"
        )
        for verb in (normswap.plan, normswap.patch):
            with pytest.raises(UsageError, match=exactly(message)):
                verb(model, recipe, equalize=equalize)

    def test_a_recipe_may_leave_layers_out(self, model):
        """Sites a recipe does not name are skipped."""
        recipe = normswap.plan(model, "gn", include=["bn"]).recipe()

        assert [d.note for d in normswap.patch(model, recipe).skipped] == ["not in the recipe"]


@pytest.mark.parametrize(
    ("options", "replaced"),
    [
        ({}, ["stem.1", "bn"]),
        ({"include": None, "exclude": None}, ["stem.1", "bn"]),
        ({"include": "stem.*"}, ["stem.1"]),
        ({"exclude": "stem.*"}, ["bn"]),
        ({"include": ["stem.1", "b?"], "exclude": "re:b."}, ["stem.1"]),
    ],
)
def test_one_pattern_or_several(model, options, replaced):
    """`plan` and `patch` take a pattern, several or None for which layers are meant."""
    planned = normswap.plan(model, "gn", **options)

    assert [decision.site.name for decision in planned.having("replace")] == replaced
    assert [decision.site.name for decision in normswap.patch(model, "gn", **options).replaced] == replaced
