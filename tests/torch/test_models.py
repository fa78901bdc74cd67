"""The ResNets of `normswap.models`, and checkpoints of switchablenorms, made up under their published names."""

import copy
import json
import math
from collections import Counter
from functools import partial

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from torch import nn

import normswap
from normswap.cli import main
from normswap.data.preprocessing import preprocessing_of
from normswap.layers.torch import SwitchNorm2d
from normswap.models import torch as models

from ..helpers import exactly

STAGES = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}


def switch_norm(name, channels, using_bn=True):
    """Return the shapes of a published layer's state."""
    gates = 3 if using_bn else 2
    shapes = {
        "weight": (1, channels, 1, 1),
        "bias": (1, channels, 1, 1),
        "mean_weight": (gates,),
        "var_weight": (gates,),
    }
    if using_bn:
        shapes |= {"running_mean": (1, channels, 1), "running_var": (1, channels, 1)}
    return {f"{name}.{part}": shape for part, shape in shapes.items()}


def resnet_shapes(depth, version, classes=1000, using_bn=True):
    """Return the shape of every tensor in a published ResNet's checkpoint by its name there."""

    def norm(name, channels):
        return switch_norm(name, channels, using_bn)

    shapes = {"conv1.weight": (64, 3, 7, 7), **norm("sn1", 64)}
    channels = 64
    for stage, count in enumerate(STAGES[depth]):
        width = 64 * 2**stage
        for block in range(count):
            name = f"layer{stage + 1}.{block}"
            if depth >= 50:
                convolutions = [(channels, width, 1), (width, width, 3), (width, 4 * width, 1)]
            else:
                convolutions = [(channels, width, 3), (width, width, 3)]
            for index, (before, after, size) in enumerate(convolutions, 1):
                shapes[f"{name}.conv{index}.weight"] = (after, before, size, size)
                shapes |= norm(f"{name}.sn{index}", after if version == 1 else before)
            after = convolutions[-1][1]
            if block == 0 and (stage or after != channels):
                if version == 1:
                    shapes |= {f"{name}.downsample.0.weight": (after, channels, 1, 1)}
                    shapes |= norm(f"{name}.downsample.1", after)
                else:
                    shapes |= {f"{name}.downsample.weight": (after, channels, 1, 1)}
            channels = after
    if version == 2:
        shapes |= norm("sn_out", channels)
    return shapes | {"fc.weight": (classes, channels), "fc.bias": (classes,)}


def made_up(shapes, seed=0):
    """Return a state of these shapes with values that keep a deep network's maps at their size."""
    random = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        part, value = name.rpartition(".")[2], torch.randn(shape, generator=random)
        if part == "running_var" or (part == "weight" and shape[0] == 1):
            value = 0.5 + torch.rand(shape, generator=random)
        elif len(shape) in (2, 4) and part == "weight":
            value *= math.sqrt(2 / math.prod(shape[1:]))
        elif part in ("bias", "running_mean"):
            value /= 4
        state[name] = value
    return state


def trainer(state):
    """What the published trainer saves of a network on several devices."""
    return {"epoch": 100, "model": "resnetv1sn50", "state_dict": {f"module.{n}": t for n, t in state.items()}}


def scores(state, x, version):
    """Return what the published network computes at inference, by the formulas and the names alone, in float64."""
    state = {name: tensor.double() for name, tensor in state.items()}

    def normalize(x, name):
        mean, var = x.mean((2, 3), keepdim=True), x.var((2, 3), keepdim=True)  # unbiased
        layer = mean.mean(1, keepdim=True)
        means, variances = [mean, layer], [var, (var + mean**2).mean(1, keepdim=True) - layer**2]
        if f"{name}.running_mean" in state:
            means.append(state[f"{name}.running_mean"][..., None])
            variances.append(state[f"{name}.running_var"][..., None])
        w, v = (state[f"{name}.{gate}"].softmax(0) for gate in ("mean_weight", "var_weight"))
        mean, var = (sum(g * s for g, s in zip(*pair, strict=True)) for pair in ((w, means), (v, variances)))
        return (x - mean) / (var + 1e-5).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]

    def convolve(x, name, stride=1):
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[2] // 2)

    x = F.max_pool2d(F.relu(normalize(convolve(x.double(), "conv1", 2), "sn1")), 3, 2, 1)
    blocks = sorted({tuple(name.split(".")[:2]) for name in state if name.startswith("layer")})
    for stage, block in sorted(blocks, key=lambda names: (names[0], int(names[1]))):
        name, y, shortcut = f"{stage}.{block}", x, x
        halves = 2 if stage != "layer1" and block == "0" else 1
        count = 3 if f"{name}.conv3.weight" in state else 2
        strided = 2 if count == 3 else 1
        for index in range(1, count + 1):
            stride = halves if index == strided else 1
            if version == 1:
                y = normalize(convolve(y, f"{name}.conv{index}", stride), f"{name}.sn{index}")
                y = F.relu(y) if index < count else y
            else:
                y = F.relu(normalize(y, f"{name}.sn{index}"))
                shortcut = y if index == 1 and f"{name}.downsample.weight" in state else shortcut
                y = convolve(y, f"{name}.conv{index}", stride)
        if f"{name}.downsample.0.weight" in state:
            shortcut = normalize(convolve(x, f"{name}.downsample.0", halves), f"{name}.downsample.1")
        elif f"{name}.downsample.weight" in state:
            shortcut = convolve(shortcut, f"{name}.downsample", halves)
        x = F.relu(y + shortcut) if version == 1 else y + shortcut
    x = F.relu(normalize(x, "sn_out")) if version == 2 else x
    return F.linear(x.mean((2, 3)), state["fc.weight"], state["fc.bias"])


def close(found, expected):
    """Whether scores agree to 1e-5 of their size."""
    expected = np.asarray(expected)
    np.testing.assert_allclose(np.asarray(found), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def pictures(count=2, size=64):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


class TestCheckpoints:
    @pytest.mark.parametrize("version", [1, 2])
    @pytest.mark.parametrize("depth", [18, 34, 50])
    def test_names_and_shapes(self, depth, version):
        """A network with SwitchNorms has a checkpoint's names, and nothing else but our counters and temperatures."""
        with torch.device("meta"):
            model = (models.resnet_v1 if version == 1 else models.resnet_v2)(depth, "sn")
        own = {name: tensor.numel() for name, tensor in model.state_dict().items()}
        published = {name: math.prod(shape) for name, shape in resnet_shapes(depth, version).items()}

        assert {n: c for n, c in own.items() if not n.endswith(("num_batches_tracked", "temperature"))} == published

    @pytest.mark.parametrize("using_bn", [True, False])
    @pytest.mark.parametrize("version", [1, 2])
    def test_a_checkpoint_computes_what_was_published(self, tmp_path, version, using_bn):
        """Into a network with the layers, or one that is patched to them, it loads and gives the published scores."""
        state = made_up(resnet_shapes(18, version, classes=10, using_bn=using_bn))
        torch.save(trainer(state), tmp_path / "sn.pth")
        build = models.resnet_v1 if version == 1 else models.resnet_v2
        statistics = "moving" if using_bn else "none"
        own = build(18, lambda c: SwitchNorm2d(c, batch_statistics=statistics), classes=10)
        patched = normswap.patch(build(18, classes=10), normswap.SwitchNorm(batch_statistics=statistics)).model

        for model in (own, patched):
            loaded = normswap.load_weights(model, tmp_path / "sn.pth")

            assert (loaded.system, loaded.norms) == ("switchablenorms", 20 if version == 1 else 18)
            with torch.no_grad():
                close(model.eval()(pictures()), scores(state, pictures(), version))

    @pytest.mark.slow
    def test_a_resnet50_on_the_command_line(self, tmp_path, monkeypatch):
        """A whole checkpoint becomes a proven file, each norm of it in a form of SwitchNorm."""
        import onnxruntime

        monkeypatch.chdir(tmp_path)
        state = made_up(resnet_shapes(50, 1))
        torch.save(trainer(state), "ResNet50v1+SN(8,32)-77.49.pth")
        source = ("normswap.models.torch:resnet50_v1", "--input-shape", "3,64,64")

        def run(*arguments):
            result = CliRunner().invoke(main, [*arguments, "--json"])
            assert result.exit_code == 0, result.stderr
            return json.loads(result.stdout)

        told = run("patch", *source, "--to", "sn", "--weights", "ResNet50v1+SN(8,32)-77.49.pth", "-o", "sn")
        assert told["weights"] == "switchablenorms weights for 53 norms and 54 other layers"
        told = run("export", "sn", "-o", "sn.onnx", "--no-latency")

        assert told["folded"] == {}
        assert list(told["kept"].values()) == ["its statistics are taken from each sample (moments)"] * 53
        nodes = onnx.load("sn.onnx").graph.node
        of_norms = [[node for node in nodes if node.name.startswith(f"{name}/")] for name in told["kept"]]
        rest = Counter(node.op_type for node in nodes if not any(node in own for own in of_norms))
        assert max(len(own) for own in of_norms) <= 28
        assert (rest["Conv"], rest["Relu"]) == (53, 49)
        session = onnxruntime.InferenceSession("sn.onnx")
        (found,) = session.run(None, {session.get_inputs()[0].name: pictures().numpy()})
        close(found, scores(state, pictures(), 1))


NORMS = ["bn", "sn", "brn", "gn", "ln", "in", partial(SwitchNorm2d, compat="switchablenorms")]


class TestNetworks:
    @pytest.mark.parametrize("norm", NORMS)
    @pytest.mark.parametrize("build", [models.resnet_v1, models.resnet_v2])
    def test_any_norm_and_any_size(self, build, norm):
        """Whatever the norms are, maps of any size give scores, and every weight learns."""
        model = build(18, norm, classes=5)

        for size in (64, 97):
            assert model.eval()(pictures(size=size)).shape == (2, 5)
        model.train()(pictures()).square().sum().backward()

        assert [name for name, p in model.named_parameters() if not p.grad.isfinite().all()] == []
        assert model.layer4[1].conv2.weight.grad.abs().sum() > 0

    def test_groups(self):
        """Groups are those of the paper, or as many of them as divide the channels."""
        groups = {name: models.wide_resnet(10, 1, name).features[1].num_groups for name in ("gn", "ln", "in")}

        assert groups == {"gn": 16, "ln": 1, "in": 16}
        assert models.resnet_v1(18, "gn").sn1.num_groups == 32

    @pytest.mark.parametrize("norm", NORMS)
    @pytest.mark.parametrize("depth", [18, 50])
    def test_blocks_that_start_as_their_shortcuts(self, depth, norm):
        """With last_gamma a block gives what its shortcut gives, and its last norm learns to give more."""
        model = models.resnet_v1(depth, norm, last_gamma=True, small_images=True)
        x, block = torch.rand(2, 64, 8, 8), model.layer1[0]

        shortcut = x if block.downsample is None else copy.deepcopy(block.downsample)(x)

        y = block(x)

        torch.testing.assert_close(y, F.relu(shortcut))
        (y * torch.randn(y.shape)).sum().backward()
        assert (block.sn2 if depth == 18 else block.sn3).weight.grad.abs().sum() > 0

    def test_last_gamma_is_asked_for(self):
        """Without it every gamma starts at 1."""
        assert models.resnet_v1(18).layer1[0].sn2.weight.tolist() == [1] * 64

    def test_last_gamma_of_a_norm_without_one(self):
        """A norm that has no gamma cannot start at 0, and says so."""
        message = "expected norms with a weight for last_gamma=True, received BatchNorm2d without"
        with pytest.raises(ValueError, match=exactly(message)):
            models.resnet_v1(18, lambda c: nn.BatchNorm2d(c, affine=False), last_gamma=True)

    def test_dropout(self):
        """Half of the features before the last layer are dropped in training, unless another share is asked for."""
        assert models.resnet_v1(18).dropout.p == models.resnet_v2(18).dropout.p == 0.5
        model = models.resnet_v1(18, "gn", dropout=0.0)
        torch.testing.assert_close(model.train()(pictures()), model.eval()(pictures()))

    def test_small_images(self):
        """Images of 32 pixels keep maps of 4 pixels behind the last stage, where a norm has something to measure."""
        seen = []
        for small in (False, True):
            model = models.resnet_v1(18, small_images=small).eval()
            model.layer4.register_forward_hook(lambda *call: seen.append(tuple(call[2].shape[2:])))
            model(pictures(size=32))

        assert seen == [(1, 1), (4, 4)]
        assert preprocessing_of(model).shape == (3, 32, 32)

    @pytest.mark.parametrize("norm", NORMS)
    def test_wide_resnet(self, norm):
        """WRN-16-4 has 12 norms, and learns."""
        model = models.wide_resnet(norm=norm)

        assert model(pictures(size=32)).shape == (2, 10)
        assert sum(p.numel() for p in models.wide_resnet().parameters()) == 2_748_378
        layers = [module for module in model.modules() if "Norm" in type(module).__name__ or "Renorm" in repr(module)]
        assert len([layer for layer in layers if not list(layer.children())]) == 12

    @pytest.mark.parametrize(
        ("build", "message"),
        [
            (lambda: models.resnet_v1(20), "expected `depth` out of 18, 34, 50, 101, 152, received depth=20"),
            (lambda: models.resnet_v2("50"), "expected `depth` out of 18, 34, 50, 101, 152, received depth='50'"),
            (lambda: models.wide_resnet(17), "expected `depth` as 6 n + 4, 10 or more, received depth=17"),
            (lambda: models.wide_resnet(4), "expected `depth` as 6 n + 4, 10 or more, received depth=4"),
            (
                lambda: models.resnet_v1(18, "syncsn"),
                "expected `norm` out of bn, sn, brn, gn, ln, in, or a function that returns a layer for a number of "
                "channels, received norm='syncsn'",
            ),
            (
                lambda: models.wide_resnet(norm=None),
                "expected `norm` out of bn, sn, brn, gn, ln, in, or a function that returns a layer for a number of "
                "channels, received norm=None",
            ),
        ],
    )
    def test_what_there_is_not(self, build, message):
        """A depth or a norm that there is not is told with those that there are."""
        with pytest.raises(ValueError, match=exactly(message)):
            build()

    @pytest.mark.parametrize("name", models.__all__)
    def test_each_name_is_a_model_of_the_command_line(self, name):
        """What is called without arguments has BatchNorms to replace, and tells how images become its input."""
        with torch.device("meta"):
            model = normswap.load_model(f"normswap.models.torch:{name}")

        assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
        assert preprocessing_of(model).shape in ((3, 224, 224), (3, 32, 32))
