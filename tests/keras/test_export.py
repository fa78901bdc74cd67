"""A Keras model as an ONNX graph: names, shapes, layers' outputs and what cannot be exported."""

import keras
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from keras import layers, ops

from normswap.errors import InputError, UnsupportedError
from normswap.export.keras.trace import refusal, trace
from normswap.frameworks.example import Inputs
from normswap.frameworks.keras import in_double, record, round_weights, snapshot

from .exporting import assert_close, assert_traced, drawn, operators, settled, small_net

pytestmark = pytest.mark.keras


class TestGraph:
    def test_is_the_models_own_interface(self):
        """Inputs and outputs have the model's names and shapes, the batch symbolic, and no value has a colon."""
        traced = assert_traced(small_net())

        graph = traced.model.graph
        assert [(value.name, str(value.shape)) for value in graph.inputs] == [("image", "[batch,8,8,3]")]
        assert [(value.name, str(value.shape)) for value in graph.outputs] == [("scores", "[batch,5]")]
        names = [*graph.initializers, *(value.name for node in graph for value in node.outputs)]
        assert [name for name in names if ":" in name] == []

    @pytest.mark.parametrize(("opset", "ir_version"), [(17, 8), (18, 8), (20, 9), (22, 10), (24, 12)])
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
        traced = trace(small_net(shape=(None, None, 3)), Inputs(np.zeros((2, 6, 7, 3), np.float32)), opset=20)

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

        proto = ir.to_proto(trace(model, Inputs(*drawn([(6, 6, 2)], 2)), opset=20).model)
        session = onnxruntime.InferenceSession(proto.SerializeToString())

        assert session.run(None, {"image": negative})[0].max() == 0

    def test_leaves_the_model_as_it_was(self):
        """Neither tracing nor running changes weights, layers or their calls."""
        model = small_net()
        weights = model.get_weights()
        attributes = {layer.name: set(vars(layer)) for layer in model.layers}
        trace(model, Inputs(*drawn([(8, 8, 3)], 2)), opset=20)
        record(model, Inputs(*drawn([(8, 8, 3)], 2)))

        assert all(np.array_equal(a, b) for a, b in zip(weights, model.get_weights(), strict=True))
        assert {layer.name: set(vars(layer)) for layer in model.layers} == attributes


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
        (single, _), (double, sites) = record(model, Inputs(*arrays)), record(in_double(model), Inputs(*arrays))

        assert double["scores"].dtype == sites["norm"].dtype == np.float64
        assert_close(single["scores"], double["scores"])

    def test_weights_are_rounded_each_time_otherwise(self):
        """Up or down by half a unit in the last place of float32, and nothing else."""
        twin = in_double(small_net())
        before = [np.array(variable) for variable in twin.variables]
        found = []
        for seed in (0, 1):
            back = snapshot(twin)
            round_weights(twin, seed)
            found.append(np.concatenate([np.array(v).ravel() for v in twin.variables if v.dtype == "float64"]))
            back()
        plain = np.concatenate([value.ravel() for value in before if value.dtype == np.float64])

        for each in found:
            np.testing.assert_allclose(np.abs(each - plain), np.abs(plain) * 2.0**-24, rtol=1e-6)
        assert 0.3 < (found[0] == found[1])[plain != 0].mean() < 0.7
        assert all(np.array_equal(v, value) for v, value in zip(twin.variables, before, strict=True))

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
            trace(small_net(), Inputs(*drawn([(8, 8, 1)], 2)), opset=20)

        assert str(raised.value) == (
            "expected one input shape without the batch for each of image=(8, 8, 3), received shapes=[(8, 8, 1)]"
        )

    def test_of_a_model_never_called(self):
        """A model without weights is not exported."""
        with pytest.raises(UnsupportedError) as raised:
            trace(keras.Sequential([layers.Dense(2)], name="unbuilt"), Inputs(*drawn([(3,)], 2)), opset=20)

        assert str(raised.value) == (
            "expected a model that knows its weights, received Sequential 'unbuilt' that was never called; "
            "call it once on a batch"
        )

    def test_of_operations_onnx_lacks(self):
        """The message names the operations."""
        vector = keras.Input((3,))
        model = keras.Model(vector, ops.erfinv(vector))
        with pytest.raises(UnsupportedError) as raised:
            trace(model, Inputs(*drawn([(3,)], 2)), opset=20)

        assert str(raised.value) == (
            "expected operations that tf2onnx can write in ONNX, received Erfinv; express them through other keras.ops"
        )

    def test_of_open_dimensions_the_model_needs(self):
        """What TensorFlow cannot trace is reported with the shapes asked for."""
        image = keras.Input((None, None, 2), name="image")
        model = keras.Model(image, layers.UpSampling2D(interpolation="bilinear")(image))
        with pytest.raises(UnsupportedError) as raised:
            trace(model, Inputs(*drawn([(9, 9, 2)], 2)), opset=20, dynamic=True)

        assert str(raised.value) == (
            "expected a model that TensorFlow can trace with inputs of image=(None, None, 2), received "
            "OperatorNotAllowedInGraphError: Using a symbolic `tf.Tensor` as a Python `bool` is not allowed "
            "(in up_sampling2d); give every dimension that the model needs"
        )

    def test_of_other_backends(self, monkeypatch):
        """Only TensorFlow can be frozen; the message says how to get there."""
        monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
        with pytest.raises(UnsupportedError) as raised:
            trace(None, Inputs(), opset=20)

        assert str(raised.value) == (
            "expected the tensorflow or the torch backend, received backend='jax'; save the model as .keras "
            "and export it with KERAS_BACKEND=tensorflow"
        )

    @pytest.mark.parametrize(
        ("policy", "found"),
        [("float32", None), ("float64", "float64"), ("float16", "float16"), ("mixed_float16", None)],
    )
    def test_of_other_number_formats(self, policy, found):
        """The sentence names the first layer that is not float32."""
        model = keras.Sequential([keras.Input((3,)), layers.Dense(2, dtype=policy, name="dense")])
        expected = (
            found
            and f"expected float32 weights, received {found} in layer 'dense': rebuild the model with the dtype policy "
            "float32"
        )

        assert refusal(model) == expected
