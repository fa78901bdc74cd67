"""The norms of a Keras model in its ONNX graph: one operator each until written, then few."""

import keras
import numpy as np
import pytest
from keras import layers

from normswap.convert.targets import GroupNorm
from normswap.export.keras.trace import norm_facts, prune, trace
from normswap.frameworks.example import Inputs
from normswap.frameworks.keras import in_double, record
from normswap.layers.keras import BatchRenormalization, SwitchNormalization
from normswap.patchers.keras.patch import patch

from .exporting import assert_traced, drawn, operators, ort_values, settled, small_net

pytestmark = pytest.mark.keras


class TestNorms:
    def test_batch_norm_is_one_operator_behind_its_convolution(self):
        """A BatchNormalization is ONNX's own, without a Transpose to its convolution."""
        traced = assert_traced(small_net())

        norm = next(node for node in traced.model.graph if node.op_type == "BatchNormalization")
        assert norm.inputs[0].producer().op_type == "Conv"

    @pytest.mark.parametrize("groups", [1, 2])
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
        found = next(iter(ort_values(trace(model, Inputs(x), opset=20), [x]).values()))
        double = next(iter(record(in_double(model), Inputs(x))[0].values()))

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

    def test_tells_how_far_means_lie_from_zero(self):
        """Without running statistics the example says whether E[x²] - E[x]² is good."""
        image = keras.Input((8, 8, 4))
        model = keras.Model(image, layers.GroupNormalization(2)(image))
        near, far = (np.random.default_rng(0).normal(mean, 1, (2, 8, 8, 4)).astype(np.float32) for mean in (0, 100))
        seen = [next(iter(trace(model, Inputs(each), opset=20).norms.values())).seen for each in (near, far)]

        assert seen[0] < 0.1
        assert 1e4 < seen[1] < 2e4

    def test_names_are_the_layers_paths(self):
        """A norm has the path of its layer, the second call of a shared one a number."""
        norm = layers.BatchNormalization(name="norm")
        encoder = keras.Sequential([keras.Input((4, 4, 2)), layers.Conv2D(2, 1), norm], name="encoder")
        first, second = keras.Input((4, 4, 2)), keras.Input((4, 4, 2))
        model = keras.Model([first, second], encoder(first) + encoder(second))
        traced = trace(model, Inputs(*drawn([(4, 4, 2)] * 2, 2)), opset=20)

        assert [each.name for each in traced.norms.values()] == ["encoder/norm", "encoder/norm#2"]

    @pytest.mark.parametrize(
        "norm",
        [SwitchNormalization(compat="keras-switchnorm"), BatchRenormalization(compat="titu1994")],
        ids=["keras-switchnorm", "titu1994"],
    )
    def test_layers_that_copy_others_stand_for_themselves(self, norm):
        """A layer that copies another library's, which it does in training alone, is one operator as all are."""
        image = keras.Input((4, 4, 2))
        model = settled(keras.Model(image, norm(image)))

        assert len(assert_traced(model).norms) == 1

    def test_within_loops_stay_as_they_are(self):
        """A norm inside a recurrent cell, whose body is a graph of its own, is traced as written."""

        class Cell(layers.SimpleRNNCell):
            def build(self, shape):
                super().build(shape)
                self.norm = layers.BatchNormalization()
                self.norm.build((None, self.units))

            def call(self, inputs, states, training=False):
                output, state = super().call(inputs, states)
                return self.norm(output, training=training), state

        clip = keras.Input((5, 3))

        assert not assert_traced(settled(keras.Model(clip, layers.RNN(Cell(2))(clip)))).norms


class TestPrune:
    def test_closes_gates_and_opens_them_again(self):
        """Gates below the threshold are 0 in the context, the others keep their shares, and all come back."""
        image = keras.Input((4, 4, 2))
        logits = keras.initializers.Constant(np.log([0.6, 0.05, 0.35]))
        norm = SwitchNormalization(mean_weight_initializer=logits, name="norm")
        model = keras.Model(image, norm(image))
        before = norm.get_weights()
        with prune(model, 0.1) as dropped:
            mean, var = (keras.ops.convert_to_numpy(gates) for gates in norm.gates())

        assert dropped == {"norm": ["mean layer"]}
        np.testing.assert_allclose(mean, [0.6 / 0.95, 0, 0.35 / 0.95], rtol=1e-6, atol=0)
        np.testing.assert_allclose(var, np.full(3, 1 / 3), rtol=1e-6)
        assert all(map(np.array_equal, before, norm.get_weights()))
