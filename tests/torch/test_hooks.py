"""The hooks in a loop written by hand: what they do at each step, and what they leave behind."""

import copy
import io
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normswap
from normswap.errors import InputError, UnsupportedError, VerificationError
from normswap.finetune import Blend, Hooks, RenormLimits, Statistics, StopAtNaN, update_statistics
from normswap.layers.torch import BatchRenorm2d, SwitchNorm2d

from ..helpers import exactly
from .loops import HOOKS, STEPS, Noting, assert_same, batches, by_hand, network, optimizer_of, run_by_hand


class TestRenormLimits:
    def test_in_steps_of_its_own(self):
        """Without a run's length the paper's curve is in the paper's steps, and the sigmoid's in thousands."""
        layer = BatchRenorm2d(3)
        found = []
        for preset, step in (("paper", 5_000), ("paper", 25_000), ("paper", 40_000), ("sigmoid", 3_000)):
            RenormLimits(layer, None, preset).on_step(step)
            found.append([float(layer.r_max), float(layer.d_max)])

        np.testing.assert_allclose(found, [[1, 0], [1 + 2 * 20 / 35, 5], [3, 5], [2.73, 0.37]], atol=0.005)

    def test_refusals(self):
        """A run has steps, and "pretrained" has none of its own."""
        with pytest.raises(InputError, match=exactly("expected `steps` above 0, received steps=0")):
            RenormLimits(BatchRenorm2d(3), 0, "sigmoid")
        with pytest.raises(ValueError, match="received schedule_steps=None$"):
            RenormLimits(BatchRenorm2d(3), None)


class TestBlend:
    def test_starts_at_the_original_and_ends_at_the_patched_model(self, images):
        """In training λ = 1 gives what the original computes at inference, λ = 0 what the new layers do."""
        model, original = network("gn")
        patched = model(images)
        hook = Blend(model, original, 10)
        hook.on_step(0)
        first = model.train()(images)
        hook.on_step(10)
        last = model(images)

        torch.testing.assert_close(first, original(images), rtol=0, atol=0)
        assert torch.equal(last, patched)
        assert not torch.allclose(patched, original(images), atol=1e-2)

    @pytest.mark.parametrize("equalize", [True, "scale"])
    def test_starts_at_the_original_where_the_layers_in_front_have_taken_a_scale(self, equalize):
        """λ = 1 gives what the original computes though a norm is given another input than its BatchNorm was."""
        torch.manual_seed(0)
        original = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1))
        images = torch.randn(16, 3, 8, 8)
        for _ in range(20):
            original.train()(images)
        model = copy.deepcopy(original.eval())
        report = normswap.patch(model, "gn", example=images, equalize=equalize)
        assert report.replaced[0].front == "0"
        with Blend(model, original, 10) as hook:
            hook.on_step(0)
            first = model(images)

        torch.testing.assert_close(first, original(images), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(model(images), first, atol=1e-3)

    def test_layers_follow_each_other(self):
        """Each layer's λ falls linearly over half the steps; the last layer begins where the first has arrived."""
        model, original = network("gn")
        x = torch.randn(2, 8, 4, 4)
        hook = Blend(model, original, 8)
        shares = []
        for step in range(9):
            hook.on_step(step)
            row = []
            for name in ("stem.1", "bn"):
                layer, norm = model.get_submodule(name), original.get_submodule(name)
                new = F.group_norm(x, layer.num_groups, layer.weight, layer.bias, layer.eps)
                row.append(((layer(x) - new) / (norm(x) - new)).median().item())
            shares.append(row)

        np.testing.assert_allclose(
            shares, [[1, 1], [0.75, 1], [0.5, 1], [0.25, 1], [0, 1], [0, 0.75], [0, 0.5], [0, 0.25], [0, 0]], atol=1e-4
        )

    def test_evaluations_and_saved_models_are_without_it(self, images):
        """After on_evaluate the model is the patched one; the next step blends again; no key is ever added."""
        model, original = network("gn")
        patched, keys = model(images), list(model.state_dict())
        hook = Blend(model, original, 10)
        hook.on_step(3)
        blended = model(images)
        hook.on_evaluate()
        evaluated = model(images)
        hook.on_step(3)

        assert torch.equal(evaluated, patched)
        assert torch.equal(model(images), blended)
        assert not torch.equal(blended, patched)
        assert list(model.state_dict()) == keys

    def test_a_norm_that_activates(self, images):
        """The normalization is blended, and what the class of the BatchNorm did after it follows once."""

        class BatchNormReLU(nn.BatchNorm2d):
            def forward(self, x):
                return super().forward(x).relu()

        normswap.register_batch_norm(BatchNormReLU, lambda module, y: y.relu())
        torch.manual_seed(0)
        original = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormReLU(4)).eval()
        model = copy.deepcopy(original)
        normswap.patch(model, "gn")
        Blend(model, original, 10).on_step(0)

        torch.testing.assert_close(model.train()(images), original(images))

    def test_refusals(self):
        """It needs a patched model, the original's BatchNorms and a stagger below 1."""
        model, original = network("gn")
        message = "expected a patched model to blend, received one without replaced layers"
        with pytest.raises(UnsupportedError, match=exactly(message)):
            Blend(original, original, 4)
        message = (
            "expected a reference with the BatchNorms and running statistics of the model before the patch, received "
            "one without them at stem.1, bn"
        )
        for other in (model, nn.Linear(2, 2)):
            with pytest.raises(InputError, match=exactly(message)):
                Blend(model, other, 4)
        with pytest.raises(InputError, match=exactly("expected `stagger` from 0 to below 1, received stagger=1.0")):
            Blend(model, original, 4, stagger=1.0)


class TestStatistics:
    def test_before_evaluations_and_at_the_end(self):
        """The running statistics become those of the batches; an iterator serves more than once."""
        model, _ = network("sn")
        expected = copy.deepcopy(model)
        data = [x for x, _ in batches(3, 8)]
        update_statistics(expected, data)
        hook = Statistics(model, iter(data))
        for tell in (hook.on_evaluate, hook.on_end):
            model.bn.running_mean.fill_(7)
            tell()
            assert_same(model, expected)

    def test_nothing_to_do(self):
        """A model without running statistics of ours is left alone, whatever the batches are."""
        model, _ = network("gn")
        before = copy.deepcopy(model)
        Statistics(model, []).on_evaluate()

        assert_same(model, before)


def test_stops_at_nan():
    """A loss that is not finite is named with its step; a finite one is passed over."""
    StopAtNaN().on_loss(0, 1.0)
    message = "expected a finite loss, received loss=nan at step=7; lower the learning rate"
    with pytest.raises(VerificationError, match=exactly(message)):
        StopAtNaN().on_loss(7, float("nan"))


class TestHooks:
    def test_tells_each_of_a_step_once(self):
        """Told a step again it does nothing, but prepares it anew after an evaluation; all are told, in their order."""
        first, second = Noting(), Noting()
        hooks = Hooks(first, second)
        for tell in (0, 0, 1, "evaluate", 1, 1):
            hooks.on_evaluate() if tell == "evaluate" else hooks.on_step(tell)
        hooks.on_loss(1, torch.tensor(0.5))
        hooks.on_end()

        assert first.told == second.told == [0, 1, "evaluate", 1, ("loss", 1), "end"]

    def test_a_loss_nobody_wants_is_not_waited_for(self):
        """Without a hook that looks at losses, a tensor is not asked for its value."""
        Hooks(Statistics(SwitchNorm2d(3), [])).on_loss(0, None)

    def test_state(self):
        """Each gets its own state back and prepares the step anew; another number of hooks is refused."""
        noting = Noting()
        hooks = Hooks(noting, StopAtNaN())
        hooks.on_step(0)
        state = hooks.state_dict()
        hooks.load_state_dict(state)

        hooks.on_step(0)

        assert noting.told == [0, ("resumed after", 1), 0]
        message = "expected the state of 1 hooks, received that of 2; resume with the hooks of the run"
        with pytest.raises(InputError, match=exactly(message)):
            Hooks(noting).load_state_dict(state)


@pytest.mark.parametrize("name", HOOKS)
class TestEveryHook:
    def test_a_resumed_run_is_the_run(self, name):
        """Weights and optimizer of step 2, fresh hooks, and the step's number give the same weights bit for bit."""
        target, make = HOOKS[name]
        data, saved = batches(), io.BytesIO()

        def run(steps, state=None, save_after=None):
            model, original = network(target)
            hook, optimizer = make(model, original), optimizer_of(model)
            if state is not None:
                model.load_state_dict(state[0])
                optimizer.load_state_dict(state[1])
            model.train()
            for step in steps:
                hook.on_step(step)
                optimizer.zero_grad()
                F.cross_entropy(model(data[step][0]), data[step][1]).backward()
                optimizer.step()
                if step + 1 == save_after:
                    torch.save([model.state_dict(), optimizer.state_dict()], saved)
            hook.on_end()
            return model.state_dict()

        whole = run(range(STEPS), save_after=2)
        saved.seek(0)
        resumed = run(range(2, STEPS), torch.load(saved))

        assert all(torch.equal(value, resumed[key]) for key, value in whole.items())

    def test_compiles_once(self, name):
        """All steps run through one graph, and do what they do without a compiler."""
        torch.compiler.reset()
        counter = itertools.count()

        def backend(graph, inputs):
            next(counter)
            return graph.forward

        target, make = HOOKS[name]
        model, original = network(target)
        hook = make(model, original)
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        by_hand(model, [hook], loss_of=lambda x, y: F.cross_entropy(compiled(x), y))

        assert next(counter) == 1
        torch.testing.assert_close(model.state_dict(), run_by_hand(name).state_dict(), rtol=1e-3, atol=1e-4)

    def test_in_half_precision_with_accumulation(self, name):
        """Under bfloat16 autocast, two batches to a step, the run stays near the one in float32."""

        def loss_of(x, y):
            with torch.autocast("cpu", torch.bfloat16):
                return F.cross_entropy(model(x), y)

        target, make = HOOKS[name]
        model, original = network(target)
        by_hand(model, [make(model, original)], accumulate=2, loss_of=loss_of)

        expected = run_by_hand(name, accumulate=2)
        for key, value in expected.state_dict().items():
            torch.testing.assert_close(model.state_dict()[key], value, rtol=0.1, atol=0.1)

    def test_leaves_a_plain_patched_model(self, name):
        """No hook, no key and no attribute more than the patch left, so a fresh one takes the weights as they are."""
        target, _ = HOOKS[name]
        model, fresh = run_by_hand(name).eval(), network(target)[0].eval()
        fresh.load_state_dict(model.state_dict())
        x = batches(1)[0][0]

        torch.testing.assert_close(fresh(x), model(x), rtol=0, atol=0)
        for module, other in zip(model.modules(), fresh.modules(), strict=True):
            assert module.__dict__.keys() == other.__dict__.keys()
            assert len(module._forward_hooks) == len(other._forward_hooks)


@pytest.mark.parametrize("name", ["harden", "blend"])
def test_exports(name, tmp_path):
    """What a run with hooks leaves is exported and verified like any patched model."""
    model, x = run_by_hand(name).eval(), batches(1)[0][0]
    normswap.to_onnx(model, tmp_path / "model.onnx", example=x)

    assert normswap.verify(model, tmp_path / "model.onnx")
