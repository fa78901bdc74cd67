"""Trace a Keras model and hold the graph against the model."""

import keras
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from keras import layers

from normswap.convert.targets import SwitchNorm
from normswap.export.forms import write_norm
from normswap.export.keras.trace import trace
from normswap.export.onnx import to_onnx
from normswap.export.traced import Traced
from normswap.frameworks.example import Inputs
from normswap.frameworks.keras import input_shapes, record
from normswap.patchers.keras.patch import patch

TOLERANCE = 5e-6  # of the output's scale


def settled(model):
    """Give the norms of ``model`` weights as after training."""
    rng = np.random.default_rng(1)
    for layer in model._flatten_layers():
        if hasattr(layer, "gamma"):
            layer.set_weights([rng.uniform(0.5, 1.5, weight.shape) for weight in layer.get_weights()])
    return model


def small_net(*, shape=(8, 8, 3), norm=layers.BatchNormalization):
    """Return an image classifier with one norm between a convolution and a depthwise one."""
    keras.utils.set_random_seed(0)
    image = keras.Input(shape, name="image")
    x = layers.Conv2D(4, 3, padding="same", use_bias=False, name="conv")(image)
    x = layers.ReLU()(norm(name="norm")(x))
    x = layers.GlobalAveragePooling2D()(layers.DepthwiseConv2D(3, name="depthwise")(x))
    return settled(keras.Model(image, layers.Dense(5, activation="softmax", name="scores")(x)))


def write_small_net(path):
    """Write the file of that network, patched, without proving it."""
    model = small_net()
    patch(model, SwitchNorm())
    to_onnx(model, path, check=False)


def drawn(shapes, batch):
    """Return seeded inputs of ``shapes``, 9 where a size is open."""
    rng = np.random.default_rng(batch)
    return [rng.standard_normal((batch, *(9 if n is None else n for n in shape)), np.float32) for shape in shapes]


def written(traced: Traced) -> ir.Model:
    """Return the traced graph with its norms written, as the file has them before anything is folded."""
    for node, norm in traced.norms.items():
        if node.graph is not None:
            write_norm(traced.model, node, norm, runtime="portable")
    return traced.model


def ort_values(traced: Traced, arrays, *, wanted=()):
    """Return the graph's outputs and the ``wanted`` values, computed by onnxruntime as the graph is."""
    proto = ir.to_proto(written(traced))
    onnx.checker.check_model(proto, full_check=True)
    own = [output.name for output in proto.graph.output]
    extra = sorted(set(wanted) - set(own))
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in extra)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options)
    feed = dict(zip((entry.name for entry in session.get_inputs()), arrays, strict=True))
    return dict(zip([*own, *extra], session.run(None, feed), strict=True))


def assert_close(actual, expected):
    """Expect equality to a few roundings of the largest value."""
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= TOLERANCE * max(np.abs(expected).max(), 1e-30)


def assert_traced(model, shapes=None, *, opset=20, batches=(1, 2, 5)) -> Traced:
    """Trace ``model`` and hold its outputs and sites against the model's own, at each batch size."""
    shapes = input_shapes(model) if shapes is None else shapes
    dynamic = any(size is None for shape in shapes for size in shape)
    traced = trace(model, Inputs(*drawn(shapes, 2)), opset=opset, dynamic=dynamic)
    for batch in batches:
        arrays = drawn(shapes, batch)
        outputs, sites = record(model, Inputs(*arrays))
        found = ort_values(traced, arrays, wanted=traced.sites.values())

        assert [value.name for value in traced.model.graph.outputs] == list(outputs)
        assert list(traced.sites) == list(sites)
        for name, expected in outputs.items():
            assert_close(found[name], expected)
        for site, value in traced.sites.items():
            assert_close(found[value], sites[site])
    return traced


def operators(traced):
    """Return the operators of a graph."""
    return {node.op_type for node in traced.model.graph}


def exported(model, path, **options) -> onnx.GraphProto:
    """Return the graph of the verified file of ``model``."""
    assert to_onnx(model, path, overwrite=True, **options).verdict
    return graph_of(path)


def graph_of(path) -> onnx.GraphProto:
    """Return the graph of a file."""
    return onnx.load(path).graph


def count(graph: onnx.GraphProto, op_type):
    """Return how often an operator stands in a graph."""
    return sum(node.op_type == op_type for node in graph.node)


def names(values):
    """Return the names of inputs or outputs."""
    return [value.name for value in values]
