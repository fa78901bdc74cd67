"""What both layers have in common: saving, compiling, configuration, and the messages for what they refuse."""

import inspect

import keras
import numpy as np
import pytest

from normswap.layers.keras import BatchRenormalization, SwitchNormalization

from ..helpers import exactly

pytestmark = [
    pytest.mark.keras,
    # Keras's own saving converts variables this way.
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
]

LAYERS = [SwitchNormalization, BatchRenormalization]


@pytest.fixture(params=LAYERS)
def cls(request):
    """Return each layer's class."""
    return request.param


@pytest.fixture
def x():
    """Return a seeded batch of 5x5 images with 3 channels."""
    return np.random.default_rng(1).normal(2.0, 3.0, (8, 5, 5, 3)).astype("float32")


def network(cls, jit=False, **options):
    """Return a compiled model that ends in a seeded layer of ``cls``."""
    keras.utils.set_random_seed(0)
    norm = cls(momentum=0.5, name="norm", **options)
    model = keras.Sequential([keras.Input((5, 5, 3)), keras.layers.Conv2D(4, 3, name="conv"), norm])
    model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=jit)
    return model


def raises(error, message):
    """Expect the whole ``message``."""
    return pytest.raises(error, match=exactly(message))


def test_trained_models_come_back_from_files(cls, x, tmp_path):
    """A .keras file loads by registered names alone, a .weights.h5 file into the same model; outputs are equal."""
    model = network(cls)
    model.fit(x, np.ones((8, 3, 3, 4)), epochs=2, verbose=0)
    model.save(tmp_path / "m.keras")
    model.save_weights(tmp_path / "m.weights.h5")
    other = network(cls)
    assert not np.array_equal(other(x), model(x))
    other.load_weights(tmp_path / "m.weights.h5")
    for loaded in (other, keras.models.load_model(tmp_path / "m.keras")):
        np.testing.assert_array_equal(loaded(x), model(x))


@pytest.mark.parametrize("options", [{}, {"dtype": "mixed_bfloat16"}])
def test_xla_trains_as_without_it(cls, x, options):
    """Steps compiled with jit_compile=True end at the weights of those that are not, in mixed precision too."""
    weights = []
    for jit in (False, True):
        model = network(cls, jit, **options)
        model.fit(x, np.ones((8, 3, 3, 4)), epochs=2, verbose=0)
        weights.append(model.get_weights())
    tolerance = 0.05 if options else 1e-4
    for plain, compiled in zip(*weights, strict=True):
        np.testing.assert_allclose(compiled, plain, rtol=tolerance, atol=tolerance)


def test_configuration_names_every_argument(cls):
    """No constructor argument is missing from the configuration, which rebuilds the layer."""
    arguments = {
        name
        for parent in cls.__mro__[:2]
        for name, parameter in inspect.signature(parent).parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD
    }
    config = cls().get_config()
    assert arguments <= config.keys()
    assert cls.from_config(config).get_config() == config


def test_every_argument_of_batch_normalization_is_taken(cls):
    """What configures a BatchNormalization configures either layer, renorm's own arguments apart."""
    config = keras.layers.BatchNormalization(axis=1, momentum=0.5, gamma_regularizer="l2", name="bn").get_config()
    shared = {name: value for name, value in config.items() if not name.startswith("renorm")}
    assert shared.items() <= cls(**shared).get_config().items()


def test_synchronized_needs_tensorflow(cls, monkeypatch):
    """On other backends synchronized=True is refused in the words of BatchNormalization."""
    monkeypatch.setattr(keras.backend, "backend", lambda: "torch")
    with raises(ValueError, "Argument synchronized=True is only supported with the TensorFlow backend."):
        cls(synchronized=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"axis": [1]}, "expected `axis` to be one integer, received axis=[1]"),
        ({"momentum": 1.5}, "expected `momentum` between 0 and 1, received momentum=1.5"),
        ({"momentum": -0.1}, "expected `momentum` between 0 and 1, received momentum=-0.1"),
        ({"epsilon": 0}, "expected `epsilon` above 0, received epsilon=0"),
        ({"epsilon": float("nan")}, "expected `epsilon` above 0, received epsilon=nan"),
    ],
)
def test_wrong_arguments(cls, options, message):
    """A wrong argument is named with what was expected."""
    with raises(ValueError, message):
        cls(**options)


@pytest.mark.parametrize(
    ("axis", "shape", "message"),
    [
        (-1, (4,), "expected input of rank 2 or more, received shape=(4,)"),
        (0, (4, 3), "expected `axis` to be a channel axis of shape=(4, 3), received axis=0"),
        (3, (4, 3, 2), "expected `axis` to be a channel axis of shape=(4, 3, 2), received axis=3"),
        (-4, (4, 3, 2), "expected `axis` to be a channel axis of shape=(4, 3, 2), received axis=-4"),
        (-1, (4, None), "expected a known size along axis=-1, received shape=(4, None)"),
    ],
)
def test_wrong_shapes(cls, axis, shape, message):
    """A shape that the layer cannot be built for is named with what was expected."""
    with raises(ValueError, message):
        cls(axis=axis).build(shape)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((4, 5, 7), "expected axis 2 of input shape to have value 6, but received input with shape (4, 5, 7)"),
        ((4, 6), "expected ndim=3, found ndim=2. Full shape received: (4, 6)"),
    ],
)
def test_wrong_inputs(cls, shape, message):
    """Input of another rank or channel count than the layer was built for is named as by every Keras layer."""
    layer = cls(name="norm")
    layer.build((None, 5, 6))
    with raises(ValueError, f"Input 0 with name 'None' of layer 'norm' is incompatible with the layer: {message}"):
        layer(np.ones(shape, "float32"))


@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool"])
def test_input_that_is_not_floating_point(cls, dtype):
    """Integers, such as images before scaling, are refused instead of being widened unasked."""
    layer = cls(name="norm")
    layer.build((None, 5, 6))
    with raises(TypeError, f"expected floating-point input to norm, received dtype={dtype}; cast it first"):
        layer.call(keras.ops.ones((4, 5, 6), dtype))
