"""What the command line says of Keras files that need code of the user's: Keras's reason, and our way out."""

import sys
import zipfile

import keras
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
