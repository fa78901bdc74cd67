"""A Keras model as an ONNX graph: names, shapes, layers' outputs and what cannot be exported."""

import keras
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from keras import layers, ops

from normswap.convert.targets import GroupNorm
from normswap.errors import InputError, UnsupportedError
from normswap.export.keras import dtype_problem, in_double, input_shapes, norm_facts, run, trace
from normswap.export.traced import Traced
from normswap.layers.keras import BatchRenormalization, SwitchNormalization
from normswap.patchers.keras import patch

pytestmark = pytest.mark.keras

TOLERANCE = 5e-6  # of the output's scale


def settled(model):
    """Give the norms of ``model`` weights as after training."""
    rng = np.random.default_rng(1)
    for layer in model._flatten_layers():
        if hasattr(layer, "gamma"):
            layer.set_weights([rng.uniform(0.5, 1.5, weight.shape) for weight in layer.get_weights()])
    return model


def small_net(*, shape=(8, 8, 3), norm=layers.BatchNormalization):
    image = keras.Input(shape, name="image")
    x = layers.Conv2D(4, 3, padding="same", use_bias=False, name="conv")(image)
    x = layers.ReLU()(norm(name="norm")(x))
    x = layers.GlobalAveragePooling2D()(layers.DepthwiseConv2D(3, name="depthwise")(x))
    return settled(keras.Model(image, layers.Dense(5, activation="softmax", name="scores")(x)))


def drawn(shapes, batch):
    rng = np.random.default_rng(batch)
    return [rng.standard_normal((batch, *(9 if n is None else n for n in shape)), np.float32) for shape in shapes]


def ort_values(traced: Traced, arrays, *, wanted=()):
    """Return the graph's outputs and the ``wanted`` values, computed by onnxruntime as the graph is."""
    proto = ir.to_proto(traced.model)
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
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= TOLERANCE * max(np.abs(expected).max(), 1e-30)


def assert_traced(model, shapes=None, *, opset=20, batches=(1, 2, 5)) -> Traced:
    """Trace ``model`` and hold its outputs and sites against the model's own, at each batch size."""
    shapes = input_shapes(model) if shapes is None else shapes
    traced = trace(model, shapes, opset=opset)
    for batch in batches:
        arrays = drawn(shapes, batch)
        outputs, sites = run(model, arrays)
        found = ort_values(traced, arrays, wanted=traced.sites.values())

        assert [value.name for value in traced.model.graph.outputs] == list(outputs)
        assert list(traced.sites) == list(sites)
        for name, expected in outputs.items():
            assert_close(found[name], expected)
        for site, value in traced.sites.items():
            assert_close(found[value], sites[site])
    return traced


def operators(traced):
    return {node.op_type for node in traced.model.graph}


class TestGraph:
    def test_is_the_models_own_interface(self):
        """Inputs and outputs have the model's names and shapes, the batch symbolic, and no value has a colon."""
        traced = assert_traced(small_net())

        graph = traced.model.graph
        assert [(value.name, str(value.shape)) for value in graph.inputs] == [("image", "[batch,8,8,3]")]
        assert [(value.name, str(value.shape)) for value in graph.outputs] == [("scores", "[batch,5]")]
        names = [*graph.initializers, *(value.name for node in graph for value in node.outputs)]
        assert [name for name in names if ":" in name] == []

    @pytest.mark.parametrize(("opset", "ir_version"), [(17, 8), (18, 8), (20, 9)])
    def test_has_the_asked_operator_set_and_no_other(self, opset, ir_version):
        """The file declares the operator set asked for, the lowest legal IR version, and no unused domain."""
        traced = assert_traced(small_net(), opset=opset, batches=(2,))

        assert traced.model.opset_imports == {"": opset}
        assert traced.model.ir_version == ir_version

    def test_keeps_dimensions_open_that_the_caller_left_open(self):
        """Height and width given as None stay symbolic."""
        traced = assert_traced(small_net(shape=(None, None, 3)))

        assert str(traced.model.graph.inputs[0].shape) == "[batch,image_dim_1,image_dim_2,3]"

    def test_takes_arrays_for_shapes(self):
        """An example batch stands for its shape."""
        traced = trace(small_net(shape=(None, None, 3)), [np.zeros((2, 6, 7, 3), np.float32)], opset=20)

        assert str(traced.model.graph.inputs[0].shape) == "[batch,6,7,3]"

    def test_has_no_inputs_but_the_models(self):
        """The statistics of a Normalization layer and tensors held as attributes are constants of the graph."""
        normalize = layers.Normalization()
        normalize.adapt(np.random.default_rng(0).uniform(size=(20, 8, 8, 3)))
        model = keras.Sequential([keras.Input((8, 8, 3), name="image"), normalize, layers.Conv2D(2, 3, name="conv")])

        traced = assert_traced(model)

        assert [value.name for value in traced.model.graph.inputs] == ["image"]
        assert [value.name for value in traced.model.graph.outputs] == ["conv"]

    def test_names_several_inputs_and_a_dictionary_of_outputs(self):
        """Inputs keep the model's order, outputs are named by their keys, and an unused input stays."""
        first, second, unused = (keras.Input((4, 4, 2), name=name) for name in ("first", "second", "unused"))
        x, y = layers.Conv2D(3, 1)(first), layers.Conv2D(3, 1)(second)
        traced = assert_traced(keras.Model([first, second, unused], {"total": x + y, "difference": x - y}))

        assert [value.name for value in traced.model.graph.inputs] == ["first", "second", "unused"]
        assert {value.name for value in traced.model.graph.outputs} == {"total", "difference"}

    def test_gives_one_name_to_each_of_two_outputs_of_one_layer(self):
        """A layer that makes two outputs names the second with a number."""
        image = keras.Input((4, 4, 2), name="image")
        norm = layers.BatchNormalization(name="norm")
        traced = assert_traced(settled(keras.Model(image, [norm(image), norm(norm(image))])))

        assert [value.name for value in traced.model.graph.outputs] == ["norm", "norm_2"]

    def test_names_a_subclassed_models_inputs_by_its_signature(self):
        """A model without declared inputs has the names of its call's arguments; training stays off."""

        class Difference(keras.Model):
            def __init__(self):
                super().__init__()
                self.norm, self.scale = layers.BatchNormalization(name="norm"), ops.full((3,), 2.0)

            def call(self, left, right, training=True):
                return self.norm(left, training=training) * self.scale - right

        model = Difference()
        model(np.ones((1, 3)), np.ones((1, 3)))

        traced = assert_traced(settled(model), [(3,), (3,)])

        assert [value.name for value in traced.model.graph.inputs] == ["left", "right"]
        assert [value.name for value in traced.model.graph.outputs] == ["output"]

    def test_survives_saving(self, tmp_path):
        """A reloaded Sequential model has the same names as before."""
        model = keras.Sequential([keras.Input((8, 8, 1)), layers.Conv2D(2, 3), layers.Flatten(), layers.Dense(2)])
        model.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras")
        before, after = (assert_traced(each, batches=(2,)) for each in (model, loaded))

        assert [v.name for v in after.model.graph.inputs] == [v.name for v in before.model.graph.inputs]
        assert after.sites == before.sites

    def test_computes_grouped_convolutions_and_gelu(self):
        """Operations that Keras compiles on its own, or that ONNX lacks, are written all the same."""
        image = keras.Input((8, 8, 4))
        traced = assert_traced(keras.Model(image, layers.Conv2D(8, 3, groups=4, activation="gelu")(image)))

        assert {"Conv", "Erf"} <= operators(traced)

    def test_pads_with_zeros_before_max_pooling(self):
        """The optimizer of onnxruntime does not turn the zeros into -inf."""
        image = keras.Input((6, 6, 2), name="image")
        x = layers.DepthwiseConv2D(1, use_bias=False, depthwise_initializer="ones")(image)
        model = keras.Model(image, layers.MaxPooling2D(3, strides=2)(layers.ZeroPadding2D(1)(x)))
        negative = -np.ones((1, 6, 6, 2), np.float32)

        proto = ir.to_proto(trace(model, [(6, 6, 2)], opset=20).model)
        session = onnxruntime.InferenceSession(proto.SerializeToString())

        assert session.run(None, {"image": negative})[0].max() == 0

    def test_leaves_the_model_as_it_was(self):
        """Neither tracing nor running changes weights, layers or their calls."""
        model = small_net()
        weights = model.get_weights()
        attributes = {layer.name: set(vars(layer)) for layer in model.layers}
        trace(model, [(8, 8, 3)], opset=20)
        run(model, drawn([(8, 8, 3)], 2))

        assert all(np.array_equal(a, b) for a, b in zip(weights, model.get_weights(), strict=True))
        assert {layer.name: set(vars(layer)) for layer in model.layers} == attributes


class TestNorms:
    def test_batch_norm_is_one_operator_behind_its_convolution(self):
        """A BatchNormalization is ONNX's own, without a Transpose to its convolution."""
        traced = assert_traced(small_net())

        norm = next(node for node in traced.model.graph if node.op_type == "BatchNormalization")
        assert norm.inputs[0].producer().op_type == "Conv"

    @pytest.mark.parametrize("groups", [1, 2, -1])
    def test_group_norm_is_the_instance_norm_pattern(self, groups):
        """GroupNormalization costs no shape arithmetic where the shape is known."""
        traced = assert_traced(small_net(norm=lambda name: layers.GroupNormalization(groups, name=name)))

        assert "InstanceNormalization" in operators(traced)
        assert not operators(traced) & {"Shape", "Slice", "Concat", "Gather"}

    @pytest.mark.parametrize("statistics", ["moving", "frozen", "none"])
    @pytest.mark.parametrize("shape", [(6, 6, 4), (7, 4), (4,)])
    def test_switch_norm_is_its_formula(self, statistics, shape):
        """SwitchNormalization of any rank and kind of statistics equals the layer."""
        image = keras.Input(shape)
        output = SwitchNormalization(batch_statistics=statistics)(image)
        assert_traced(settled(keras.Model(image, output)), batches=(1, 3))

    def test_switch_norm_on_the_batch_statistics_is_a_batch_norm(self):
        """Gates that are one-hot on the moving statistics leave one BatchNormalization."""
        one_hot = keras.initializers.Constant([-200.0, -200.0, 200.0])
        image = keras.Input((6, 6, 4))
        norm = SwitchNormalization(mean_weight_initializer=one_hot, var_weight_initializer=one_hot)
        traced = assert_traced(keras.Model(image, norm(image)))

        assert operators(traced) == {"Transpose", "BatchNormalization"}

    def test_switch_norm_keeps_its_digits_far_from_zero(self):
        """With means 10,000 deviations away, the graph is off by two roundings of the mean at most."""
        image = keras.Input((8, 8, 4))
        model = keras.Model(image, SwitchNormalization(batch_statistics="none")(image))
        x = np.random.default_rng(0).normal(1e4, 1, (2, 8, 8, 4)).astype(np.float32)
        found = next(iter(ort_values(trace(model, [(8, 8, 4)], opset=20), [x]).values()))
        double = next(iter(run(in_double(model), [x])[0].values()))

        assert np.abs(found - double).max() <= 2 * np.spacing(np.float32(1e4))

    @pytest.mark.parametrize("norm", [layers.BatchNormalization, BatchRenormalization])
    def test_follows_a_dense_layer_as_gemm(self, norm):
        """A norm on (N, C) has a Gemm before it."""
        vector = keras.Input((6,))
        traced = assert_traced(settled(keras.Model(vector, norm()(layers.Dense(4)(vector)))))

        assert operators(traced) == {"Gemm", "BatchNormalization"}

    def test_other_axes_and_overridden_calls_stay_as_they_are(self):
        """A norm along a middle axis, and a subclass with a call of its own, are traced as written."""

        class Doubled(layers.BatchNormalization):
            def call(self, inputs, **kwargs):
                return 2 * super().call(inputs, **kwargs)

        image = keras.Input((4, 5, 6))
        assert_traced(settled(keras.Model(image, Doubled()(layers.BatchNormalization(axis=2)(image)))))

    def test_patched_models_tell_their_norms(self):
        """A patched layer's facts stand under its name."""
        model = small_net()
        patch(model, GroupNorm(groups=2))
        assert_traced(model)

        assert norm_facts(model) == {"norm": {"kind": "gn", "eps": 0.001, "groups": 2}}


class TestSites:
    def test_are_the_layers_with_weights_in_call_order(self):
        """Each has its class and a value; activations and pooling are none."""
        traced = assert_traced(small_net())

        assert list(traced.sites) == ["conv", "norm", "depthwise", "scores"]

    def test_of_nested_and_shared_layers_have_paths_and_counts(self):
        """A layer of a submodel has its path, and every call of a shared one its number."""
        encoder = keras.Sequential(
            [layers.Conv2D(4, 3, name="conv"), layers.BatchNormalization(name="bn")], name="encoder"
        )
        first, second = keras.Input((8, 8, 3)), keras.Input((8, 8, 3))
        shared = layers.Conv2D(2, 1, name="shared")
        norms = [layers.BatchNormalization(name=name) for name in ("one", "two")]
        outputs = [norm(shared(encoder(x))) for norm, x in zip(norms, (first, second), strict=True)]
        traced = assert_traced(settled(keras.Model([first, second], outputs)))

        assert set(traced.sites) == {
            *("encoder/conv", "encoder/bn", "encoder/conv#2", "encoder/bn#2"),
            *("shared", "shared#2", "one", "two"),
        }

    def test_within_wrappers_are_seen(self):
        """A layer that TimeDistributed calls, and the two halves of a Bidirectional, are sites."""
        clip = keras.Input((2, 6, 3))
        x = layers.TimeDistributed(layers.BatchNormalization(name="bn"), name="steps")(clip)
        x = layers.TimeDistributed(layers.Flatten())(x)
        x = layers.Bidirectional(layers.LSTM(2, name="lstm"), name="both")(x)
        traced = assert_traced(settled(keras.Model(clip, x)))

        assert list(traced.sites) == ["steps/bn", "steps/bn#2", "both/forward_lstm", "both/backward_lstm"]


class TestRun:
    def test_in_double_is_closer_than_float32(self):
        """The float64 reference comes from a copy and agrees with float32 to its precision."""
        model = small_net()
        arrays = drawn([(8, 8, 3)], 2)
        (single, _), (double, sites) = run(model, arrays), run(in_double(model), arrays)

        assert double["scores"].dtype == sites["norm"].dtype == np.float64
        assert_close(single["scores"], double["scores"])

    def test_in_double_refuses_what_it_cannot_rebuild(self):
        """A subclassed model has no float64 reference, and says so."""

        class Plain(keras.Model):
            def call(self, x):
                return x

        model = Plain(name="plain")
        model(np.ones((1, 2)))
        with pytest.raises(UnsupportedError) as raised:
            in_double(model)

        assert str(raised.value) == (
            "expected a Sequential or Functional model to rebuild in float64, received Plain 'plain'"
        )


class TestRefusals:
    def test_of_shapes_that_do_not_fit(self):
        """The message gives the model's own shapes."""
        with pytest.raises(InputError) as raised:
            trace(small_net(), [(8, 8, 1)], opset=20)

        assert str(raised.value) == (
            "expected one input shape without the batch for each of image=(8, 8, 3), received shapes=[(8, 8, 1)]"
        )

    def test_of_a_model_never_called(self):
        """A model without weights is not exported."""
        with pytest.raises(UnsupportedError) as raised:
            trace(keras.Sequential([layers.Dense(2)], name="unbuilt"), [(3,)], opset=20)

        assert str(raised.value) == (
            "expected a model that knows its weights, received Sequential 'unbuilt' that was never called; "
            "call it once on a batch"
        )

    def test_of_operations_onnx_lacks(self):
        """The message names the operations."""
        vector = keras.Input((3,))
        model = keras.Model(vector, ops.erfinv(vector))
        with pytest.raises(UnsupportedError) as raised:
            trace(model, [(3,)], opset=20)

        assert str(raised.value) == (
            "expected operations that tf2onnx can write in ONNX, received Erfinv; express them through other keras.ops"
        )

    def test_of_open_dimensions_the_model_needs(self):
        """What TensorFlow cannot trace is reported with the shapes asked for."""
        image = keras.Input((None, None, 2), name="image")
        model = keras.Model(image, layers.UpSampling2D(interpolation="bilinear")(image))
        with pytest.raises(UnsupportedError) as raised:
            trace(model, [(None, None, 2)], opset=20)

        assert str(raised.value) == (
            "expected a model that TensorFlow can trace with inputs of image=(None, None, 2), received "
            "OperatorNotAllowedInGraphError: Using a symbolic `tf.Tensor` as a Python `bool` is not allowed; "
            "give every dimension that the model needs"
        )

    def test_of_other_backends(self, monkeypatch):
        """Only TensorFlow can be frozen; the message says how to get there."""
        monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
        with pytest.raises(UnsupportedError) as raised:
            trace(None, [], opset=20)

        assert str(raised.value) == (
            "expected the tensorflow backend, received backend='jax'; save the model as .keras and export it with "
            "KERAS_BACKEND=tensorflow"
        )

    @pytest.mark.parametrize(
        ("policy", "found"), [("float32", None), ("float64", "float64"), ("mixed_float16", "float16")]
    )
    def test_of_other_number_formats(self, policy, found):
        """The sentence names the first layer that is not float32."""
        model = keras.Sequential([keras.Input((3,)), layers.Dense(2, dtype=policy, name="dense")])
        expected = found and f"{found} in layer 'dense': rebuild the model with the dtype policy float32"

        assert dtype_problem(model) == expected
