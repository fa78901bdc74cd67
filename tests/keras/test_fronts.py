"""Which linear layer is seen in front of a Keras model's BatchNorm, and why none is."""

import keras
import numpy as np
import pytest
from keras import layers, ops

from normswap.patchers.keras.fronts import read_front, scaled
from normswap.patchers.patch import plan

pytestmark = [
    pytest.mark.keras,
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
]

KINDS = {
    "Conv1D": (lambda **k: layers.Conv1D(6, 3, **k), (8, 4)),
    "Conv1D causal": (lambda **k: layers.Conv1D(6, 3, padding="causal", **k), (8, 4)),
    "Conv2D": (lambda **k: layers.Conv2D(6, 3, padding="same", strides=2, **k), (8, 8, 4)),
    "Conv2D of groups": (lambda **k: layers.Conv2D(6, 3, groups=2, **k), (8, 8, 4)),
    "Conv3D": (lambda **k: layers.Conv3D(6, 3, **k), (5, 5, 5, 4)),
    "Conv1DTranspose": (lambda **k: layers.Conv1DTranspose(6, 3, **k), (8, 4)),
    "Conv2DTranspose": (lambda **k: layers.Conv2DTranspose(6, 3, strides=2, **k), (5, 5, 4)),
    "Conv3DTranspose": (lambda **k: layers.Conv3DTranspose(6, 3, **k), (4, 4, 4, 4)),
    "DepthwiseConv1D": (lambda **k: layers.DepthwiseConv1D(3, depth_multiplier=2, **k), (8, 4)),
    "DepthwiseConv2D": (lambda **k: layers.DepthwiseConv2D(3, depth_multiplier=2, **k), (8, 8, 4)),
    "SeparableConv1D": (lambda **k: layers.SeparableConv1D(6, 3, **k), (8, 4)),
    "SeparableConv2D": (lambda **k: layers.SeparableConv2D(6, 3, depth_multiplier=2, **k), (8, 8, 4)),
    "Dense": (lambda **k: layers.Dense(6, **k), (4,)),
    "Dense over positions": (lambda **k: layers.Dense(6, **k), (8, 4)),
}
"""A layer of each kind with its input's shape, without the batch."""


def seen(model, example=None):
    """The front and the reason of every site, by the site's name."""
    return {d.site.name: (d.front, d.site.unequal) for d in plan(model, "gn", example=example).decisions}


def refused(reason):
    """What `seen` says of a BatchNorm without a front."""
    return {"bn": ("", reason)}


def net(front, between=lambda x: x, after=lambda x, y: y, shape=(8, 8, 4), norm=None):
    """A Functional model of a front, what is between it and the norm "bn", and what is made of both outputs."""
    inputs = keras.Input(shape)
    x = front(inputs)
    y = (norm or layers.BatchNormalization(name="bn"))(between(x))
    return keras.Model(inputs, after(x, y))


def conv(**settings):
    """A convolution named "conv"."""
    return layers.Conv2D(6, 3, name="conv", **settings)


def dense(**settings):
    """A dense layer named "dense"."""
    return layers.Dense(6, name="dense", **settings)


class Code(keras.Model):
    """A convolution and a BatchNorm, called as the function ``run(model, x)`` says."""

    def __init__(self, run):
        super().__init__()
        self.conv, self.bn, self.run = conv(), layers.BatchNormalization(name="bn"), run
        self.store = []

    def call(self, x):
        """Run the code."""
        return self.run(self, x)


@pytest.fixture
def x():
    """Seeded inputs for `net` and `Code`."""
    return np.random.default_rng(0).normal(size=(3, 8, 8, 4)).astype("float32")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_every_linear_layer_is_seen(kind, bias):
    """Each kind of layer is in front of the norm that alone reads it, with and without a bias, without an example."""
    make, shape = KINDS[kind]
    model = net(make(use_bias=bias, name="front"), shape=shape)
    (decision,) = plan(model, "gn").decisions
    assert (decision.front, decision.mode, decision.adds_bias) == ("front", "full", not bias)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_of_a_layer(kind):
    """A constant input times the gain is what the layer returns far from its borders; a factor scales its outputs."""
    make, shape = KINDS[kind]
    layer = make(use_bias=True)
    layer.build((None, *shape))
    channels = layer.bias.shape[0]
    layer.bias.assign(np.arange(float(channels)))
    rng = np.random.default_rng(0)
    name = next(n for n in ("pointwise_kernel", "_kernel", "kernel") if n in layer.__dict__)
    weight, factor = layer.__dict__[name], rng.uniform(-2, 2, channels)
    front = read_front(layer)
    new = scaled(layer, weight.numpy(), factor)
    np.testing.assert_allclose(read_front(layer, {**vars(layer), name: new}).gain, front.gain * factor[:, None], 1e-5)
    np.testing.assert_allclose(read_front(layer, {**vars(layer), name: new}).norms, front.norms * abs(factor), 1e-5)
    np.testing.assert_array_equal(front.bias, np.arange(float(channels)))
    constant = rng.normal(size=4)
    y = np.asarray(layer(np.broadcast_to(constant, (1, *shape)).astype("float32")))[0]
    if kind == "Conv2DTranspose":  # of stride 2: a kernel's positions are spread over the phases of four outputs
        y = 4 * (y[2:8, 2:8].mean(axis=(0, 1)) - front.bias) + front.bias
    elif isinstance(layer, layers.Dense):
        y = y.reshape(-1, channels)[0]
    else:
        y = y[tuple(size // 2 for size in y.shape[:-1])]
    np.testing.assert_allclose(front.gain @ constant + front.bias, y, rtol=1e-4, atol=1e-5)


def test_channels_first():
    """Where the channels come first the weights are the same, and so is what is read of them."""
    for make in (layers.Conv2D, layers.Conv2DTranspose, layers.SeparableConv2D):
        last, first = (make(6, 3, data_format=f"channels_{where}") for where in ("last", "first"))
        last.build((None, 8, 8, 4))
        first.build((None, 4, 8, 8))
        first.set_weights(last.get_weights())
        for one, other in zip(vars(read_front(last)).values(), vars(read_front(first)).values(), strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "between",
    [
        layers.Identity(),
        layers.Dropout(0.5),
        layers.SpatialDropout2D(0.5),
        layers.Reshape((36, 6)),
        layers.Reshape((3, 2, 6, 6)),
        layers.Permute((2, 1, 3)),
        lambda x: ops.reshape(x, (-1, 6)),
        lambda x: ops.squeeze(ops.expand_dims(x, 1), 1),
        lambda x: ops.stop_gradient(x),
    ],
)
def test_what_keeps_channels_may_be_between(between, x):
    """Identity, dropout at inference and reshapes that keep the channels together do not hide the layer in front."""
    assert seen(net(conv(), between), x) == {"bn": ("conv", "")}


def test_moved_channels_are_followed(x):
    """A norm along an axis to which the channels were moved reads the layer in front."""
    norm = layers.BatchNormalization(axis=1, name="bn")
    assert seen(net(conv(), layers.Permute((3, 1, 2)), norm=norm), x) == {"bn": ("conv", "")}


@pytest.mark.parametrize(
    "between",
    [layers.Reshape((6, 36)), layers.Flatten(), layers.Permute((3, 1, 2)), lambda x: ops.reshape(x, (-1, 6, 6, 3, 2))],
)
def test_channels_that_are_mixed(between, x):
    """A reshape after which the norm's channels are others keeps the layer from being in front."""
    assert seen(net(conv(), between), x) == refused("conv: its channels are not those of the norm")


def test_a_norm_along_a_map(x):
    """A norm along another axis than the channels' has no layer in front, also where both are of one size."""
    norm = layers.BatchNormalization(axis=1, name="bn")
    model = net(conv(), norm=norm)  # maps of 6 x 6 with 6 channels
    assert seen(model, x) == refused("conv: its channels are not those of the norm")


ELSEWHERE = {
    "a skip connection": (lambda x, y: layers.Add()([x, y]), "its output is also read by AddV2"),
    "an activation": (lambda x, y: layers.Add()([layers.ReLU()(x), y]), "its output is also read by Relu"),
    "squeeze and excite": (
        lambda x, y: layers.Multiply()([layers.GlobalAveragePooling2D(keepdims=True)(x), y]),
        "its output is also read by Mean",
    ),
    "another convolution": (
        lambda x, y: layers.Add()([layers.Conv2D(6, 1)(x), y]),
        "its output is also read by Conv2D",
    ),
    "the model's outputs": (lambda x, y: [x, y], "its output is one of the model's"),
    "the model's outputs, reshaped": (
        lambda x, y: {"a": ops.reshape(x, (-1, 6)), "b": y},
        "its output is one of the model's",
    ),
}


@pytest.mark.parametrize("reader", ELSEWHERE)
def test_what_else_reads_the_output(reader, x):
    """Whatever reads the output of the layer beside the norm is named, since it would read another function of x."""
    after, reason = ELSEWHERE[reader]
    assert seen(net(conv(), after=after), x) == refused(f"conv: {reason}")


def test_several_norms(x):
    """Of a layer that two norms read neither can have its own scale."""
    model = net(conv(), after=lambda x, y: layers.Add()([layers.BatchNormalization(name="bn2")(x), y]))
    reason = "conv: several norms read its output"
    assert seen(model, x) == {"bn": ("", reason), "bn2": ("", reason)}


def test_nothing_linear_in_front(x):
    """A norm of the inputs, or of what an activation returns, has no linear layer in front."""
    assert seen(net(layers.ReLU()), x) == refused("no linear layer in front")
    assert seen(net(conv(), layers.ReLU()), x) == refused("no linear layer in front")
    assert seen(keras.Sequential([keras.Input((4,)), layers.BatchNormalization(name="bn")])) == refused(
        "no linear layer in front"
    )


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"activation": "relu"}, "its activation is in between"),
        ({"trainable": False}, "it is frozen"),
        ({"kernel_constraint": "unit_norm"}, "a constraint holds its weights"),
        ({"activity_regularizer": "l2"}, "its output is also read by Square"),
    ],
)
def test_settings_of_the_layer(settings, reason, x):
    """A layer whose output is not what its weights say, whose weights may not change or are held, is left."""
    assert seen(net(conv(**settings)), x) == refused(f"conv: {reason}")


def test_a_frozen_kernel(x):
    """A kernel that does not learn by itself is left."""
    model = net(conv())
    model.get_layer("conv")._kernel.trainable = False
    assert seen(model, x) == refused("conv: it is frozen")


def test_lora():
    """A layer with LoRA, whose kernel is a sum, is left."""
    model = net(dense(), shape=(4,))
    model.get_layer("dense").enable_lora(2)
    assert seen(model) == refused("dense: its kernel is computed, by LoRA")


def test_quantized():
    """A quantized layer is left: it computes something else than its call says."""
    model = net(dense(), shape=(4,))
    model.get_layer("dense").quantize("int8")
    assert seen(model) == refused("no linear layer in front")


def test_shared(x):
    """A layer or a norm that runs several times is left, and so is a norm that does not run."""
    twice = conv()
    model = net(twice, after=lambda a, y: [y, layers.ReLU()(twice(layers.ZeroPadding2D(3)(y[..., :4])))])
    assert seen(model, x) == refused("conv: it runs several times")
    norm = layers.BatchNormalization(name="bn")
    model = net(conv(), norm=norm, after=lambda a, y: norm(layers.ReLU()(y)))
    assert seen(model, x) == refused("it runs several times")
    model = Code(lambda model, x: model.bn(model.conv(x)))
    model(x)
    model.run = lambda model, x: model.conv(x)
    assert seen(model, x) == refused("it did not run on the example")


def test_tied_parameters(x):
    """A kernel that another layer holds as well, as SpectralNormalization does, takes no scale."""
    model = net(layers.SpectralNormalization(conv(), name="spectral"))
    reason = "spectral/conv: its parameters are those of another layer, too"
    assert seen(model, x) == refused(reason)


class Standardized(layers.Conv2D):
    """A convolution with standardized weights."""

    def convolution_op(self, inputs, kernel):
        """Convolve with a kernel of mean 0 and deviation 1."""
        kernel = kernel - ops.mean(kernel, (0, 1, 2), keepdims=True)
        return super().convolution_op(inputs, kernel / ops.std(kernel, (0, 1, 2), keepdims=True))


class Renamed(layers.Conv2D):
    """A subclass that computes what its base does."""


def test_subclasses(x):
    """A subclass is judged by whether its output follows its weights."""
    wrong = "its output is no linear function of its weights and bias, as with weights that are standardized"
    assert seen(net(Standardized(6, 3, name="conv")), x) == refused(f"conv: {wrong}")
    assert seen(net(Renamed(6, 3, name="conv")), x) == {"bn": ("conv", "")}


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (lambda m, x: m.bn(m.conv(x)), None),
        (lambda m, x: m.bn(m.conv(x)) * ops.cast(ops.size(m.conv.output), "float32"), ...),
        (lambda m, x: m.bn(m.keep(m.conv(x))), "conv: its output is kept by code of the model"),
        (lambda m, x: m.bn(m.store_it(m.conv(x))), "conv: its output is kept by code of the model"),
        (
            lambda m, x: m.bn(m.conv(x)) + ops.sum(m.conv.kernel),
            "conv: its parameters are read elsewhere, by ReadVariableOp",
        ),
    ],
    ids=["plain", "its size", "an attribute", "a list", "its kernel"],
)
def test_code(run, reason, x):
    """What code of the model does with the output or the weights is seen; reading a size is no reading."""
    model = Code(run)
    if reason is ...:
        model.run = lambda m, x: (lambda y: m.bn(y) / ops.cast(ops.size(y), "float32"))(m.conv(x))
    model.keep = lambda y: setattr(model, "kept", y) or y
    model.store_it = lambda y: model.store.append(y) or y
    model(x)
    assert seen(model, x) == ({"bn": ("conv", "")} if reason in (None, ...) else refused(reason))


def test_kept_reshaped(x):
    """An attribute that keeps the output in another shape keeps it, and has values again after the look."""
    model = Code(lambda m, x: m.bn(m.keep(m.conv(x))))
    model.keep = lambda y: setattr(model, "kept", ops.reshape(y, (-1, 6))) or y
    model(x)
    assert seen(model, x) == refused("conv: its output is kept by code of the model")
    assert np.isfinite(np.asarray(model.kept)).all()


def test_loops(x):
    """In a loop over steps, as of TimeDistributed, the layers run in a function of its own."""
    steps = keras.Sequential(
        [
            keras.Input((3, 8, 8, 4)),
            layers.TimeDistributed(conv()),
            layers.BatchNormalization(name="bn"),
        ]
    )
    (found,) = seen(steps).values()
    assert found == ("", "no linear layer in front")


def test_a_model_that_cannot_be_traced(x):
    """Code that needs values where a graph has none leaves every layer as it is, with what it says."""
    model = Code(lambda m, x: m.bn(m.conv(x)) * float(ops.convert_to_numpy(x).max()))
    model(x)
    (found,) = seen(model, x).values()
    assert found[0] == ""
    assert found[1].startswith("the model cannot be traced (")
    assert "Exception encountered" not in found[1]


def test_without_an_example():
    """A model that leaves a size open, or is of code, shows nothing without an example."""
    assert seen(net(conv(), shape=(None, None, 4))) == refused("no example shows what is in front")
    code = Code(lambda m, x: m.bn(m.conv(x)))
    code(np.zeros((1, 8, 8, 4), "float32"))
    assert seen(code) == refused("no example shows what is in front")


def test_an_example_of_zeros(x):
    """An example of zeros, of which nothing but constants comes, shows what noise does."""
    wrong = "its output is no linear function of its weights and bias, as with weights that are standardized"
    assert seen(net(conv(use_bias=False)), np.zeros_like(x)) == {"bn": ("conv", "")}
    assert seen(net(Standardized(6, 3, name="conv")), np.zeros_like(x)) == refused(f"conv: {wrong}")


def test_looking_changes_nothing(x):
    """A plan leaves variables, attributes of layers and traced functions as they were."""
    model = net(conv())
    model.compile("sgd", "mse")
    model.predict(x, verbose=0)
    before = [(dict(vars(layer)), layer.get_weights()) for layer in model.layers]
    function = model.predict_function
    assert seen(model, x) == {"bn": ("conv", "")}
    assert model.predict_function is function
    for layer, (contents, weights) in zip(model.layers, before, strict=True):
        assert vars(layer).keys() == contents.keys()
        assert all(vars(layer)[key] is value for key, value in contents.items() if key in ("bias", "_kernel", "call"))
        for one, other in zip(layer.get_weights(), weights, strict=True):
            np.testing.assert_array_equal(one, other)


def test_mixed_precision(x):
    """In half precision what follows its weights is told from what does not."""
    with_policy = {"dtype": "mixed_bfloat16"}
    norm = layers.BatchNormalization(name="bn", **with_policy)
    assert seen(net(conv(**with_policy), norm=norm), x) == {"bn": ("conv", "")}
    norm = layers.BatchNormalization(name="bn", **with_policy)
    wrong = "its output is no linear function of its weights and bias, as with weights that are standardized"
    assert seen(net(Standardized(6, 3, name="conv", **with_policy), norm=norm), x) == refused(f"conv: {wrong}")
