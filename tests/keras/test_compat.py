"""The dialects of other implementations, against arrays computed here from their documented semantics."""

import re

import keras
import numpy as np
import pytest

from normswap.layers.keras import BatchRenormalization, SwitchNormalization

pytestmark = pytest.mark.keras


def batches(number, shape):
    """Return seeded batches whose statistics differ from one to the next."""
    rng = np.random.default_rng(1)
    return [rng.normal(rng.normal(), rng.uniform(0.5, 2.0), shape).astype("float32") for _ in range(number)]


class TestKerasSwitchNorm:
    """titu1994/keras-switchnorm: a corrected moving variance, and initial moving statistics of its own."""

    @pytest.mark.parametrize(("shape", "axis"), [((3, 4, 5, 6), -1), ((3, 6, 4, 5), 1), ((3, 7, 6), 2)])
    def test_training_and_inference(self, shape, axis):
        """The batch's biased variance enters the moving one times m/(m - (1 + eps)), m values per map."""
        layer = SwitchNormalization(axis, compat="keras-switchnorm")
        mean, variance = np.ones(6), np.zeros(6)
        spatial = tuple(a for a in range(1, len(shape)) if a != axis % len(shape))
        values = np.prod([shape[a] for a in spatial])
        for x in batches(3, shape):
            axes = (0, *spatial)
            trained = layer(x, training=True)
            np.testing.assert_allclose(trained, self.output(x, axis, x.mean(axes), x.var(axes)), rtol=1e-5, atol=1e-5)
            mean = 0.99 * mean + 0.01 * x.mean(axes, dtype=np.float64)
            variance = 0.99 * variance + 0.01 * x.var(axes, dtype=np.float64) * values / (values - (1 + 1e-3))
        np.testing.assert_allclose(layer.moving_mean, mean, rtol=1e-5)
        np.testing.assert_allclose(layer.moving_variance, variance, rtol=1e-5)
        np.testing.assert_allclose(layer(x), self.output(x, axis, mean, variance), rtol=1e-5, atol=1e-5)

    @staticmethod
    def output(x, axis, batch_mean, batch_variance):
        """Return thirds of instance, layer and batch statistics, the latter two by moments about 0."""
        x = np.moveaxis(x.astype(np.float64), axis, -1)
        spatial = tuple(range(1, x.ndim - 1))
        mean, variance = x.mean(spatial, keepdims=True), x.var(spatial, keepdims=True)
        layer_mean = mean.mean(-1, keepdims=True)
        layer_variance = (variance + mean**2).mean(-1, keepdims=True) - layer_mean**2
        mixed_mean = (mean + layer_mean + batch_mean) / 3
        mixed_variance = (variance + layer_variance + batch_variance) / 3
        return np.moveaxis((x - mixed_mean) / np.sqrt(mixed_variance + 1e-3), -1, axis)

    @pytest.mark.parametrize("shape", [(4, 6), (4, 1, 1, 6)])
    def test_one_value_per_map_is_refused(self, shape):
        """There the factor would be -1000 and inference NaN."""
        message = (
            "expected two or more values per sample and channel with compat='keras-switchnorm', which divides by "
            f"their number - 1 - epsilon, received shape={shape}; use compat=None"
        )
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            SwitchNormalization(compat="keras-switchnorm").build(shape)
        if len(shape) == 4:  # built for maps of any size, called on one that is too small
            layer = SwitchNormalization(compat="keras-switchnorm")
            layer.build((None, None, None, 6))
            with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
                layer.call(keras.ops.ones(shape), training=True)

    def test_maps_of_unknown_size(self):
        """The factor follows the size of each batch's maps inside one compiled function."""
        x, y = (np.random.default_rng(1).normal(size=(2, s, s, 3)).astype("float32") for s in (2, 5))
        model = keras.Sequential(
            [keras.Input((None, None, 3)), SwitchNormalization(momentum=0.0, compat="keras-switchnorm")]
        )
        model.compile(keras.optimizers.SGD(0.0), "mse", jit_compile=False)
        for batch in (x, y):
            model.train_on_batch(batch, batch)
            size = batch.shape[1] ** 2
            expected = batch.var((0, 1, 2)) * size / (size - 1.001)
            np.testing.assert_allclose(model.layers[0].moving_variance, expected, rtol=1e-5)

    def test_arguments_given_win_over_the_dialect(self):
        """The initial moving statistics can be set, and survive the configuration."""
        layer = SwitchNormalization(compat="keras-switchnorm", moving_mean_initializer="zeros")
        layer = SwitchNormalization.from_config(layer.get_config())
        layer.build((None, 5, 6))
        assert (layer.compat, layer.moving_mean.numpy().sum(), layer.moving_variance.numpy().sum()) == (
            "keras-switchnorm",
            0.0,
            0.0,
        )


class TestTitu1994:
    """titu1994/BatchRenormalization: an average of variance + eps, and limits on a sigmoid."""

    @pytest.mark.parametrize("t_delta", [1.0, 1e-3])
    def test_training_and_inference(self, t_delta):
        """Each step corrects by the statistics before it, within the sigmoid's limits of that step."""
        layer = BatchRenormalization(compat="titu1994", t_delta=t_delta, r_max=2.0, d_max=3.0)
        mean, variance = np.zeros(6), np.ones(6)
        for step, x in enumerate(batches(6, (8, 4, 6))):
            y = layer(x, training=True)
            x = x.astype(np.float64)
            t = step * t_delta
            r_max = 2 / (1 + (2 - 1) * np.exp(-t))
            d_max = 3 / (1 + (3 / 1e-3 - 1) * np.exp(-2 * t))
            batch_mean, batch_std = x.mean((0, 1)), np.sqrt(x.var((0, 1)) + 1e-3)
            std = np.sqrt(variance + 1e-3)
            r = np.clip(batch_std / std, 1 / r_max, r_max)
            d = np.clip((batch_mean - mean) / std, -d_max, d_max)
            np.testing.assert_allclose(y, (x - batch_mean) / batch_std * r + d, rtol=1e-5, atol=1e-5)
            mean = 0.99 * mean + 0.01 * batch_mean
            variance = 0.99 * variance + 0.01 * batch_std**2
        np.testing.assert_allclose(layer.moving_mean, mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(layer.moving_variance, variance, rtol=1e-5)
        expected = (x - mean) / np.sqrt(variance + 1e-3)
        np.testing.assert_allclose(layer(x.astype("float32")), expected, rtol=1e-5, atol=1e-5)

    def test_configuration(self):
        """The dialect and its schedule come back from the configuration."""
        config = BatchRenormalization(compat="titu1994").get_config()
        assert BatchRenormalization.from_config(config).get_config() == config
        assert (config["schedule"], config["t_delta"], config["r_max"], config["d_max"]) == ("sigmoid", 1e-3, 3.0, 5.0)


class TestKerasRenorm:
    """keras.layers.BatchNormalization(renorm=True), which ours meets where the two average alike.

    They differ in that Keras has averages for the correction apart from those for inference (equal when
    ``renorm_momentum`` is ``momentum``), starts its averaged deviation at sqrt(v) instead of sqrt(v + eps), leaves
    it there when ``moving_variance`` is assigned, bounds r by ``rmin`` (0) instead of 1/``rmax``, and has constant
    limits.
    """

    @staticmethod
    def pair(rmax=1.5, dmax=0.5):
        """Return both layers with equal settings and statistics."""
        clipping = {"rmax": rmax, "rmin": 1 / rmax, "dmax": dmax}
        theirs = keras.layers.BatchNormalization(
            momentum=0.9, renorm=True, renorm_clipping=clipping, renorm_momentum=0.9
        )
        ours = BatchRenormalization(momentum=0.9, r_max=rmax, d_max=dmax)
        for layer in (ours, theirs):
            layer.build((None, 4, 6))
        return ours, theirs

    @staticmethod
    def align(theirs):
        """Start the averaged deviations at sqrt(v + eps)."""
        for name in ("moving_stddev", "renorm_stddev"):
            getattr(theirs, name).assign(np.sqrt(theirs.moving_variance.numpy() + theirs.epsilon))

    @pytest.mark.parametrize("limits", [(1.0, 0.0), (1.5, 0.5), (100.0, 100.0)])
    def test_equal_when_the_deviations_start_alike(self, limits):
        """Outputs, inference and moving statistics agree over several steps."""
        ours, theirs = self.pair(*limits)
        self.align(theirs)
        for x in batches(5, (8, 4, 6)):
            np.testing.assert_allclose(ours(x, training=True), theirs(x, training=True), rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(ours.moving_mean, theirs.moving_mean, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(ours.moving_variance, theirs.moving_variance, rtol=1e-5)
            np.testing.assert_allclose(ours(x), theirs(x), rtol=1e-5, atol=1e-5)

    def test_a_pretrained_variance_is_kept(self):
        """One step moves an assigned moving variance by its share; Keras's forgets it."""
        ours, theirs = self.pair()
        for layer in (ours, theirs):
            layer.moving_variance.assign(np.full(6, 25.0))
            layer(batches(1, (8, 4, 6))[0], training=True)
        assert (ours.moving_variance.numpy() > 15).all()
        assert (theirs.moving_variance.numpy() < 2).all()
