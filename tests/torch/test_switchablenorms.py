"""Checkpoints of switchablenorms, synthesised: read, refused, loaded into our layers, and written back."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

from normswap.convert.gates import softmax
from normswap.errors import InputError
from normswap.interop.switchablenorms import from_switchablenorms, is_switchablenorms, to_switchablenorms
from normswap.layers.torch import SwitchNorm1d, SwitchNorm2d

from ..helpers import bits

WEIGHT = {1: (1, -1), 2: (1, -1, 1, 1), 3: (1, -1, 1, 1, 1)}
RUNNING = {1: (1, -1), 2: (1, -1, 1), 3: (1, -1, 1)}


def published(dimensions=2, channels=4, moving=True, seed=0):
    """One published layer: 1d has the gates layer and batch, using_bn=False instance and layer."""
    rng = np.random.default_rng(seed)
    gates = 3 if moving and dimensions > 1 else 2
    parts = {
        "weight": rng.normal(size=channels).reshape(WEIGHT[dimensions]),
        "bias": rng.normal(size=channels).reshape(WEIGHT[dimensions]),
        "mean_weight": rng.normal(size=gates),
        "var_weight": rng.normal(size=gates),
    }
    if moving:
        parts["running_mean"] = rng.normal(size=channels).reshape(RUNNING[dimensions])
        parts["running_var"] = rng.uniform(0.1, 2, channels).reshape(RUNNING[dimensions])
    return {part: array.astype(np.float32) for part, array in parts.items()}


def network(prefix="module.", **layers):
    """A state dict of SwitchNorm layers by name beside a convolution and a BatchNorm."""
    state = {
        "conv1.weight": np.ones((4, 3, 3, 3), np.float32),
        "bn1.weight": np.ones(4, np.float32),
        "bn1.running_mean": np.zeros(4, np.float32),
        "bn1.num_batches_tracked": np.array(7),
    }
    state |= {f"{name}.{part}": array for name, parts in layers.items() for part, array in parts.items()}
    return {prefix + name: array for name, array in state.items()}


@st.composite
def published_layers(draw):
    """A published layer of any kind, with logits as far apart as training ever takes them, and its dimensions."""
    dimensions, channels = draw(st.sampled_from([1, 2, 3])), draw(st.integers(1, 6))
    layer = published(dimensions, channels, moving=dimensions == 1 or draw(st.booleans()))
    dtype = draw(st.sampled_from([np.float16, np.float32, np.float64]))
    for gate in ("mean_weight", "var_weight"):
        layer[gate] = draw(arrays(dtype, layer[gate].shape, elements=st.floats(-50, 50, width=16)))
    for part in ("weight", "bias"):
        layer[part] = draw(arrays(dtype, layer[part].shape, elements=st.floats(-1e4, 1e4, width=16)))
    return dimensions, layer


class TestSwitchablenorms:
    @pytest.mark.parametrize(("dimensions", "moving"), [(1, True), (2, True), (2, False), (3, True), (3, False)])
    def test_shapes(self, dimensions, moving):
        """Every part becomes one-dimensional under its own name, and all that is not SwitchNorm stays."""
        layer = published(dimensions, moving=moving)

        state = from_switchablenorms(network(sn=layer))

        running = {"sn.running_mean": (4,), "sn.running_var": (4,), "sn.num_batches_tracked": ()} if moving else {}
        gates = (3,) if moving else (2,)
        affine = {"sn.weight": (4,), "sn.bias": (4,), "sn.mean_weight": gates, "sn.var_weight": gates}
        assert {name: array.shape for name, array in state.items() if name.startswith("sn.")} == affine | running
        assert state["sn.weight"].tobytes() == layer["weight"].tobytes()
        assert bits(network(prefix="")) == bits({n: a for n, a in state.items() if not n.startswith("sn.")})

    @given(published_layers(), st.sampled_from(["", "module."]))
    def test_round_trip(self, kind_and_layer, prefix):
        """Writing back gives the same names, shapes and bits, whatever the layer."""
        dimensions, layer = kind_and_layer
        state = network(prefix, **{"layer1.0.sn3": layer, "sn_out": published()})

        back = to_switchablenorms(
            from_switchablenorms(state), dimensions={"layer1.0.sn3": dimensions, "sn_out": 2}, prefix=prefix
        )

        assert bits(back) == bits(state)

    def test_the_state_of_a_single_layer(self):
        """A layer's own state dict, whose names have no dots, is read and written like a network's."""
        assert bits(to_switchablenorms(from_switchablenorms(published(3)), dimensions=3)) == bits(published(3))

    @given(arrays(np.float32, 2, elements=st.floats(-50, 50, width=16)))
    def test_a_1d_layer_gets_a_closed_instance_gate(self, logits):
        """The gates layer and batch keep their shares to the last bit, and the instance gate is 0."""
        state = from_switchablenorms(published(1) | {"mean_weight": logits})

        gates = softmax(state["mean_weight"])

        assert gates[0] == 0
        assert np.array_equal(gates[1:], softmax(logits))

    def test_a_1d_layer_gives_its_instance_gate_to_the_layer_gate(self):
        """An instance gate that has opened since is not lost: on (N, C) input both gates weigh the same statistics."""
        state = from_switchablenorms(published(1)) | {"mean_weight": np.log(np.float32([0.2, 0.3, 0.5]))}

        back = to_switchablenorms(state, dimensions=1)

        np.testing.assert_allclose(softmax(back["mean_weight"]), [0.5, 0.5], rtol=1e-6)

    def test_batch_average(self):
        """Sums of mean and E[x²] over batches become the mean and variance of all values seen."""
        values = np.random.default_rng(0).normal(3, 4, (50, 100, 4))
        sums = {
            "running_mean": values.mean(1).sum(0).astype(np.float32).reshape(1, 4, 1),
            "running_var": (values**2).mean(1).sum(0).astype(np.float32).reshape(1, 4, 1),
        }

        state = from_switchablenorms(published() | sums, batches=50)

        np.testing.assert_allclose(state["running_mean"], values.mean((0, 1)), rtol=1e-5)
        np.testing.assert_allclose(state["running_var"], values.var((0, 1)), rtol=1e-4)
        assert state["running_var"].dtype == np.float32

    def test_batch_average_of_constant_channels(self):
        """Rounding never makes a variance negative."""
        sums = {"running_mean": np.full((1, 4, 1), np.float32(0.1)) * 200, "running_var": np.full((1, 4, 1), 2.0)}
        sums["running_var"] = sums["running_var"].astype(np.float32) * np.float32(1 - 1e-6)

        assert np.array_equal(from_switchablenorms(published() | sums, batches=200)["running_var"], np.zeros(4))

    def test_telling_the_kind(self):
        """Only a gamma of rank 2 or more beside gates is a switchablenorms layer."""
        state = network(sn=published())

        assert is_switchablenorms(state)
        assert not is_switchablenorms(from_switchablenorms(state))
        assert not is_switchablenorms(network())
        assert not is_switchablenorms({})


WHOLE = (
    "expected every SwitchNorm layer as switchablenorms saves it, received 1 of 1 that are not; "
    "use a whole checkpoint:\n  sn: "
)


class TestSwitchablenormsRefusals:
    @pytest.mark.parametrize(
        ("layer", "message"),
        [
            (
                {p: a for p, a in published().items() if p not in ("bias", "var_weight")},
                "bias is missing, var_weight is missing",
            ),
            (
                {p: a for p, a in published().items() if p != "weight"},
                "weight is missing instead of (1, C), (1, C, 1, 1) or (1, C, 1, 1, 1)",
            ),
            (
                published() | {"weight": np.ones(4)},
                "weight is of shape (4,) instead of (1, C), (1, C, 1, 1) or (1, C, 1, 1, 1)",
            ),
            (published() | {"bias": np.ones((1, 5, 1, 1))}, "bias is of shape (1, 5, 1, 1) instead of (1, 4, 1, 1)"),
            (
                published() | {"running_mean": np.ones((1, 5, 1))},
                "running_mean is of shape (1, 5, 1) instead of (1, 4, 1)",
            ),
            (
                published() | {"mean_weight": np.ones(4), "var_weight": np.ones(4)},
                "mean_weight is of shape (4,) instead of (3,), var_weight is of shape (4,) instead of (3,)",
            ),
            (published() | {"var_weight": np.ones(2)}, "var_weight is of shape (2,) instead of (3,)"),
            (published(1) | {"mean_weight": np.ones(3)}, "mean_weight is of shape (3,) instead of (2,)"),
            (
                published(moving=False) | {"mean_weight": np.ones(3), "var_weight": np.ones(3)},
                "running_mean is missing, running_var is missing",
            ),
            (
                published() | {"mean_weight": np.ones(2), "var_weight": np.ones(2)},
                "running_mean is unexpected, running_var is unexpected",
            ),
            (published() | {"num_batches_tracked": np.array(3)}, "num_batches_tracked is unexpected"),
            (published() | {"bias": np.full((1, 4, 1, 1), np.nan)}, "bias has 4 values that are not finite"),
            (published() | {"running_var": np.full((1, 4, 1), -1.0)}, "running_var has 4 values below 0"),
            (
                published() | {"bias": np.ones((1, 4, 1, 1), np.int64)},
                "bias is of dtype int64 instead of a floating-point one",
            ),
        ],
    )
    def test_a_layer_that_does_not_fit(self, layer, message):
        """Each part that is missing, too much or of another form is named with what was expected."""
        with pytest.raises(InputError, match=f"^{re.escape(WHOLE + message)}$"):
            from_switchablenorms(network(sn=layer))

    def test_ten_layers_are_listed(self):
        """A checkpoint with many broken layers is refused in one message of bearable length."""
        broken = {f"sn{i}": {"mean_weight": np.ones(3)} for i in range(12)}
        missing = "weight is missing instead of (1, C), (1, C, 1, 1) or (1, C, 1, 1, 1)"
        message = WHOLE.replace("1 of 1", "12 of 13").removesuffix("  sn: ") + "\n".join(
            [f"  sn{i}: {missing}" for i in range(10)] + ["  and 2 more"]
        )
        with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
            from_switchablenorms(network(**broken, whole=published()))

    @pytest.mark.parametrize(
        ("convert", "message"),
        [
            (
                lambda: from_switchablenorms(network()),
                "expected a SwitchNorm layer, received 4 names of which none ends in mean_weight",
            ),
            (
                lambda: from_switchablenorms(published(), batches=0),
                "expected `batches` of at least 1, received batches=0",
            ),
            (
                lambda: from_switchablenorms(
                    published() | {"running_mean": np.full((1, 4, 1), 9.0), "running_var": np.full((1, 4, 1), 9.0)},
                    batches=2,
                ),
                WHOLE.replace("sn", "(root)") + "running_var has 4 values below 0",
            ),
            (
                lambda: to_switchablenorms(from_switchablenorms(published()), dimensions=4),
                WHOLE.replace("sn", "(root)").replace("as switchablenorms saves it", "in normswap's shapes")
                + "`dimensions` is 4 instead of 1, 2 or 3",
            ),
            (
                lambda: to_switchablenorms(from_switchablenorms(network(sn=published())), dimensions={"ns": 2}),
                WHOLE.replace("as switchablenorms saves it", "in normswap's shapes")
                + "`dimensions` is None instead of 1, 2 or 3",
            ),
            (
                lambda: to_switchablenorms(published(moving=False)),
                WHOLE.replace("sn", "(root)").replace("as switchablenorms saves it", "in normswap's shapes")
                + "weight is of shape (1, 4, 1, 1) instead of (4,), bias is of shape (1, 4, 1, 1) instead of (4,)",
            ),
        ],
    )
    def test_wrong_calls(self, convert, message):
        """A wrong argument is named with its value."""
        with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
            convert()


class Block(nn.Module):
    """A residual block under the names of the published ResNet."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.sn1 = SwitchNorm2d(4)
        self.sn2 = SwitchNorm2d(4, batch_statistics="none")

    def forward(self, x):
        """Return a map of the shape of ``x``, (N, 4, H, W)."""
        return x + self.sn2(torch.relu(self.sn1(self.conv1(x))))


def published_state(block):
    """A state dict for ``block`` as the published code saves it from DataParallel."""
    state = {}
    for name, tensor in block.state_dict().items():
        if name.endswith(("num_batches_tracked", "temperature")):
            continue
        values = torch.rand_like(tensor) + 0.1
        if name.endswith((".weight", ".bias")) and "sn" in name:
            values = values.reshape(1, -1, 1, 1)
        elif "running" in name:
            values = values.reshape(1, -1, 1)
        state[f"module.{name}"] = values.numpy()
    return state


def test_a_published_state_dict_loads_and_maps_back():
    """Names fit a module tree of our layers strictly, the network computes, and the same bits are written back."""
    saved = published_state(Block())
    block = Block().eval()

    block.load_state_dict({name: torch.as_tensor(a) for name, a in from_switchablenorms(saved).items()}, strict=True)
    back = to_switchablenorms({name: t.numpy() for name, t in block.state_dict().items()}, prefix="module.")

    assert block(torch.randn(2, 4, 5, 5)).isfinite().all()
    assert bits(back) == bits(saved)


@pytest.mark.parametrize("temperature", [0.25, 0.0])
def test_a_temperature_goes_into_the_logits(temperature):
    """Their layers have none, so what is written for them has the gates of the moment."""
    block = Block()
    for norm in (block.sn1, block.sn2):
        norm.mean_weight.data.uniform_(-1, 1)
        norm.var_weight.data.uniform_(-1, 1)
        norm.temperature = temperature
    theirs = to_switchablenorms({name: tensor.numpy() for name, tensor in block.state_dict().items()})

    assert not any(name.endswith("temperature") for name in theirs)
    for name, norm in (("sn1", block.sn1), ("sn2", block.sn2)):
        for part, gates in zip(("mean_weight", "var_weight"), norm.gates(), strict=True):
            torch.testing.assert_close(torch.from_numpy(theirs[f"{name}.{part}"]).softmax(0), gates)


def test_a_published_1d_layer_computes_its_formula():
    """The two gates [layer, batch] weigh those statistics of (N, C) input, in that order."""
    rng = np.random.default_rng(0)
    gates = {"mean_weight": np.log([0.2, 0.8]), "var_weight": np.log([0.7, 0.3])}
    affine = {"weight": rng.normal(size=(1, 6)), "bias": rng.normal(size=(1, 6))}
    running = {"running_mean": rng.normal(size=(1, 6)), "running_var": rng.uniform(1, 2, (1, 6))}
    x = rng.normal(size=(3, 6))
    mean = 0.2 * x.mean(1, keepdims=True) + 0.8 * running["running_mean"]
    var = 0.7 * x.var(1, keepdims=True) + 0.3 * running["running_var"]

    layer = SwitchNorm1d(6, dtype=torch.float64).eval()
    state = from_switchablenorms(affine | gates | running)
    layer.load_state_dict({name: torch.as_tensor(a) for name, a in state.items()}, strict=True)

    expected = (x - mean) / np.sqrt(var + 1e-5) * affine["weight"] + affine["bias"]
    np.testing.assert_allclose(layer(torch.as_tensor(x)).detach(), expected, rtol=1e-12)
