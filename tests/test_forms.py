"""Every form a norm is written in computes the norm's formula."""

from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from normswap.export.forms import LONG_SUM, LONG_SUM_ALIKE, PRODUCT, WEB_SUM, choose, write_norm
from normswap.export.norms import BATCH, LAYER, Norm

INSTANCE = (1.0, 0.0, 0.0)
MIX = ((0.2, 0.3, 0.5), (0.5, 0.1, 0.4))
GATES = {
    "batch": (BATCH, BATCH),
    "layer": (LAYER, LAYER),
    "instance": (INSTANCE, INSTANCE),
    "mixed": MIX,
    "no batch": ((0.4, 0.6, 0.0), (0.7, 0.3, 0.0)),
    "mean of the batch alone": (BATCH, LAYER),
    "variance of the batch alone": (INSTANCE, BATCH),
}
SHAPES = {"(N, C)": (), "(N, C, L)": (9,), "(N, C, H, W)": (5, 7), "large": (24, 24), "1x1": (1, 1), "5-D": (2, 3, 4)}


def norm_of(gates, spatial, *, channels=6, groups=1, mean=0.3, spread=1.0, unbiased=False):
    """Return a norm with running statistics around ``mean``."""
    rng = np.random.default_rng(0)
    return Norm(
        name="stem.bn",
        spatial=spatial,
        gamma=rng.uniform(0.5, 1.5, channels),
        beta=rng.normal(size=channels),
        eps=1e-3,
        gates=gates,
        mean=np.float32(mean + spread * rng.normal(size=channels)).astype(float),
        var=spread**2 * rng.uniform(0.5, 1.5, channels),
        groups=groups,
        seen=0.0,
        unbiased=unbiased,
    )


def formula(norm, x):
    """Return what the norm computes, by NumPy in float64."""
    x = x.astype(np.float64)
    channels, ones = x.shape[1], [1] * (x.ndim - 2)
    flat = x.reshape(len(x), channels, -1)
    grouped = x.reshape(len(x), norm.groups, -1)
    layer = [
        np.repeat(moment(grouped, axis=2), channels // norm.groups, axis=1).reshape(len(x), channels, *ones)
        for moment in (np.mean, np.var)
    ]
    instance = (
        layer
        if x.ndim == 2
        else [moment(flat, axis=2).reshape(len(x), channels, *ones) for moment in (np.mean, np.var)]
    )
    batch = [part.reshape(1, channels, *ones) for part in (norm.mean, norm.var)]
    mean, var = (
        sum(gate * part for gate, part in zip(gates, statistics, strict=True))
        for gates, *statistics in zip(norm.gates, instance, layer, batch, strict=True)
    )
    gamma, beta = (part.reshape(1, channels, *ones) for part in (norm.gamma, norm.beta))
    return (x - mean) / np.sqrt(var + norm.eps) * gamma + beta


def published(norm, x):
    """Return what a norm of switchablenorms computes: its statistics as its source takes them, in float64."""
    x = torch.from_numpy(x).double()
    maps = x.flatten(2) if x.ndim > 2 else x[:, :, None]
    if x.ndim > 2:
        mean_in, var_in = maps.mean(2, keepdim=True), maps.var(2, keepdim=True)
        mean_ln = mean_in.mean(1, keepdim=True)
        var_ln = (var_in + mean_in**2).mean(1, keepdim=True) - mean_ln**2
    else:
        mean_ln, var_ln = maps.mean(1, keepdim=True), maps.var(1, keepdim=True)
        mean_in, var_in = mean_ln, var_ln
    column = [torch.from_numpy(part)[None, :, None] for part in (norm.mean, norm.var, norm.gamma, norm.beta)]
    mean_bn, var_bn, gamma, beta = column
    (m_in, m_ln, m_bn), (v_in, v_ln, v_bn) = norm.gates
    mean = m_in * mean_in + m_ln * mean_ln + m_bn * mean_bn
    var = v_in * var_in + v_ln * var_ln + v_bn * var_bn
    return (gamma * (maps - mean) / (var + norm.eps).sqrt() + beta).reshape(x.shape).numpy()


def written(norm, shape, *, runtime="portable", opset=20):
    """Return a model of one norm for inputs (N, *shape), and the form it took."""
    x = ir.val("x", dtype=ir.DataType.FLOAT, shape=ir.Shape(["N", *shape]))
    mark = ir.node("Norm", [x], domain="mark")
    y = mark.outputs[0]
    y.name, y.dtype, y.shape = "y", ir.DataType.FLOAT, ir.Shape(["N", *shape])
    graph = ir.Graph([x], [y], nodes=[mark], opset_imports={"": opset}, name="one")
    model = ir.Model(graph, ir_version=8)
    form = write_norm(model, mark, norm, runtime=runtime)
    return ir.to_proto(model), form


def run(proto, x):
    """Return what onnxruntime computes, after the full checker."""
    onnx.checker.check_model(proto, full_check=True)
    return onnxruntime.InferenceSession(proto.SerializeToString()).run(None, {"x": x})[0]


@pytest.mark.parametrize("opset", [17, 18, 24])
@pytest.mark.parametrize("runtime", ["portable", "ort", "web"])
@pytest.mark.parametrize("spatial", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("gates", GATES.values(), ids=GATES)
def test_every_mix_is_the_formula(gates, spatial, runtime, opset):
    """Every mix of statistics at every rank equals the formula, in batches of 1, 2 and 7."""
    norm = norm_of(gates, spatial)
    if spatial in ((), (1, 1)):  # a map of one value: the instance's statistics are the layer's, or its variance is 0
        norm = replace(
            norm, gates=(gates[0], gates[1] if not spatial else (0.0, gates[1][0] + gates[1][1], gates[1][2]))
        )
    proto, _ = written(norm, (6, *spatial), runtime=runtime, opset=opset)

    for batch in (1, 2, 7):
        x = np.random.default_rng(batch).normal(0.5, 2, (batch, 6, *spatial)).astype(np.float32)
        expected = formula(norm, x)
        np.testing.assert_allclose(run(proto, x), expected, atol=3e-6 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize(("opset", "runtime"), [(17, "portable"), (20, "ort")])
@pytest.mark.parametrize("mean", [0.3, 30.0])
@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("spatial", [(), (9,), (5, 7), (24, 24), (2, 3, 4)])
@pytest.mark.parametrize("gates", GATES.values(), ids=GATES)
def test_unbiased_norms_are_those_of_switchablenorms(gates, spatial, free, mean, runtime, opset):
    """Variances of a map by one value less, the layer's mixed from them, whatever the form and the sizes left open."""
    norm = norm_of(gates, (None,) * len(spatial) if free else spatial, mean=mean, unbiased=True)
    proto, _ = written(norm, (6, *(f"size_{axis}" if free else size for axis, size in enumerate(spatial))),
                       runtime=runtime, opset=opset)  # fmt: skip
    x = np.random.default_rng(1).normal(mean, 2, (3, 6, *spatial)).astype(np.float32)
    expected = published(norm, x)

    atol = 3e-6 * np.abs(expected).max() + 4 * np.spacing(np.float32(mean))
    np.testing.assert_allclose(run(proto, x), expected, atol=atol, rtol=0)


@pytest.mark.parametrize("runtime", ["portable", "ort", "web"])
@pytest.mark.parametrize(("groups", "spatial"), [(2, ()), (2, (5,)), (3, (24, 24)), (6, (5,)), (6, (24, 24))])
@pytest.mark.parametrize("gates", [GATES["layer"], MIX], ids=["layer", "mixed"])
def test_groups_have_statistics_of_their_own(gates, spatial, groups, runtime):
    """Groups of channels have statistics of their own, a group of one channel included."""
    norm = norm_of(gates, spatial, groups=groups)
    proto, _ = written(norm, (6, *spatial), runtime=runtime)
    x = np.random.default_rng(1).normal(size=(3, 6, *spatial)).astype(np.float32)

    np.testing.assert_allclose(run(proto, x), formula(norm, x), atol=1e-5)


@pytest.mark.parametrize("gates", [GATES["layer"], MIX], ids=["layer", "mixed"])
def test_free_sizes_take_any(gates):
    """Height and width may be open; the file then takes any."""
    norm = norm_of(gates, (None, None))
    proto, _ = written(norm, (6, "height", "width"))

    for size in ((5, 7), (30, 31)):
        x = np.random.default_rng(1).normal(size=(2, 6, *size)).astype(np.float32)
        np.testing.assert_allclose(run(proto, x), formula(norm, x), atol=1e-5)


@pytest.mark.parametrize("runtime", ["portable", "ort"])
@pytest.mark.parametrize("gates", [MIX, GATES["instance"], GATES["no batch"]], ids=["mixed", "instance", "no batch"])
@pytest.mark.parametrize("spatial", [(8, 8), (32, 32)], ids=["squared", "product"])
def test_a_mean_far_above_the_deviation_keeps_its_digits(spatial, gates, runtime):
    """At mean/std = 1e4 the running mean is taken off first; the single pass would be off by all its digits."""
    norm = norm_of(gates, spatial, mean=1e4)
    proto, form = written(norm, (6, *spatial), runtime=runtime)
    x = np.random.default_rng(1).normal(1e4, 1, (2, 6, *spatial)).astype(np.float32)
    expected = formula(norm, x)
    unaware = replace(norm, mean=np.zeros(6))
    careless, careless_form = written(unaware, (6, *spatial), runtime=runtime)
    alone = gates == GATES["instance"]

    assert (form, careless_form) == ("shifted", "instance" if alone else "moments")
    assert np.abs(run(proto, x) - expected).max() < 1e-6 * np.abs(expected).max()
    assert not np.abs(run(careless, x) - formula(unaware, x)).max() < (1e-5 if alone else 0.1)


@pytest.mark.parametrize("gates", [LAYER, MIX[0]], ids=["layer", "mixed"])
def test_without_a_running_mean_the_maps_own_is_taken_off(gates):
    """Without a running mean each map's own is taken off where the example shows that it must be."""
    norm = replace(norm_of(((*gates[:2], 0.0),) * 2, (32, 32)), mean=None, var=None, seen=100.0)
    proto, form = written(norm, (6, 32, 32))
    x = np.random.default_rng(1).normal(10, 1, (2, 6, 32, 32)).astype(np.float32)
    expected = formula(replace(norm, mean=np.zeros(6), var=np.zeros(6)), x)

    assert form == "centred"
    assert choose(replace(norm, seen=None)) == ("instance" if gates == LAYER else "centred")
    assert np.abs(run(proto, x) - expected).max() < 2e-6 * np.abs(expected).max()


@pytest.mark.parametrize("gates", [INSTANCE, LAYER], ids=["instance", "layer"])
@pytest.mark.parametrize("value", [0.0, 7.0])
def test_a_constant_image_has_no_negative_variance(gates, value):
    """A constant image has no variance; rounding does not make it negative."""
    norm = replace(norm_of((gates, gates), (24, 24), channels=240), mean=np.zeros(240))
    proto, form = written(norm, (240, 24, 24))
    y = run(proto, np.full((2, 240, 24, 24), value, np.float32))

    assert form == ("instance" if gates == INSTANCE else "moments")
    np.testing.assert_allclose(y, np.broadcast_to(norm.beta.reshape(1, -1, 1, 1), y.shape), atol=1e-3)


def test_a_map_of_low_contrast_keeps_its_digits():
    """A channel's own statistics keep their digits on maps the running statistics tell nothing of."""
    norm = replace(norm_of(GATES["instance"], (32, 32)), mean=np.zeros(6), var=np.ones(6))
    proto, form = written(norm, (6, 32, 32))
    x = np.random.default_rng(1).normal(0.5, 0.005, (4, 6, 32, 32)).astype(np.float32)
    expected = formula(norm, x)

    assert (form, len(proto.graph.node)) == ("instance", 1)
    assert np.abs(run(proto, x) - expected).max() < 5e-6 * np.abs(expected).max()


def test_long_sums_are_not_left_to_one_operator():
    """A group beyond `LONG_SUM` values is written by moments, which are summed map by map and stay exact."""
    norm = norm_of(GATES["layer"], (256, 256))
    proto, form = written(norm, (6, 256, 256))
    x = np.random.default_rng(1).normal(size=(1, 6, 256, 256)).astype(np.float32)
    expected = formula(norm, x)

    assert form == "moments"
    assert choose(norm_of(GATES["layer"], (LONG_SUM // 6, 1))) == "instance"
    assert choose(norm_of(GATES["layer"], (LONG_SUM_ALIKE // 6 + 1, 1)), alike=True) == "moments"
    assert choose(norm_of(GATES["layer"], (WEB_SUM // 6, 1)), runtime="web") == "instance"
    assert choose(norm_of(GATES["layer"], (WEB_SUM // 6 + 1, 1)), runtime="web") == "moments"
    assert np.abs(run(proto, x) - expected).max() < 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize("mean", [0.3, 1e4])
@pytest.mark.parametrize(("spatial", "parts"), [((64, 48), [48, 64]), ((4096,), [64, 64]), ((8, 16, 24), [48, 64])])
def test_sums_for_the_web_are_short(spatial, parts, mean):
    """A map is summed in parts, about as many as one has values: onnxruntime-web has one sum for each."""
    norm = norm_of(MIX, spatial, mean=mean)
    proto, _ = written(norm, (6, *spatial), runtime="web")
    x = np.random.default_rng(1).normal(mean, 1, (2, 6, *spatial)).astype(np.float32)
    expected = formula(norm, x)
    graph = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph
    sizes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*graph.input, *graph.value_info)}
    axes = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    reduced = [sizes[n.input[0]][axes[n.input[1]][0]] for n in graph.node if n.op_type == "ReduceMean"]

    assert "MatMul" not in {node.op_type for node in graph.node}
    assert sorted(reduced) == [6, 6, *sorted(2 * parts)]  # of channels, and twice of maps
    assert np.abs(run(proto, x) - expected).max() < 1e-6 * np.abs(expected).max()


def test_careful_means_centred():
    """Where the fast forms miss, every norm that is not constant can be centred."""
    for gates, form in (("batch", "batch"), ("layer", "centred"), ("mixed", "centred")):
        assert choose(norm_of(GATES[gates], (8, 8)), careful=True) == form


def test_operators_are_few_standard_and_named():
    """The forms hold few operators, standard ones alone, each named after the layer and its part."""

    def operators(norm, shape, **options):
        nodes = written(norm, shape, **options)[0].graph.node
        assert all(node.name.startswith("stem.bn/") and not node.domain for node in nodes)
        return [node.op_type for node in nodes]

    assert operators(norm_of(GATES["batch"], (8, 8)), (6, 8, 8)) == ["BatchNormalization"]
    assert operators(norm_of(GATES["layer"], (8, 8)), (6, 8, 8)) == [
        "Reshape", "InstanceNormalization", "Reshape", "BatchNormalization"
    ]  # fmt: skip
    single, shifted = norm_of(MIX, (8, 8)), norm_of(MIX, (8, 8), mean=1e4)
    assert len(operators(single, (6, 8, 8))) == 25
    assert len(operators(shifted, (6, 8, 8))) == 28
    assert "MatMul" in operators(norm_of(MIX, (PRODUCT, 1)), (6, PRODUCT, 1))
    assert operators(single, (6, 8, 8), runtime="ort").count("BatchNormalization") == 1


def test_closed_gates_leave_nothing():
    """A statistic whose gate is closed is not computed."""
    nodes = written(norm_of((INSTANCE, INSTANCE), (8, 8)), (6, 8, 8))[0].graph.node

    assert not any("layer" in node.name or "batch" in node.name for node in nodes)
