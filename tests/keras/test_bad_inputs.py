"""The bad inputs of `docs/bad_inputs.md` that a Keras model is given: what is said, with which code, what is left."""

import json
import shutil
import zipfile
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
from keras import layers

from ..bad_inputs import cases, hold

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # as Python does outside of tests

CASES = cases("keras")
NETWORKS = """
import keras
import numpy as np
from keras import layers


def build(shape=(8, 8, 3), **options):
    keras.utils.set_random_seed(0)
    norm = layers.BatchNormalization(name="bn", **options)
    body = [layers.Conv2D(4, 3, name="conv"), norm, layers.GlobalAveragePooling2D(), layers.Dense(2, name="head")]
    return keras.Sequential([*([keras.Input(shape)] if shape else []), *body], name="net")


def changed(layer, name, value, count=1):
    model = build()
    variable = getattr(model.get_layer(layer), name)
    values = variable.numpy()
    values.reshape(-1)[:count] = value
    variable.assign(values)
    return model


def nan_variance():
    return changed("bn", "moving_variance", np.nan, 2)


def infinite_kernel():
    return changed("conv", "kernel", np.inf)


def negative():
    return changed("bn", "moving_variance", -1)


def constant():
    return changed("bn", "moving_variance", 0)


def muted():
    return changed("bn", "gamma", 0, 4)


def plain():
    return build(center=False, scale=False)


def unbuilt():
    return build(None)


def no_norm():
    return keras.Sequential([keras.Input((8, 8, 3)), layers.Conv2D(4, 3)])


def pooled():
    body = [layers.GlobalAveragePooling2D(), layers.BatchNormalization(name="bn")]
    return keras.Sequential([keras.Input((8, 8, 3)), *body])


def half():
    keras.config.set_dtype_policy("float16")
    try:
        return build()
    finally:
        keras.config.set_dtype_policy("float32")
"""


def network(name="build"):
    """What one of the networks is."""
    space = {"__name__": "networks"}
    exec(NETWORKS, space)
    return space[name]()


def saved(path, share=1.0, model=network):
    """A maker of a model's file, or a part of one."""

    def make():
        model().save(path)
        data = Path(path).read_bytes()
        Path(path).write_bytes(data[: int(len(data) * share)])

    return make


def written(content, path):
    """A maker of a file of these bytes."""
    return lambda: Path(path).write_bytes(content)


def renamed(path, name):
    """A maker of a model's file that is called as another kind."""

    def make():
        saved(path)()
        Path(path).rename(name)

    return make


def _flipped():
    model = network()
    model.save("m.keras")
    content = bytearray(Path("m.keras").read_bytes())
    content[content.index(model.get_layer("conv").kernel.numpy().tobytes())] ^= 1
    Path("m.keras").write_bytes(content)


def repacked(member, change):
    """A maker of a model's archive in which a member was changed in place."""

    def make():
        network().save("whole.keras")
        with zipfile.ZipFile("whole.keras") as archive, zipfile.ZipFile("m.keras", "w") as file:
            for name in archive.namelist():
                Path("part").write_bytes(archive.read(name))
                if name == member:
                    change(Path("part"))
                file.write("part", name)

    return make


def configured(change):
    """A maker of a model with another configuration of its second layer."""

    def edit(path):
        config = json.loads(path.read_text())
        change(config["config"]["layers"])
        path.write_text(json.dumps(config))

    return repacked("config.json", edit)


def linked(link):
    """A maker of a model whose first weight is something else."""

    def edit(path):
        with h5py.File(path, "r+") as file:
            group = file["layers/conv2d/vars"]
            del group["0"]
            link(group)

    return repacked("model.weights.h5", edit)


def _virtual(group):
    layout = h5py.VirtualLayout((3, 3, 3, 4), np.float32)
    layout[...] = h5py.VirtualSource("other.h5", "w", (3, 3, 3, 4))
    group.create_virtual_dataset("0", layout)


def _other():
    body = [layers.Conv2D(5, 3, name="conv"), layers.BatchNormalization(name="bn"), layers.GlobalAveragePooling2D()]
    return keras.Sequential([keras.Input((8, 8, 3)), *body, layers.Dense(2, name="head"), layers.Dense(2, name="more")])


def _larger():
    model = network()
    return keras.Model(model.inputs, layers.Dense(2, name="more")(model.outputs[0]))


def _lambda():
    return keras.Sequential([keras.Input((3,)), layers.Lambda(lambda x: 2 * x, name="double")])


def _unknown():
    class Mine(layers.Layer):
        def call(self, inputs):
            return inputs

    return keras.Sequential([keras.Input((3,)), Mine()])


def _declared():
    with h5py.File("m.h5", "w") as file:
        file.create_dataset("zeros", (2**27,), np.float32, chunks=(2**20,), compression="gzip", fillvalue=0)


def _bomb():
    with (
        zipfile.ZipFile("m.keras", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("model.weights.h5", "w") as file,
    ):
        for _ in range(600):
            file.write(bytes(1 << 20))


def _leaving():
    saved("m.keras")()
    with zipfile.ZipFile("m.keras", "a") as archive:
        archive.writestr("../../evil.py", "")


def _saved_model():
    Path("saved").mkdir()
    Path("saved/saved_model.pb").touch()


def _runs(list_of_layers):
    list_of_layers[2] |= {"module": "os", "class_name": "system", "config": {"command": "touch executed"}}


def _turns_off(list_of_layers):
    name = "enable_unsafe_deserialization"
    list_of_layers[2] |= {"module": "keras.config", "class_name": name, "config": {}}


def _nothing():
    pass


MAKE = {
    "an archive that is called HDF5": renamed("m.keras", "m.h5"),
    "HDF5 that is called an archive": renamed("m.h5", "m.keras"),
    "a git-LFS pointer": written(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "m.keras"),
    "a web page": written(b"<html>\n<title>404</title>", "m.h5"),
    "a flipped bit": _flipped,
    "a moving variance that is not finite": _nothing,
    "a kernel that is not finite": _nothing,
    "a negative moving variance": _nothing,
    "a moving variance of 0": _nothing,
    "gammas of 0": _nothing,
    "neither gamma nor beta": _nothing,
    "a model that is not built": _nothing,
    "weights of another network": saved("w.keras", model=_other),
    "weights of a larger network": saved("w.keras", model=_larger),
    "weights of another network in HDF5 of Keras 2": saved("w.h5", model=_other),
    "no BatchNorm": _nothing,
    "groups that do not divide": _nothing,
    "groups of one value": _nothing,
    "a model that unpacks to far more": _bomb,
    "HDF5 that declares far more": _declared,
    "a truncated model": saved("m.keras", 0.5),
    "an empty model": saved("m.keras", 0.0),
    "truncated weights": saved("w.keras", 0.5),
    "a truncated model in HDF5": saved("m.h5", 0.5),
    "a Lambda": saved("m.keras", model=_lambda),
    "a Lambda in HDF5": saved("m.h5", model=_lambda),
    "a configuration that names os.system": configured(_runs),
    "a configuration that turns safe mode off": configured(_turns_off),
    "an external link": linked(lambda group: group.__setitem__("0", h5py.ExternalLink("other.h5", "/w"))),
    "a soft link": linked(lambda group: group.__setitem__("0", h5py.SoftLink("/layers/dense/vars/0"))),
    "a virtual dataset": linked(_virtual),
    "a name that leads out of a model": _leaving,
    "an unknown layer": saved("m.keras", model=_unknown),
    "a SavedModel": _saved_model,
    "float16": _nothing,
}


@pytest.fixture
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NETWORKS)
    yield
    shutil.rmtree(tmp_path)


@pytest.mark.usefixtures("_folder")
@pytest.mark.parametrize("name", CASES)
def test_bad_input(name):
    """What the page says is what is said; nothing of the file is run, and nothing is left of what fails."""
    hold(CASES[name], MAKE[CASES[name].title])

    assert not Path("executed").exists()


def test_every_file_is_asked_for():
    """What is made here is on the page."""
    assert {case.title for case in CASES.values()} == MAKE.keys()
