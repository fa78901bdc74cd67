"""What is one object stays one object, and a patch is whole, repeatable and undoable."""

import copy

import pytest
import torch
from torch import nn

import normswap
from normswap import GroupNorm, SwitchNorm
from normswap.errors import InputError, UnsupportedError
from normswap.layers.torch import SwitchNorm2d

from ..helpers import exactly, refusal
from .models import TARGETS, batch_norms, fingerprint, trained_


@pytest.mark.parametrize("target", TARGETS)
def test_twice_in_one_parent_is_one_replacement(target):
    """Both names lead to the one replacement."""
    norm = nn.BatchNorm2d(4)
    model = nn.Sequential(norm, nn.ReLU(), norm)
    report = normswap.patch(model, target)

    assert model[0] is model[2]
    assert batch_norms(model) == []
    assert report.replaced[0].site.aliases == ("2",)


def test_shared_by_two_parents_is_one_replacement():
    """A BatchNorm shared by two parents becomes one object, which keeps the statistics it had."""
    norm = trained_(nn.BatchNorm2d(4))
    statistics = norm.running_mean
    model = nn.Sequential(nn.Sequential(norm), nn.Sequential(norm))
    normswap.patch(model, "sn")

    assert model[0][0] is model[1][0]
    assert isinstance(model[0][0], SwitchNorm2d)
    assert model[1][0].running_mean is statistics


def test_reached_through_a_plain_list(images):
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
    torch.testing.assert_close(model(images), nn.functional.group_norm(images, 1, model.norm.weight, model.norm.bias))


@pytest.mark.parametrize("target", TARGETS)
def test_the_root_is_a_batch_norm(target):
    """A bare BatchNorm is patched like any; the report's model is the object itself."""
    model = nn.BatchNorm2d(4)
    report = normswap.patch(model, target)

    assert report.model is model
    assert not isinstance(model, nn.BatchNorm2d)


def test_not_in_place_leaves_the_model_as_it_was(model):
    """inplace=False leaves the model bit-identical, hooks that cannot be pickled included."""
    model.bn.register_forward_hook(lambda module, inputs, output: None)
    before = fingerprint(model)
    report = normswap.patch(model, "gn", inplace=False)

    assert report.model is not model
    assert fingerprint(model) == before
    assert batch_norms(model) == ["stem.1", "bn"]
    assert batch_norms(report.model) == []


def test_patching_twice_changes_nothing(model):
    """A second patch with the same target changes nothing and counts what was done before."""
    normswap.patch(model, "sn")
    before = fingerprint(model)
    report = normswap.patch(model, "sn")

    assert fingerprint(model) == before
    assert report.summary == "0 replaced, 2 already patched, 0 skipped"


def test_another_target_on_a_patched_model_is_refused(model):
    """Another kind on a patched layer is refused by name."""
    normswap.patch(model, "sn")
    reason = "already patched to sn: undo that first, or patch the original model to gn"
    message = refusal(f"stem.1 (SwitchNorm2d): {reason}", f"bn (SwitchNorm2d): {reason}")
    with pytest.raises(UnsupportedError, match=exactly(message)):
        normswap.patch(model, "gn")


@pytest.mark.parametrize("target", [*TARGETS, SwitchNorm("even", "frozen"), SwitchNorm("warm", "none")])
def test_undo_restores_everything(model, images, target):
    """undo() restores types, keys and outputs bit for bit, and leaves neither mark nor hook behind."""
    before, output = fingerprint(model), model(images)
    contents = {name: set(vars(module)) for name, module in model.named_modules()}
    types = [type(module) for module in model.modules()]
    normswap.patch(model, target).undo()

    assert fingerprint(model) == before
    assert [type(module) for module in model.modules()] == types
    assert {name: set(vars(module)) for name, module in model.named_modules()} == contents
    assert not any((m._forward_hooks, m._forward_pre_hooks, m._load_state_dict_pre_hooks) != ({}, {}, {})
                   for m in model.modules())  # fmt: skip
    assert torch.equal(model(images), output)
    assert normswap.plan(model, "gn").having("done") == []


@pytest.mark.parametrize("target", TARGETS)
def test_undo_follows_the_models_dtype(model, images, target):
    """A model that was moved since gets its BatchNorms back where it is."""
    report = normswap.patch(model, target)
    model.double()
    report.undo()

    assert {t.dtype for t in model.state_dict().values() if t.is_floating_point()} == {torch.float64}
    assert model(images.double()).dtype == torch.float64


def test_undo_after_training_is_refused(model):
    """Once a GroupNorm has been trained no BatchNorm computes what it does."""
    report = normswap.patch(model, "gn")
    with torch.no_grad():
        model.bn.weight.add_(1)
    message = (
        "expected untrained replacements, received 1 that have changed since the patch (first: bn); "
        "no BatchNorm computes what they do: reload the original model"
    )
    with pytest.raises(UnsupportedError, match=exactly(message)):
        report.undo()


def test_undo_of_a_trained_batch_renorm_keeps_what_it_learned(model, images):
    """A BatchRenorm computes a BatchNorm, so undo gives the BatchNorm with the trained values, moved ones too."""
    report = normswap.patch(model, "brn")
    model.double()
    model.train()(images.double()).square().sum().backward()
    with torch.no_grad():
        model.bn.weight.add_(1)
    output = model.eval()(images.double())
    report.undo()

    assert type(model.bn) is nn.BatchNorm2d
    torch.testing.assert_close(model(images.double()), output)


def test_all_are_replaced_or_none():
    """One layer of fifty that cannot be replaced: the model stays as it was, the layer is named."""
    model = trained_(nn.Sequential(*[nn.BatchNorm2d(12 if k == 30 else 16) for k in range(50)]))
    before = fingerprint(model)
    message = refusal(
        "30 (BatchNorm2d): expected groups to divide the 12 channels, received groups=8; use groups=4, "
        "groups='auto', or indivisible='gcd'"
    )
    with pytest.raises(UnsupportedError, match=exactly(message)):
        normswap.patch(model, GroupNorm(groups=8))

    assert fingerprint(model) == before
    assert len(batch_norms(model)) == 50


def test_a_bad_value_is_found_before_anything_is_touched():
    """A NaN statistic in the last layer leaves the first untouched too."""
    model = trained_(nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4)))
    model[1].running_var[2] = torch.nan
    message = (
        "expected weights that are finite and variances of at least 0, received 1 that are not:\n"
        "  1.running_var: 1 of 4 not finite"
    )
    with pytest.raises(InputError, match=exactly(message)):
        normswap.patch(model, "sn")

    assert batch_norms(model) == ["0", "1"]


def test_a_failure_half_way_is_taken_back(model, images, monkeypatch):
    """An error while the second layer is put in place restores the first as well."""
    before, output = fingerprint(model), model(images)
    calls = []

    def fail(module, *arguments):
        calls.append(module)
        if len(calls) == 2:
            raise MemoryError
        return register(module, *arguments)

    register = nn.Module.register_load_state_dict_pre_hook
    monkeypatch.setattr(nn.Module, "register_load_state_dict_pre_hook", fail)
    with pytest.raises(MemoryError):
        normswap.patch(model, "gn")

    assert batch_norms(model) == ["stem.1", "bn"]
    assert fingerprint(model) == before
    assert torch.equal(model(images), output)


@pytest.mark.parametrize("target", TARGETS)
def test_no_selected_batch_norm_remains(model, target):
    """What the report says was replaced is replaced, and what it skipped is there, with the reason."""
    report = normswap.patch(model, target, exclude=["stem.*"])

    assert [d.site.name for d in report.replaced] == ["bn"]
    assert [(d.site.name, d.note) for d in report.skipped] == [("stem.1", "excluded")]
    assert batch_norms(model) == ["stem.1"]


def test_nothing_else_changes(model, images):
    """Every other module, parameter and buffer is the object it was, with its values, if nothing is equalized."""
    others = {name: module for name, module in model.named_modules() if not isinstance(module, nn.BatchNorm2d)}
    tensors = {n: (t, t.clone()) for n, t in model.named_parameters() if not n.startswith(("stem.1.", "bn."))}
    model = copy.copy(model)
    normswap.patch(model, "sn", example=images, equalize=False)
    found = dict(model.named_parameters())

    assert all(model.get_submodule(name) is module for name, module in others.items() if name)
    assert all(found[name] is tensor and torch.equal(tensor, value) for name, (tensor, value) in tensors.items())
