"""compat="switchablenorms": what that system computes, from its documented semantics in float64 NumPy."""

import copy
import re

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import nn

from normswap.convert.gates import softmax
from normswap.interop.switchablenorms import from_switchablenorms, to_switchablenorms
from normswap.layers import torch as layers

from ..helpers import bits

MOMENTUM = {1: 0.997, 2: 0.9, 3: 0.997}
SHAPES = {1: (6, 5), 2: (4, 5, 3, 6), 3: (3, 5, 2, 3, 4)}
SHARES = ["mean_weight", "var_weight"]


class Published:
    """A published layer by its state dict, which training moves; without running statistics, using_bn=False."""

    def __init__(self, dimensions, state, momentum=None):
        self.state = {name: np.asarray(array, np.float64) for name, array in state.items()}
        self.momentum = MOMENTUM[dimensions] if momentum is None else momentum

    def __call__(self, x, training):
        """Return the output for a float64 array."""
        means, variances = self.statistics(x)
        if "running_mean" in self.state:
            for name, own in (("running_mean", means), ("running_var", variances)):
                stored = self.state[name]
                if training:
                    stored[...] = self.momentum * stored + (1 - self.momentum) * own[-1].reshape(stored.shape)
                else:
                    own[-1] = stored.reshape(own[-1].shape)
        else:
            means, variances = means[:-1], variances[:-1]
        shares = [softmax(self.state[name]) for name in SHARES]
        mean, variance = (
            sum(w * s for w, s in zip(*pair, strict=True)) for pair in zip(shares, (means, variances), strict=True)
        )
        return self.state["weight"] * (x - mean) / np.sqrt(variance + 1e-5) + self.state["bias"]

    @staticmethod
    def statistics(x):
        """Means and variances in the order [instance,] layer, batch."""
        if x.ndim == 2:  # of layer and batch, unbiased
            return [x.mean(a, keepdims=True) for a in (1, 0)], [x.var(a, ddof=1, keepdims=True) for a in (1, 0)]
        spatial = tuple(range(2, x.ndim))
        mean, variance = x.mean(spatial, keepdims=True), x.var(spatial, ddof=1, keepdims=True)
        means, variances, power = [mean], [variance], variance + mean**2
        for axis in (1, 0):
            means.append(mean.mean(axis, keepdims=True))
            variances.append(power.mean(axis, keepdims=True) - means[-1] ** 2)
        return means, variances


def published_state(dimensions, channels, seed=0, using_bn=True):
    """One layer's state in their names and shapes, with values of a trained one."""
    rng = np.random.default_rng(seed)
    affine = (1, channels) if dimensions == 1 else (1, channels, *[1] * dimensions)
    state = {
        "weight": rng.uniform(0.5, 1.5, affine),
        "bias": rng.normal(size=affine),
        **{name: rng.normal(size=3 if using_bn and dimensions > 1 else 2) for name in SHARES},
    }
    if using_bn:
        state |= {"running_mean": rng.normal(size=affine[:3]), "running_var": rng.uniform(0.5, 2, affine[:3])}
    return {name: array.astype(np.float32) for name, array in state.items()}


def layer_of(dimensions):
    return getattr(layers, f"SwitchNorm{dimensions}d")


def tensors(state):
    return {name: torch.as_tensor(array) for name, array in state.items()}


def batches(shape, count=5):
    rng = np.random.default_rng(9)
    return [rng.normal(0.5 * k, 1 + k, shape) for k in range(count)]


def close(found, expected):
    np.testing.assert_allclose(torch.as_tensor(found).detach().numpy(), expected, rtol=1e-6, atol=2e-6)


class TestLayer:
    @pytest.mark.parametrize("momentum", [None, 0.25])
    @pytest.mark.parametrize("dimensions", [1, 2, 3])
    def test_training_from_scratch(self, dimensions, momentum):
        """From their initial values on, each step's output, the statistics left, and inference are theirs."""
        shape, channels = SHAPES[dimensions], 5
        initial = published_state(dimensions, channels)
        values = {"weight": 1, "bias": 0, "mean_weight": 1, "var_weight": 1, "running_mean": 0, "running_var": 0}
        theirs = Published(dimensions, {n: np.full_like(a, values[n]) for n, a in initial.items()}, momentum)
        given = {} if momentum is None else {"momentum": momentum}
        ours = layer_of(dimensions)(channels, compat="switchablenorms", **given)

        for x in batches(shape):
            close(ours.train()(torch.from_numpy(x).float()), theirs(x.astype(np.float32).astype(np.float64), True))
        close(ours.running_mean, theirs.state["running_mean"].ravel())
        close(ours.running_var, theirs.state["running_var"].ravel())
        close(ours.eval()(torch.from_numpy(x).float()), theirs(x.astype(np.float32).astype(np.float64), False))
        assert ours.num_batches_tracked == 5

    @pytest.mark.parametrize(("dimensions", "using_bn"), [(1, True), (2, True), (2, False), (3, True), (3, False)])
    def test_a_trained_state(self, dimensions, using_bn):
        """A state of theirs gives their output, in training and at inference, compiled too."""
        shape, channels = SHAPES[dimensions], 5
        state = published_state(dimensions, channels, using_bn=using_bn)
        theirs = Published(dimensions, state)
        statistics = "moving" if using_bn else "none"
        ours = layer_of(dimensions)(channels, compat="switchablenorms", batch_statistics=statistics)
        ours.load_state_dict(tensors(from_switchablenorms(state)))
        torch.compiler.reset()
        compiled = torch.compile(copy.deepcopy(ours), fullgraph=True, backend="aot_eager")

        (x,) = batches(shape, 1)
        x = x.astype(np.float32).astype(np.float64)
        for training in (True, False):
            expected = theirs(x, training)
            for layer in (ours, compiled):
                close(layer.train(training)(torch.from_numpy(x).float()), expected)

    @pytest.mark.parametrize("dimensions", [1, 2, 3])
    def test_gradients(self, dimensions):
        """Gradients are those of the function, the unbiased variances included."""
        ours = layer_of(dimensions)(5, compat="switchablenorms", dtype=torch.float64)
        x = torch.from_numpy(batches(SHAPES[dimensions], 1)[0]).requires_grad_()
        names = [name for name, _ in ours.named_parameters()]

        def function(x, *values):
            return torch.func.functional_call(
                copy.deepcopy(ours), dict(zip(names, values, strict=True)), (x,), tie_weights=False
            )

        assert torch.autograd.gradcheck(function, (x, *ours.parameters()))

    def test_a_1d_layers_instance_gate_stays_closed(self):
        """For (N, C) input theirs has the gates layer and batch alone, and training opens no third."""
        ours = layers.SwitchNorm1d(5, compat="switchablenorms")
        optimizer = torch.optim.SGD(ours.parameters(), lr=0.5)
        for x in batches((6, 5)):
            ours(torch.from_numpy(x).float()).square().mean().backward()
            optimizer.step()

        assert [gate[0].item() for gate in ours.gates()] == [0, 0]
        assert [gate.sum().item() for gate in layers.SwitchNorm1d(5, compat="switchablenorms").gates()] == [1, 1]

    def test_shown(self):
        """print() tells the mode and its momentum; without one it tells nothing."""
        assert repr(layers.SwitchNorm3d(5, compat="switchablenorms")) == (
            "SwitchNorm3d(5, eps=1e-05, momentum=0.997, affine=True, batch_statistics='moving', "
            "compat='switchablenorms')"
        )
        assert repr(layers.SwitchNorm3d(5)) == (
            "SwitchNorm3d(5, eps=1e-05, momentum=0.1, affine=True, batch_statistics='moving')"
        )

    @pytest.mark.parametrize(
        ("dimensions", "shape", "what"),
        [
            (2, (4, 5, 1, 1), "values per sample and channel"),
            (3, (4, 5, 1, 1, 1), "values per sample and channel"),
            (1, (4, 1), "channels"),
            (1, (1, 5), "samples in training"),
        ],
    )
    def test_a_single_value_is_refused(self, dimensions, shape, what):
        """Where theirs divides by 0 and gives NaN, the shape and the way out are told."""
        ours = layer_of(dimensions)(shape[1], compat="switchablenorms")
        message = (
            f"SwitchNorm{dimensions}d: expected two or more {what} with compat='switchablenorms', which divides by "
            f"their number - 1, received shape={shape}; use compat=None"
        )
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            ours(torch.zeros(shape))
        if what.endswith("training"):
            assert torch.isfinite(ours.eval()(torch.zeros(shape))).all()

    def test_an_unknown_system(self):
        """The modes there are are told."""
        message = "expected `compat` to be None or 'switchablenorms', received compat='taki0112'"
        with pytest.raises(ValueError, match=f"^{message}$"):
            layers.SwitchNorm2d(5, compat="taki0112")


def checkpoint():
    """A network's state dict as their trainer saves it: under a wrapper, in their shapes, gates by using_bn."""
    rng = np.random.default_rng(4)
    state = {
        "conv1.weight": rng.normal(size=(4, 3, 3, 3)) / 3,
        "conv2.weight": rng.normal(size=(6, 4, 3, 3)) / 4,
        "fc.weight": rng.normal(size=(5, 6)),
        "fc.bias": rng.normal(size=5),
    }
    for name, norm in {
        "sn1": published_state(2, 4, 1),
        "sn2": published_state(2, 6, 2, using_bn=False),
        "sn3": published_state(1, 5, 3),
    }.items():
        state |= {f"{name}.{part}": array for part, array in norm.items()}
    return {f"module.{name}": array.astype(np.float32) for name, array in state.items()}


class Network(nn.Module):
    """The checkpoint's architecture with our layers."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(4, 6, 3, bias=False)
        self.fc = nn.Linear(6, 5)
        self.sn1 = layers.SwitchNorm2d(4, compat="switchablenorms")
        self.sn2 = layers.SwitchNorm2d(6, compat="switchablenorms", batch_statistics="none")
        self.sn3 = layers.SwitchNorm1d(5, compat="switchablenorms")

    def forward(self, x):
        """Return scores for (N, 3, H, W) images."""
        x = self.sn1(self.conv1(x)).relu()
        return self.sn3(self.fc(self.sn2(self.conv2(x)).relu().mean((2, 3))))


def by_semantics(state, x, training):
    """The network by the documented semantics in float64; returns the scores and the layers."""
    state = {name.removeprefix("module."): np.asarray(array, np.float64) for name, array in state.items()}
    norms = {
        name: Published(dimensions, {n.removeprefix(f"{name}."): a for n, a in state.items() if n.startswith(name)})
        for name, dimensions in (("sn1", 2), ("sn2", 2), ("sn3", 1))
    }

    def convolve(x, kernel):
        windows = sliding_window_view(x, kernel.shape[2:], axis=(2, 3))
        return np.einsum("nchwij,ocij->nohw", windows, kernel)

    x = np.maximum(norms["sn1"](convolve(x, state["conv1.weight"]), training), 0)
    x = np.maximum(norms["sn2"](convolve(x, state["conv2.weight"]), training), 0)
    return norms["sn3"](x.mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"], training), norms


class TestCheckpoint:
    @pytest.mark.parametrize("training", [False, True])
    def test_computes_what_it_was_trained_for(self, training):
        """A checkpoint of theirs in our layers gives their scores and leaves their statistics."""
        state = checkpoint()
        network = Network().train(training)
        network.load_state_dict(tensors(from_switchablenorms(state)))
        x = np.random.default_rng(5).normal(size=(4, 3, 8, 8)).astype(np.float32)
        expected, norms = by_semantics(state, x.astype(np.float64), training)

        close(network(torch.from_numpy(x)), expected)
        for name in ("sn1", "sn3"):
            close(getattr(network, name).running_mean, norms[name].state["running_mean"].ravel())
            close(getattr(network, name).running_var, norms[name].state["running_var"].ravel())

    def test_a_training_step(self):
        """The gradients a step is taken along are those of their function, parameter by parameter."""
        state = checkpoint()
        network = Network().double().train()
        network.load_state_dict(tensors(from_switchablenorms(state)))
        rng = np.random.default_rng(6)
        x, weights = rng.normal(size=(4, 3, 8, 8)), rng.normal(size=(4, 5))
        (network(torch.from_numpy(x)) * torch.from_numpy(weights)).sum().backward()

        for name, parameter in network.named_parameters():
            value = state[f"module.{name}"].astype(np.float64)
            direction, step = rng.normal(size=value.shape), 1e-6
            ahead, back = (
                (by_semantics(state | {f"module.{name}": value + sign * step * direction}, x, True)[0] * weights).sum()
                for sign in (1, -1)
            )
            gradient = parameter.grad.numpy()
            if name in ("sn3.mean_weight", "sn3.var_weight"):  # ours has a closed instance gate besides
                assert abs(gradient[0]) < 1e-40
                gradient = gradient[1:]
            found = (gradient.reshape(value.shape) * direction).sum()
            np.testing.assert_allclose(found, (ahead - back) / (2 * step), rtol=1e-6, atol=1e-6, err_msg=name)

    def test_round_trip(self):
        """Loaded into our layers and written back, it is the file it was, to the last bit."""
        state = checkpoint()
        network = Network()
        network.load_state_dict(tensors(from_switchablenorms(state)))

        back = to_switchablenorms(
            {name: tensor.numpy() for name, tensor in network.state_dict().items()},
            dimensions={"sn1": 2, "sn2": 2, "sn3": 1},
            prefix="module.",
        )

        assert bits(back) == bits(state)
