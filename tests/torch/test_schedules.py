"""Batch Renormalization's limits along a schedule: in the layer, and from a training loop."""

import io

import numpy as np
import pytest
import torch
from torch import nn

from normswap.finetune import RenormLimits, update_statistics
from normswap.finetune.hooks.schedules import renorm_limits
from normswap.layers.torch import BatchRenorm1d, BatchRenorm2d

from ..helpers import exactly

SCHEDULES = [
    {"schedule": "paper"},
    {"schedule": "paper", "schedule_steps": 10},
    {"schedule": "pretrained", "schedule_steps": 10},
    {"schedule": "sigmoid", "t_delta": 0.5},
]


def limits_of(layer, steps):
    """Return the limits in force in the training calls of these numbers, one row per call."""
    found = []
    for step in steps:
        layer.step.fill_(step)
        layer.train()(torch.randn(8, layer.num_features))
        assert layer.step == step + 1
        found.append((float(layer.r_max), float(layer.d_max)))
    return np.array(found)


def batches(count, shape=(4, 3, 5, 5)):
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(shape, generator=generator) * (1 + k) + k for k in range(count)]


class TestCurves:
    def test_the_papers_steps(self):
        """Plain BatchNorm for 5,000 steps, then r_max to 3 at 40,000 and d_max to 5 at 25,000, linearly."""
        found = limits_of(BatchRenorm1d(2, schedule="paper"), [0, 5000, 15000, 22500, 25000, 40000, 130000])

        np.testing.assert_allclose(found[:, 0], [1, 1, 1 + 2 * 10 / 35, 2, 1 + 2 * 20 / 35, 3, 3], rtol=1e-6)
        np.testing.assert_allclose(found[:, 1], [0, 0, 2.5, 5 * 17.5 / 20, 5, 5, 5], rtol=1e-6)

    def test_the_papers_shares_of_a_run(self):
        """With the number of steps given, its 4, 31 and 19 % of them."""
        found = limits_of(BatchRenorm1d(2, schedule="paper", schedule_steps=100), [0, 4, 10, 19, 25, 31, 101])

        np.testing.assert_allclose(
            found[:, 0], [1, 1, 1 + 2 * 6 / 27, 1 + 2 * 15 / 27, 1 + 2 * 21 / 27, 3, 3], rtol=1e-5
        )
        np.testing.assert_allclose(found[:, 1], [0, 0, 5 * 6 / 15, 5, 5, 5, 5], rtol=1e-5, atol=1e-6)

    def test_pretrained(self):
        """From nothing to 1.25 and 0.5 over the whole run, or to the limits given."""
        found = limits_of(BatchRenorm1d(2, schedule="pretrained", schedule_steps=4), range(6))
        given = BatchRenorm1d(2, schedule="pretrained", schedule_steps=1, r_max=2.0, d_max=0.0)

        np.testing.assert_allclose(found[:, 0], [1, 1.0625, 1.125, 1.1875, 1.25, 1.25])
        np.testing.assert_allclose(found[:, 1], [0, 0.125, 0.25, 0.375, 0.5, 0.5])
        np.testing.assert_allclose(limits_of(given, range(2)), [[1, 0], [2, 0]])

    def test_sigmoid(self):
        """Logistic growth in t = t_delta · step, at the values tabulated for t_delta = 0.001."""
        found = limits_of(BatchRenorm1d(2, schedule="sigmoid"), [0, 1000, 3000, 5000, 10000])
        unshifted = limits_of(BatchRenorm1d(2, schedule="sigmoid", d_max=0.0), range(2))

        np.testing.assert_allclose(found[:, 0], [1, 1.73, 2.73, 2.96, 3.00], atol=0.005)
        np.testing.assert_allclose(found[:, 1], [0.001, 0.007, 0.37, 4.08, 5.00], atol=0.005)
        assert unshifted[:, 1].tolist() == [0, 0]

    @pytest.mark.parametrize("preset", ["paper", "pretrained", "sigmoid"])
    def test_a_training_loop_has_the_same(self, preset):
        """A loop's preset over a run is the layer's schedule over as many steps."""
        layer = BatchRenorm1d(2, schedule=preset, schedule_steps=100, t_delta=0.1)
        other = BatchRenorm1d(2)
        hook = RenormLimits(other, 100, preset)
        for step, expected in zip(range(0, 100, 7), limits_of(layer, range(0, 100, 7)), strict=True):
            hook.on_step(step)
            np.testing.assert_allclose([float(other.r_max), float(other.d_max)], expected, rtol=1e-5, atol=1e-6)

    def test_where_a_sigmoid_run_ends(self):
        """At its end the limits are 3 and 5 to within 0.01 %."""
        np.testing.assert_allclose(renorm_limits("sigmoid", 1.0), (3, 5), rtol=1e-4)


@pytest.mark.parametrize("options", SCHEDULES)
class TestLife:
    def test_a_resumed_run_is_the_run(self, options):
        """Saved after some steps and loaded, a layer goes on bit for bit as if it had not stopped."""
        data, whole = batches(6), BatchRenorm2d(3, **options)
        expected = [whole(x) for x in data]
        first, second = BatchRenorm2d(3, **options), BatchRenorm2d(3, **options)
        for x in data[:4]:
            first(x)
        buffer = io.BytesIO()
        torch.save(first.state_dict(), buffer)
        buffer.seek(0)
        second.load_state_dict(torch.load(buffer))

        assert all(torch.equal(second(x), y) for x, y in zip(data[4:], expected[4:], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(second.buffers(), whole.buffers(), strict=True))
        assert second.step == 6

    def test_compiles_once(self, options):
        """Compiled it is one graph for all steps, which computes what the layer does eagerly."""
        graphs = []

        def count(graph, inputs):
            graphs.append(graph)
            return graph.forward

        torch.compiler.reset()
        layer, plain = BatchRenorm2d(3, **options), BatchRenorm2d(3, **options)
        compiled = torch.compile(layer, fullgraph=True, backend=count)
        for x in batches(6):
            torch.testing.assert_close(compiled(x), plain(x), atol=1e-5, rtol=1e-5)

        assert len(graphs) == 1
        assert layer.step == 6
        torch.testing.assert_close((layer.r_max, layer.d_max), (plain.r_max, plain.d_max))

    def test_inference_neither_counts_nor_corrects(self, options):
        """At inference it is the BatchNorm it is without a schedule, and the schedule stands still."""
        layer, plain = BatchRenorm2d(3, **options), BatchRenorm2d(3)
        for x in batches(3):
            layer(x)
        plain.load_state_dict(layer.state_dict(), strict=False)
        before = {name: buffer.clone() for name, buffer in layer.named_buffers()}

        assert torch.equal(layer.eval()(x), plain.eval()(x))
        assert all(torch.equal(buffer, before[name]) for name, buffer in layer.named_buffers())

    def test_re_estimating_statistics_does_not_count(self, options):
        """Batches that only re-estimate the running statistics are no steps of the run."""
        model = nn.Sequential(BatchRenorm2d(3, **options))
        for x in batches(3):
            model(x)
        before = {n: b.clone() for n, b in model[0].named_buffers() if not n.startswith("running")}
        update_statistics(model, batches(4))

        assert all(torch.equal(getattr(model[0], name), value) for name, value in before.items())

    def test_limits_set_by_hand(self, options):
        """Beside a schedule they are refused, and a loop's preset passes the layer over."""
        layer = BatchRenorm2d(3, **options)
        message = (
            "BatchRenorm2d: expected schedule=None for limits set from outside, received "
            f"schedule={options['schedule']!r}; drop the one or the other"
        )
        with pytest.raises(ValueError, match=exactly(message)):
            layer.set_limits(2.0, 1.0)

        assert RenormLimits(nn.Sequential(layer, BatchRenorm2d(3)), 10).layers[0] is not layer


def test_shown():
    """print() tells the schedule and the limits it has come to; a layer without one has none, nor a step."""
    layer = BatchRenorm2d(3, schedule="pretrained", schedule_steps=2)
    layer(torch.randn(4, 3, 2, 2))
    layer(torch.randn(4, 3, 2, 2))

    assert repr(layer) == (
        "BatchRenorm2d(3, eps=1e-05, momentum=0.01, affine=True, r_max=1.125, d_max=0.25, schedule='pretrained', "
        "schedule_steps=2, t_delta=0.001)"
    )
    assert repr(BatchRenorm2d(3)) == "BatchRenorm2d(3, eps=1e-05, momentum=0.01, affine=True, r_max=3, d_max=5)"
    assert "step" not in BatchRenorm2d(3).state_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"schedule": "linear"},
            "expected `schedule` to be None or out of paper, pretrained, sigmoid, received schedule='linear'",
        ),
        (
            {"schedule": "pretrained"},
            "expected `schedule_steps`, the number of training calls in the run, with schedule='pretrained', "
            "received schedule_steps=None",
        ),
        (
            {"schedule": "paper", "schedule_steps": 0},
            "expected `schedule_steps`, the number of training calls in the run, with schedule='paper', "
            "received schedule_steps=0",
        ),
        ({"schedule": "sigmoid", "t_delta": 0}, "expected `t_delta` above 0, received t_delta=0"),
        ({"schedule": "paper", "r_max": 0.5}, "expected `r_max` of at least 1, received r_max=0.5"),
    ],
)
def test_wrong_arguments(options, message):
    """A schedule that cannot run is refused when the layer is made."""
    with pytest.raises(ValueError, match=exactly(message)):
        BatchRenorm2d(3, **options)
