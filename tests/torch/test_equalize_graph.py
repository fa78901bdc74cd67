"""Layers in front of norms that are calls of a traced graph: equalized as modules are, or left with the reason."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normswap
from normswap.errors import UnsupportedError
from normswap.finetune.hooks.blend import Blend

from .models import exported, fingerprint, trained_


class Functional(nn.Module):
    """A network of functions on the tensors of its layers, which `torch.fx` sees as calls."""

    def __init__(self, calls=F.conv2d):
        super().__init__()
        self.conv, self.norm, self.calls = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), calls

    def forward(self, x):
        n = self.norm
        y = self.calls(x, self.conv.weight, self.conv.bias)
        return F.batch_norm(y, n.running_mean, n.running_var, n.weight, n.bias).relu()


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def conv(**options):
    return nn.Conv2d(8, 8, 3, **options)


LAYERS = {
    "conv1d": (nn.Conv1d(3, 8, 3, stride=2), nn.BatchNorm1d(8), (4, 3, 20)),
    "conv2d": (nn.Conv2d(3, 8, 3, bias=False, padding=1, dilation=2), nn.BatchNorm2d(8), (4, 3, 9, 9)),
    "same": (nn.Conv2d(3, 8, 3, padding="same", bias=False), nn.BatchNorm2d(8), (4, 3, 9, 9)),
    "conv3d": (nn.Conv3d(3, 8, 2), nn.BatchNorm3d(8), (4, 3, 4, 5, 6)),
    "grouped": (conv(groups=2, stride=(2, 1)), nn.BatchNorm2d(8), (4, 8, 9, 9)),
    "depthwise": (conv(groups=8, bias=False), nn.BatchNorm2d(8), (4, 8, 9, 9)),
    "transposed": (
        nn.ConvTranspose2d(4, 8, 3, stride=2, groups=2, padding=1, output_padding=1, bias=False),
        nn.BatchNorm2d(8),
        (4, 4, 5, 5),
    ),
    "linear": (nn.Linear(6, 8), nn.BatchNorm1d(8), (16, 6)),
    "unbiased": (nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), (16, 6)),
}
FORMS = [(strict, decomposed) for strict in (False, True) for decomposed in (False, True)]


def fronts(model, example, **options):
    return [d.front or d.site.unequal for d in normswap.plan(model, "gn", example=example, **options).decisions]


class TestPrograms:
    @pytest.mark.parametrize("layer", LAYERS)
    @pytest.mark.parametrize("form", FORMS)
    def test_layers_of_every_kind(self, layer, form):
        """A program computes what the equalized source computes, under its names, and stays what it is itself."""
        front, norm, shape = copy.deepcopy(LAYERS[layer])
        source, x = trained_(nn.Sequential(front, norm)), noise(*shape)
        program = exported(copy.deepcopy(source), x, strict=form[0], decomposed=form[1])
        before, y = fingerprint(program.module()), program.module()(x)
        expected = normswap.patch(source, "gn", example=x)
        report = normswap.patch(program, "gn", example=x)
        again = normswap.patch(program, report.recipe)

        assert [d.front for d in report.replaced] == [d.front for d in expected.replaced] == ["0"]
        torch.testing.assert_close(report.model(x), expected.model(x), rtol=1e-5, atol=1e-5)
        assert torch.equal(again.model(x), report.model(x))
        assert report.model.state_dict().keys() == expected.model.state_dict().keys()
        assert fingerprint(program.module()) == before
        report.undo()
        assert torch.equal(report.model(x), y)
        assert report.model.state_dict().keys() - program.state_dict.keys() == set()

    def test_what_is_not_equalized_stays_a_call(self):
        """So do all convolutions where nothing is, and those that nothing normalizes."""
        source = trained_(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)))
        x = noise(4, 3, 9, 9)
        program = exported(source, x)

        assert normswap.patch(program, "gn", example=x, equalize=False).model.code.count("conv2d.default") == 2
        assert normswap.patch(program, "gn", example=x).model.code.count("conv2d.default") == 1

    def test_a_scale_adds_no_parameter(self):
        """The state dict has the program's names, but for the statistics."""
        source, x = trained_(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))), noise(4, 3, 9, 9)
        expected = normswap.patch(copy.deepcopy(source), "gn", example=x, equalize="scale").model
        model = normswap.patch(exported(source, x), "gn", example=x, equalize="scale").model

        assert sorted(model.state_dict()) == ["0.weight", "1.bias", "1.weight"]
        torch.testing.assert_close(model(x), expected(x), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("target", ["gn", "sn"])
    def test_bundles(self, target, tmp_path):
        """A bundle of an equalized program loads into the program, also once it went back to BatchNorm."""
        source, x = trained_(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))), noise(4, 3, 9, 9)
        program = exported(source, x)
        report = normswap.patch(program, target, example=x)
        normswap.save(report, tmp_path / "there")
        model = normswap.load(tmp_path / "there", model=program)
        assert torch.equal(model(x), report.model.eval()(x))

        back = normswap.patch(model, "bn", data=[noise(32, 3, 9, 9)])
        normswap.save(back, tmp_path / "back")
        assert torch.equal(normswap.load(tmp_path / "back", model=program)(x), back.model(x))

    def test_the_file_is_right(self, tmp_path):
        """An equalized program exports and verifies."""
        source = trained_(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()))
        x = noise(4, 3, 9, 9)
        model = normswap.patch(exported(source, x), "gn", example=x).model

        assert normswap.to_onnx(model, tmp_path / "m.onnx", example=x).verdict

    def test_tied_weights_stay_tied(self):
        """A weight that two layers have is not given to one of them alone."""
        source, x = nn.Sequential(conv(padding=1), nn.BatchNorm2d(8), conv(padding=1)), noise(4, 8, 9, 9)
        source[2].weight = source[0].weight
        program = exported(trained_(source), x)
        report = normswap.patch(program, "gn", example=x)
        expected = normswap.patch(copy.deepcopy(source), "gn", example=x)

        assert [d.front for d in report.replaced] == [d.front for d in expected.replaced] == [""]
        torch.testing.assert_close(report.model(x), expected.model(x), rtol=1e-5, atol=1e-5)


class TestGraphModules:
    @pytest.fixture
    def source(self):
        return trained_(Functional())

    @pytest.fixture
    def graph(self, source):
        return torch.fx.symbolic_trace(copy.deepcopy(source))

    X = noise(4, 3, 9, 9)

    def test_calls_of_functions(self, source, graph):
        """`F.conv2d` on a layer's tensors is equalized as the layer is, in place, and undone bit for bit."""
        code, state, weight = graph.code, fingerprint(graph), graph.conv.weight
        report = normswap.patch(graph, "gn", example=self.X)
        expected = nn.Sequential(source.conv, source.norm, nn.ReLU())
        expected = normswap.patch(copy.deepcopy(expected), "gn", example=self.X).model

        assert [d.front for d in report.replaced] == ["conv"]
        assert graph.conv.weight is weight
        assert sorted(graph.state_dict()) == ["conv.bias", "conv.weight", "norm.bias", "norm.weight"]
        torch.testing.assert_close(graph(self.X), expected(self.X), rtol=1e-5, atol=1e-5)
        report.undo()
        assert (graph.code, fingerprint(graph)) == (code, state)
        assert torch.equal(graph(self.X), source(self.X))
        assert type(graph.conv) is nn.Module

    def test_a_plan_touches_nothing(self, graph):
        """Lifted and tried in the dry run, the calls are calls again behind it."""
        code, state = graph.code, fingerprint(graph)

        assert fronts(graph, self.X) == ["conv"]
        assert (graph.code, fingerprint(graph)) == (code, state)

    def test_its_life(self, source, graph):
        """Copied, trained, given a BatchNorm network's weights: all as a model of modules."""
        other = trained_(Functional(), seed=7)
        expected = normswap.patch(torch.fx.symbolic_trace(copy.deepcopy(other)), "sn", example=self.X).model
        report = normswap.patch(graph, "sn", example=self.X)
        again, y = report.original(), graph(self.X)
        assert torch.equal(again(self.X), source(self.X))
        model = copy.deepcopy(graph)
        assert torch.equal(model(self.X), y)

        model.load_state_dict(other.state_dict())
        torch.testing.assert_close(model(self.X), expected(self.X), rtol=1e-4, atol=1e-5)
        before = graph.conv.weight.clone()
        optimizer = torch.optim.SGD(graph.parameters(), 0.1)
        graph.train()(self.X).square().mean().backward()
        optimizer.step()
        assert not torch.equal(graph.conv.weight, before)
        with pytest.raises(UnsupportedError, match="expected untrained replacements"):
            report.undo()

    def test_calibration(self, graph):
        """It sees the calls of the original as the layers they are, and is undone with the patch."""
        state = fingerprint(graph)
        report = normswap.patch(graph, "gn", example=self.X)
        residuals = normswap.calibrate(report, [noise(64, 3, 9, 9)])

        assert residuals[0].name == "norm"
        assert residuals[0].after < residuals[0].before / 2
        report.undo()
        assert fingerprint(graph) == state

    def test_blending(self, source, graph):
        """With all of the share, what is blended in is what the original computes of the equalized input."""
        reference = copy.deepcopy(graph)
        normswap.patch(graph, "gn", example=self.X)
        with Blend(graph, reference, steps=4) as blend:
            blend.on_step(0)
            torch.testing.assert_close(graph(self.X), source(self.X), rtol=1e-4, atol=1e-4)


def scaled_by_two(x, weight, bias):
    return F.conv2d(x, weight * 2, bias)


def twice(x, weight, bias):
    return F.conv2d(F.conv2d(x, weight, bias)[:, :3], weight, bias)


def penalized(x, weight, bias):
    return F.conv2d(x * weight.sum(), weight, bias)


def sized(x, weight, bias):
    return F.conv2d(x, weight, bias, padding=x.ndim - 3)


class TestLeft:
    X = noise(4, 3, 9, 9)

    @pytest.mark.parametrize(
        ("calls", "reason"),
        [
            (scaled_by_two, "conv2d: its weight is computed in the graph, by mul"),
            (twice, "conv2d_1: its weight is read by conv2d too"),
            (penalized, "conv2d: its weight is read by sum_1 too"),
            (sized, "conv2d: its padding is computed in the graph"),
        ],
    )
    def test_calls_that_are_no_layer(self, calls, reason):
        """Each stays as it is, with the reason in the plan, and the norm is carried over."""
        graph = torch.fx.symbolic_trace(trained_(Functional(calls)))
        before = graph.conv.weight.clone()

        assert fronts(graph, self.X) == [reason]
        report = normswap.patch(graph, "gn", example=self.X)
        assert torch.equal(graph.conv.weight, before)
        report.undo()

    @pytest.mark.parametrize(
        ("call", "reason"),
        [
            (lambda m, x: F.conv2d(x, m.kernel), "its weight is called kernel: call it LAYER.weight"),
            (lambda m, x: F.conv2d(x, m.own.weight, m.shift), "its bias is called shift: call it own.bias"),
            (
                lambda m, x: F.conv2d(x, m.constant),
                "its weight is a buffer of the graph, constant: make it a parameter",
            ),
            (lambda m, x: F.conv2d(x * m.own.bias.sum(), m.own.weight), "it does without own.bias"),
            (lambda m, x: F.conv2d(m.own(x)[:, :3], m.own.weight), "its weight belongs to a Conv2d, own"),
            (
                lambda m, x: F.conv2d(x, x[:1, :, :3, :3].expand(8, -1, -1, -1)),
                "its weight is computed in the graph, by expand",
            ),
        ],
    )
    def test_tensors_that_are_no_layers(self, call, reason):
        """What is not a parameter of a layer's name stays as it is, with the reason."""

        class Bare(nn.Module):
            def __init__(self):
                super().__init__()
                self.norm, self.own = nn.BatchNorm2d(8), nn.Conv2d(3, 8, 3)
                self.kernel, self.shift = nn.Parameter(noise(8, 3, 3, 3)), nn.Parameter(noise(8))
                self.register_buffer("constant", noise(8, 3, 3, 3))

            def forward(self, x):
                return self.norm(call(self, x))

        graph = torch.fx.symbolic_trace(trained_(Bare()))
        assert fronts(graph, self.X) == [f"conv2d: {reason}"]

    def test_a_weight_that_is_an_input(self):
        """A graph that is given its weights says so."""

        class Given(nn.Module):
            def __init__(self):
                super().__init__()
                self.norm = nn.BatchNorm2d(8)

            def forward(self, x, w):
                return self.norm(F.conv2d(x, w))

        graph = torch.fx.symbolic_trace(trained_(Given()))
        assert fronts(graph, (self.X, noise(8, 3, 3, 3))) == [
            "conv2d: its weight is an input of the graph, w: patch the program or its module()"
        ]
