"""Models that are graphs: traced by torch.fx or exported by torch.export, their source gone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normswap
from normswap.errors import UnsupportedError
from normswap.patchers.torch import swap as torch_swap

from ..helpers import exactly, refusal
from .models import TARGETS, Residual, batch_norms, exported, fingerprint, patched, trained_

FORMS = [(training, strict, decomposed) for training in (False, True) for strict in (False, True)
         for decomposed in (False, True)]  # fmt: skip


def names(report):
    """The replaced sites."""
    return [decision.site.name for decision in report.replaced]


class Functional(nn.Module):
    """A network that calls batch_norm on tensors of its own, under names of its own."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.gamma, self.beta = nn.Parameter(torch.linspace(0.5, 2, 4)), nn.Parameter(torch.linspace(-1, 1, 4))
        self.register_buffer("mean", torch.linspace(-0.5, 0.5, 4))
        self.register_buffer("var", torch.linspace(0.5, 3, 4))

    def forward(self, x):
        """Convolve and normalize."""
        return F.batch_norm(self.conv(x), self.mean, self.var, self.gamma, self.beta, False, 0.1, 1e-3).relu()


class Pair(nn.Module):
    """A function of an image and the tensors of one BatchNorm."""

    def __init__(self, function):
        super().__init__()
        self.norm, self.function = trained_(nn.BatchNorm2d(3)), function
        self.constant = torch.ones(3)

    def forward(self, x):
        """Apply the function."""
        return self.function(self, x, self.norm)


def normalize(x, norm, mean=None, weight=None, eps=1e-5):
    """A call of batch_norm with other tensors in place of the layer's."""
    mean = norm.running_mean if mean is None else mean
    return F.batch_norm(x, mean, norm.running_var, norm.weight if weight is None else weight, norm.bias, False, 0, eps)


class TestPrograms:
    @pytest.mark.parametrize("form", FORMS)
    def test_every_form_and_target(self, model, images, form):
        """In whatever mode and form it was exported, a patched program computes what the patched source does."""
        training, strict, decomposed = form
        program = exported(model.train(training), images, strict=strict, decomposed=decomposed)
        before = {name: value.clone() for name, value in program.state_dict.items()}
        for target in TARGETS:
            report = normswap.patch(program, target, example=images, equalize=False)
            expected = patched(model, target, images)

            assert names(report) == ["stem.1", "bn"]
            assert batch_norms(report.model) == []
            torch.testing.assert_close(report.model.eval()(images), expected(images), rtol=1e-6, atol=1e-6)
            assert set(expected.state_dict()) == set(report.model.state_dict())
        assert all(torch.equal(value, before[name]) for name, value in program.state_dict.items())

    @pytest.mark.parametrize("target", TARGETS)
    def test_it_trains_as_the_patched_source_does(self, model, images, target):
        """train() reaches the replaced layers, and a step of SGD gives the same weights."""
        ours = normswap.patch(
            exported(model, images), target, example=images, equalize=False, inplace=False
        ).model.train()
        theirs = patched(model, target, images).train()
        for each in (ours, theirs):
            optimizer = torch.optim.SGD(each.parameters(), 0.1)
            each(images).square().mean().backward()
            optimizer.step()
        state = theirs.state_dict()

        for name, value in ours.state_dict().items():
            torch.testing.assert_close(value, state[name], rtol=1e-5, atol=1e-6)

    def test_undo_leaves_a_module_of_batch_norms(self, model, images):
        """A program's module computes, after undo, what the program does to the last bit."""
        program = exported(model, images)
        report = normswap.patch(program, "gn")
        report.undo()

        assert batch_norms(report.model) == ["stem.1", "bn"]
        assert torch.equal(report.model(images), program.module()(images))

    def test_a_recipe_of_the_source_is_one_of_the_program(self, model, images):
        """Both give the sites the same names, and a replay is bit-equal."""
        report = normswap.patch(exported(model, images), normswap.GroupNorm(groups=4), example=images, equalize=False)
        recipe = normswap.plan(model, normswap.GroupNorm(groups=4), example=images, equalize=False).recipe()
        again = normswap.patch(exported(model, images), recipe).model

        assert report.recipe == recipe
        assert torch.equal(again(images), report.model(images))

    @pytest.mark.parametrize("strict", [False, True])
    def test_a_shared_batch_norm_is_one_site(self, images, strict):
        """Two calls with the same tensors become two calls of one layer."""

        class Shared(nn.Module):
            def __init__(self):
                super().__init__()
                self.bn = self.again = nn.BatchNorm2d(3)
                self.conv = nn.Conv2d(3, 3, 1)

            def forward(self, x):
                return self.again(self.conv(self.bn(x)))

        source = trained_(Shared())
        report = normswap.patch(exported(source, images, strict=strict), "gn")

        assert len(report.replaced) == 1
        torch.testing.assert_close(report.model(images), patched(source, "gn")(images))

    @pytest.mark.parametrize(("target", "folded"), [("brn", {"stem.1": "Conv", "bn": "Conv"}), ("sn", {}), ("gn", {})])
    @pytest.mark.parametrize("training", [False, True])
    def test_it_is_exported_and_proved(self, model, images, tmp_path, target, folded, training):
        """The ONNX file of a patched program is verified at several batch sizes, and what can be folded is."""
        module = normswap.patch(exported(model.train(training), images), target, example=images, equalize=False).model
        report = normswap.to_onnx(module, tmp_path / "model.onnx", example=images)

        assert report.verdict
        assert len({check.batch for check in report.verdict.checks}) > 1
        assert report.folded == folded

    def test_a_fixed_batch_stays_fixed(self, model, images, tmp_path):
        """A program for four samples gives a file for four, which is proved on four."""
        module = normswap.patch(exported(model, images, free=False), "gn").model
        report = normswap.to_onnx(module, tmp_path / "model.onnx", example=images)

        assert {check.batch for check in report.verdict.checks} == {4}


class TestGraphModules:
    @pytest.mark.parametrize("target", TARGETS)
    @pytest.mark.parametrize("training", [False, True])
    def test_undo_restores_graph_and_state(self, model, images, target, training):
        """A graph module is patched in place, and undo gives back its code, its state and its functions."""
        module = exported(model.train(training), images).module()
        code, state = module.code, fingerprint(module)
        report = normswap.patch(module, target, example=images, equalize=False)

        assert report.model is module
        assert names(report) == ["stem.1", "bn"]
        report.undo()
        assert (module.code, fingerprint(module)) == (code, state)
        with pytest.raises(NotImplementedError, match=r"^Calling eval\(\) is not supported yet.$"):
            module.eval()

    def test_a_plan_touches_nothing(self, model, images):
        """Neither a dry run through batch_norm in training mode nor a refusal leaves a trace."""
        module = exported(model.train(), images).module()
        code, state = module.code, fingerprint(module)
        found = [decision.site for decision in normswap.plan(module, "gn", example=images, equalize=False).decisions]
        reason = (
            "(BatchNorm2d): expected groups to divide the 8 channels, received groups=3; "
            "use groups=1, groups='auto', or indivisible='gcd'"
        )
        with pytest.raises(UnsupportedError, match=exactly(refusal(f"stem.1 {reason}", f"bn {reason}"))):
            normswap.patch(module, normswap.GroupNorm(groups=3), example=images, equalize=False)

        assert [(site.name, site.source, site.spatial) for site in found] == [
            ("stem.1", "BatchNorm2d", (12, 12)),
            ("bn", "BatchNorm2d", (12, 12)),
        ]
        assert (module.code, fingerprint(module)) == (code, state)

    def test_a_failure_restores_the_graph(self, model, images, monkeypatch):
        """An error half-way leaves calls of batch_norm as they were."""
        module = exported(model, images).module()
        code, state = module.code, fingerprint(module)
        apply = torch_swap.Swap.apply

        def fail(swap):
            if swap.name == "bn":
                raise RuntimeError("half-way")
            apply(swap)

        monkeypatch.setattr(torch_swap.Swap, "apply", fail)
        with pytest.raises(RuntimeError, match="^half-way$"):
            normswap.patch(module, "gn")

        assert (module.code, fingerprint(module)) == (code, state)

    def test_what_is_excluded_stays_a_call(self, model, images):
        """Only the chosen calls become modules; patching the rest later finds them."""
        expected = patched(model, "gn")
        module = exported(model, images).module()
        normswap.patch(module, "gn", exclude=["bn"])

        assert "batch_norm" in module.code
        assert names(normswap.patch(module, "gn")) == ["bn"]
        assert "batch_norm" not in module.code
        torch.testing.assert_close(module(images), expected(images))

    def test_modules_in_a_traced_graph(self, model, images):
        """A graph that torch.fx traced calls BatchNorm modules, which are replaced as in any model."""
        module = torch.fx.symbolic_trace(copy.deepcopy(model))
        normswap.patch(module, "gn")

        assert torch.equal(module(images), patched(model, "gn")(images))

    @pytest.mark.parametrize("target", TARGETS)
    def test_tensors_under_other_names(self, images, target):
        """A functional batch_norm takes its tensors along into a module named after the call, and back."""
        source, layer = Functional(), nn.BatchNorm2d(4, eps=1e-3)
        layer.load_state_dict(
            {"weight": source.gamma, "bias": source.beta, "running_mean": source.mean, "running_var": source.var},
            strict=False,
        )
        expected = patched(nn.Sequential(copy.deepcopy(source.conv), layer, nn.ReLU()), target, images)(images)
        module = torch.fx.symbolic_trace(source)
        state = fingerprint(module)
        report = normswap.patch(module, target, example=images, equalize=False)

        assert names(report) == ["batch_norm"]
        torch.testing.assert_close(module(images), expected)
        report.undo()
        assert fingerprint(module) == state
        assert torch.equal(module(images), source(images))

    def test_a_weight_that_is_another_layers(self, images):
        """Where a call has no scale, a parameter ``weight`` beside its statistics is not taken for one."""

        class Unscaled(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.randn(4, 3, 1, 1))
                self.register_buffer("running_mean", torch.linspace(-0.5, 0.5, 4))
                self.register_buffer("running_var", torch.linspace(0.5, 3, 4))

            def forward(self, x):
                return F.batch_norm(F.conv2d(x, self.weight), self.running_mean, self.running_var)

        module = exported(nn.Sequential(Unscaled()).eval(), images).module()
        before, state = module(images), fingerprint(module)
        report = normswap.patch(module, "brn", example=images, equalize=False)

        assert names(report) == ["0.batch_norm"]
        assert torch.equal(module(images), before)
        report.undo()
        assert fingerprint(module) == state

    def test_the_rank_needs_an_example(self):
        """A graph without shapes does not tell how many dimensions a call is for, unless a dry run does."""
        reason = "a BatchNorm takes any number of dimensions: give an example input to see how many there are"
        with pytest.raises(UnsupportedError, match=exactly(refusal(f"batch_norm (BatchNorm): {reason}"))):
            normswap.patch(torch.fx.symbolic_trace(Functional()), "sn")

    @pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}])
    @pytest.mark.filterwarnings("ignore:expected BatchNorms with running statistics")
    def test_what_a_batch_norm_may_lack(self, images, options):
        """Calls without scale and shift, or without running statistics, are sites like the others."""
        source = trained_(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, **options)))
        report = normswap.patch(exported(source, images), "gn", include="*")
        expected = normswap.patch(copy.deepcopy(source), "gn", include="*")

        assert [(d.site.name, d.note) for d in report.replaced] == [(d.site.name, d.note) for d in expected.replaced]
        torch.testing.assert_close(report.model(images), expected.model(images))

    def test_a_frozen_batch_norm_is_left_unless_named(self, images):
        """Four buffers are a frozen BatchNorm in a graph, too."""
        source = Pair(lambda self, x, norm: normalize(x, norm))
        for name in ("weight", "bias"):
            value = source.norm._parameters.pop(name).detach()
            source.norm.register_buffer(name, value)
        module = exported(source.eval(), images).module()
        left = normswap.plan(module, "gn").having("skip")

        assert [(d.site.name, d.note) for d in left] == [
            ("norm", "frozen: a constant scale and shift, which no batch can disturb")
        ]
        before = module(images)
        normswap.patch(module, "brn", include=["norm"])
        torch.testing.assert_close(module(images), before)

    def test_an_instance_norm_is_no_site(self, images):
        """Decomposed, an InstanceNorm is a batch_norm call on a view; it is not taken for a BatchNorm."""
        source = trained_(nn.Sequential(nn.InstanceNorm2d(3, affine=True), nn.BatchNorm2d(3)))

        assert names(normswap.patch(exported(source, images, decomposed=True), "gn")) == ["1"]


class TestObstacles:
    CASES = [  # noqa: RUF012
        (
            lambda self, x, norm: normalize(x, norm, mean=norm.running_mean + 1),
            "its running_mean is computed in the graph, by add",
        ),
        (
            lambda self, x, norm: normalize(x, norm, weight=norm.weight * 2),
            "its weight is computed in the graph, by mul",
        ),
        (lambda self, x, norm: normalize(x, norm) * norm.weight.sum(), "its weight is read by sum_1 too"),
        (lambda self, x, norm: normalize(x, norm) + norm.running_var.sum(), "its statistics are read by sum_1 too"),
        (
            lambda self, x, norm: normalize(x, norm) + normalize(x, norm, eps=1e-2),
            "batch_norm_1 takes its statistics with another scale, shift or eps",
        ),
    ]

    @pytest.mark.parametrize(("function", "reason"), CASES)
    def test_calls_that_are_no_layer(self, images, function, reason):
        """What a layer would not compute is refused by name, with the reason, and nothing is touched."""
        module = exported(Pair(function).eval(), images).module()
        code, state = module.code, fingerprint(module)
        with pytest.raises(UnsupportedError, match=exactly(refusal(f"norm (batch_norm): {reason}"))):
            normswap.patch(module, "gn")

        assert (module.code, fingerprint(module)) == (code, state)

    def test_parameters_that_are_inputs(self, model, images):
        """The graph inside a program takes its tensors as inputs: the way out is the program itself."""
        module = exported(model, images).graph_module
        way = "patch the program or its module()"
        message = refusal(
            f"batch_norm (batch_norm): its running_mean is an input of the graph, b_stem_1_running_mean: {way}",
            f"batch_norm_1 (batch_norm): its running_mean is an input of the graph, b_bn_running_mean: {way}",
        )
        with pytest.raises(UnsupportedError, match=exactly(message)):
            normswap.patch(module, "gn")

    def test_statistics_that_are_constants(self, images):
        """A tensor that is no buffer is not saved with the model, so no layer can hold it."""
        module = torch.fx.symbolic_trace(Functional())
        mean = module._buffers.pop("mean")
        module.mean = mean
        reason = "its running_mean is a constant of the graph, mean: make it a buffer"
        with pytest.raises(UnsupportedError, match=exactly(refusal(f"batch_norm (batch_norm): {reason}"))):
            normswap.patch(module, "gn")

        assert module.mean is mean

    def test_tensors_of_another_layer(self, images):
        """A call on the tensors of a BatchNorm that the graph calls as well would tie two layers."""
        source = Pair(lambda self, x, norm: norm(x) + normalize(x, norm))
        module = torch.fx.symbolic_trace(source.eval())
        reason = "its running_mean belongs to a BatchNorm2d, norm"
        with pytest.raises(UnsupportedError, match=exactly(refusal(f"batch_norm (batch_norm): {reason}"))):
            normswap.patch(module, "gn")

    def test_a_form_that_is_not_known(self):
        """An operator whose name says batch_norm is reported, never passed over."""
        graph = torch.fx.Graph()
        x = graph.placeholder("x")
        graph.output(graph.call_function(torch.ops.aten.batch_norm_stats.default, (x, 1e-5)))
        module = torch.fx.GraphModule(nn.Module(), graph)
        reason = "aten.batch_norm_stats.default is no form of batch_norm that is known"
        name = "batch_norm_stats_default"
        with pytest.raises(UnsupportedError, match=exactly(refusal(f"{name} (batch_norm): {reason}"))):
            normswap.patch(module, "gn")


def test_a_graph_within_a_model(images):
    """A traced part of a model is patched under the names it has there."""
    model = nn.ModuleDict({"backbone": exported(trained_(Residual()), images).module(), "head": nn.BatchNorm1d(5)})

    assert [d.site.name for d in normswap.plan(model, "gn").decisions] == ["backbone.stem.1", "backbone.bn", "head"]
    assert names(normswap.patch(model, "gn")) == ["backbone.stem.1", "backbone.bn", "head"]
