"""What the command line says of Keras files that need code of the user's: Keras's reason, and our way out."""

import sys
import zipfile

import h5py
import keras
import numpy as np
import pytest
from click.testing import CliRunner
from keras import layers

from normswap.cli import main
from normswap.errors import InputError
from normswap.sources.keras.weights import load_weights
from normswap.sources.spec import FORMS, load_source

from ..helpers import exactly


def saved(layer, path):
    """Save a model with a layer under this name."""
    inputs = keras.Input((3,))
    keras.Model(inputs, layer(inputs)).save(path)
    return path


@pytest.mark.parametrize("suffix", ["keras", "h5"])
@pytest.mark.filterwarnings("ignore")
def test_a_lambda_names_the_way_to_trust_it(suffix, tmp_path):
    """A Lambda, which is code in the file, is refused with what to give instead, not with Keras's arguments alone."""
    path = saved(layers.Lambda(lambda x: 2 * x), tmp_path / f"m.{suffix}")
    with pytest.raises(InputError) as error:
        load_source(str(path))
    assert str(error.value).endswith(
        "; give file.py:callable in its place, a function that returns "
        f"keras.models.load_model('m.{suffix}', safe_mode=False), if you trust the file"
    )


@pytest.mark.filterwarnings("ignore")
def test_a_class_that_is_not_known_names_the_way_to_give_it(tmp_path):
    """A custom layer is refused with what to give instead, and without the pages of its configuration."""

    class Mine(layers.Layer):
        """A layer whose class no file can tell."""

        def call(self, inputs):
            """Return what is given."""
            return inputs

    path = saved(Mine(), tmp_path / "m.keras")
    message = (
        f"expected a Keras model in {path}, received a file Keras refuses: Could not locate class 'Mine'. Make sure "
        "custom classes and functions are decorated with `@keras.saving.register_keras_serializable()`. If they are "
        "already decorated, make sure they are all imported so that the decorator is run before trying to load them; "
        "give file.py:callable in its place, a function that returns keras.models.load_model('m.keras') and the file "
        "imports or defines the class"
    )
    with pytest.raises(InputError, match=exactly(message)):
        load_source(str(path))


def test_a_saved_model_is_told_from_a_typing_error(tmp_path):
    """A SavedModel folder is named as what it is, with the way out."""
    (tmp_path / "saved_model.pb").touch()
    message = (
        f"expected a model as {FORMS}, received the SavedModel {tmp_path}, a graph that has no layers any more; save "
        "the model that it was exported from as .keras"
    )
    with pytest.raises(InputError, match=exactly(message)):
        load_source(str(tmp_path))


@pytest.mark.parametrize("name", ["m.h5", "m.keras"])
def test_without_h5py(tmp_path, monkeypatch, name):
    """A package that is missing is told as that, not as a damaged file."""
    keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization()]).save(tmp_path / name)
    monkeypatch.setitem(sys.modules, "h5py", None)
    result = CliRunner().invoke(main, ["inspect", f"{tmp_path}/{name}"])

    message = f"error: {tmp_path}/{name} needs h5py: pip install 'normswap[keras]'\n"
    assert (result.exit_code, result.stderr) == (6, message)


class TestDamage:
    def test_a_truncated_archive(self, tmp_path):
        """It is no file that is not there, which is what Keras says."""
        path = saved(layers.Dense(2), tmp_path / "m.keras")
        path.write_bytes(path.read_bytes()[:-50])
        message = f"expected a Keras model in {path}, received a truncated archive, or a file of another kind"
        with pytest.raises(InputError, match=exactly(message)):
            load_source(str(path))

    def test_a_flipped_byte(self, tmp_path):
        """Keras reads weights out of the archive without a look at its checksums."""
        path = saved(dense := layers.Dense(2), tmp_path / "m.keras")
        content = bytearray(path.read_bytes())
        content[content.index(dense.kernel.numpy().tobytes()) + 2] ^= 1
        path.write_bytes(content)
        message = (
            f"expected a Keras model in {path}, received a damaged file: model.weights.h5 is not what its checksum "
            "says; get the file once more"
        )
        with pytest.raises(InputError, match=exactly(message)):
            load_source(str(path))
        with pytest.raises(InputError, match=exactly(message.replace("a Keras model", "weights for this model"))):
            load_weights(keras.Sequential([keras.Input((3,)), layers.Dense(2)]), path)

    def test_a_bomb(self, tmp_path):
        """What unpacks to far more than it is, is not unpacked."""
        path = tmp_path / "m.keras"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("model.weights.h5", "w") as file:
            for _ in range(600):
                file.write(bytes(1 << 20))
        message = (
            f"expected a Keras model in {path}, received an archive of 612 kB that unpacks to 629 MB; if it is what "
            "you want, pack it without compression"
        )
        with pytest.raises(InputError, match=exactly(message)):
            load_source(str(path))


def dense(*names, drop=False):
    """A network of layers of two outputs."""
    return keras.Sequential(
        [keras.Input((2,)), *[layers.Dropout(0.5)] * drop, *[layers.Dense(2, name=n) for n in names]]
    )


class Nested(layers.Layer):
    """A layer that holds its layers in lists of a list."""

    def __init__(self, count=2, **config):
        super().__init__(**config)
        self.parts = [[layers.Dense(2)] for _ in range(count)]

    def build(self, shape):
        """Build all of them."""
        for (part,) in self.parts:
            part.build(shape)

    def call(self, x):
        """Call one after the other."""
        for (part,) in self.parts:
            x = part(x)
        return x


class TestWeightsThatDoNotFit:
    """Of a file all that the network lacks is told, and all that it lacks itself, where Keras passes over it."""

    WAY = "  if the network is right without them, in code of your own load of the file what it needs"

    @pytest.mark.parametrize("name", ["w.keras", "w.weights.h5", "w.h5"])
    @pytest.mark.filterwarnings("ignore")
    def test_a_larger_network(self, tmp_path, name):
        """Its layers that are too many are named in their order, ten of them."""
        larger = dense("a", *(f"more{number}" for number in range(12)))
        (larger.save_weights if ".weights" in name else larger.save)(path := tmp_path / name)
        where = (lambda number: "") if name == "w.h5" else (lambda number: f" (layers/dense_{number + 1})")
        more = "".join(f"    more{number}{where(number)}\n" for number in range(10))
        message = f"expected weights that fit the model, received {path}:\n  unexpected (12):\n{more}    and 2 more\n"

        with pytest.raises(InputError, match=exactly(message + self.WAY)):
            load_weights(dense("a"), path)

    def test_a_larger_nested_network(self, tmp_path):
        """So are layers of models within, and of layers that hold them in lists."""

        def outer(*names, count=2):
            return keras.Sequential([keras.Input((2,)), dense(*names), Nested(count)])

        outer("a", "b", count=3).save_weights(path := tmp_path / "w.weights.h5")
        with pytest.raises(InputError) as error:
            load_weights(outer("a"), path)

        lines = str(error.value).splitlines()
        assert [line.rpartition(" ")[2] for line in lines[2:-1]] == [
            "(layers/nested/parts/container_2/dense)",
            "(layers/sequential/layers/dense_1)",
        ]
        assert lines[-1] == self.WAY

    def test_layers_in_lists_of_a_list(self, tmp_path):
        """Of those that a file lacks Keras only warns."""
        model = keras.Sequential([keras.Input((2,)), Nested(1)])
        model.save_weights(path := tmp_path / "w.weights.h5")
        with h5py.File(path, "r+") as file:
            del file["layers/nested/parts/container"]
        weights = "".join(f"\n    {variable.path}" for variable in model.weights)
        message = f"expected weights that fit the model, received {path}:\n  missing (2):{weights}"

        with (
            pytest.warns(UserWarning, match="Skipping nested container"),
            pytest.raises(InputError, match=exactly(message)),
        ):
            load_weights(model, path)

    @pytest.mark.parametrize("name", ["w.keras", "w.weights.h5", "w.h5"])
    @pytest.mark.filterwarnings("ignore")
    def test_what_is_no_layer(self, tmp_path, name):
        """The state of a training, of random numbers and of metrics, and layers without weights, may be more."""
        model = dense("a", drop=True)
        model.compile(keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam()), "mse", metrics=["accuracy"])
        model.fit(np.ones((2, 2)), np.ones((2, 2)), verbose=0)
        (model.save_weights if ".weights" in name else model.save)(path := tmp_path / name)
        if ".weights" in name:
            with h5py.File(path, "r+") as file:  # as other versions of Keras write
                file["layers/dropout/seed_generator/vars/0"] = np.zeros(2, np.uint32)
                file["metrics/mean/vars/0"] = np.zeros(())
        load_weights(plain := dense("a"), path)

        np.testing.assert_array_equal(plain.get_layer("a").kernel, model.get_layer("a").kernel)

    def test_layers_where_keras_2_13_wrote_them(self, tmp_path):
        """They are found, and are not too many."""
        dense("a").save_weights(path := tmp_path / "w.weights.h5")
        with h5py.File(path, "r+") as file:
            file.move("layers", "_layer_checkpoint_dependencies")
        load_weights(dense("a"), path)
