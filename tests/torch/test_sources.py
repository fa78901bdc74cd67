"""Where models and data come from and bundles go: what is read, and what is refused unread."""

import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import nn

import normswap
from normswap.errors import InputError, MissingDependencyError, UnsupportedError
from normswap.patchers import bundle
from normswap.sources.data import Preprocessing, open_data
from normswap.sources.models import absolute_spec, load_model, preprocessing_of, relative_spec
from normswap.sources.weights import load_state_dict, read_state_dict

CODE = """
from helper import WIDTH
from torch import nn

def build():
    model = nn.Sequential(nn.Conv2d(3, WIDTH, 3), nn.BatchNorm2d(WIDTH))
    model.pretrained_cfg = {"input_size": (3, 8, 8), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.2)}
    return model

number = 3
"""


@pytest.fixture
def network(tmp_path):
    """A Python file with a model, and one beside it that it imports."""
    (tmp_path / "network.py").write_text(CODE)
    (tmp_path / "helper.py").write_text("WIDTH = 4\n")
    return f"{tmp_path}/network.py:build"


class TestModels:
    def test_a_file(self, network):
        """A callable in a file is run with the file's folder importable."""
        assert type(load_model(network)[1]) is nn.BatchNorm2d

    def test_a_module(self):
        """A callable in an importable package is run."""
        assert type(load_model("torch.nn:Identity")) is nn.Identity

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ("resnet18", "expected a model as timm:NAME, .*, received model=resnet18"),
            ("no.such.module:f", "expected a module to import or one of .*, received model=no.such.module:f"),
            ("os:nothing", "expected a callable nothing in os, received None"),
            ("gone.py:f", "expected a file at gone.py, received nothing there"),
            ("gone.keras", "expected a file at gone.keras, received nothing there"),
        ],
    )
    def test_what_is_no_model(self, spec, message):
        """Each kind of mistake is told apart."""
        with pytest.raises(InputError, match=f"^{message}"):
            load_model(spec)

    def test_code_that_fails(self, tmp_path):
        """An error in the user's code is reported as theirs."""
        (tmp_path / "bad.py").write_text("1 / 0\n")
        with pytest.raises(InputError, match="received code that fails: ZeroDivisionError"):
            load_model(f"{tmp_path}/bad.py:f")

    def test_something_that_is_not_a_model(self, network):
        """A name that is no callable, and a callable that returns no model, are refused."""
        with pytest.raises(InputError, match="^expected a callable number in .*, received 3$"):
            load_model(network.replace("build", "number"))
        with pytest.raises(InputError, match="^expected a torch.nn.Module or a Keras 3 model, received builtins.list$"):
            load_model("builtins:list")

    def test_a_zoo_that_is_not_installed(self, monkeypatch):
        """A missing package is named with how to install it."""
        monkeypatch.setitem(__import__("sys").modules, "timm", None)
        with pytest.raises(MissingDependencyError, match="^a timm: model needs timm: pip install timm"):
            load_model("timm:resnet18")

    def test_preprocessing(self, network):
        """A model's pretrained_cfg tells its input; arguments come first; without either it is unknown."""
        model = load_model(network)
        known = preprocessing_of(model)

        assert known == Preprocessing((3, 8, 8), "channels_first", (0.5, 0.4, 0.3), (0.2, 0.2, 0.2))
        assert preprocessing_of(model, input_shape=(3, 4, 4), mean=(0.0,)).shape == (3, 4, 4)
        assert preprocessing_of(nn.Linear(2, 2)) is None

    def test_specs_move_with_a_bundle(self, tmp_path):
        """A file's path is kept relative to the bundle, other names as they are."""
        spec = f"{tmp_path}/code/net.py:build"

        assert relative_spec(spec, tmp_path / "bundles" / "b") == "../../code/net.py:build"
        assert absolute_spec("../../code/net.py:build", tmp_path / "bundles" / "b") == spec
        assert relative_spec("timm:resnet18", tmp_path) == absolute_spec("timm:resnet18", tmp_path) == "timm:resnet18"


class Evil:
    """Runs a command when unpickled."""

    def __reduce__(self):
        return os.system, (f"touch {Evil.mark}",)


class TestWeights:
    STATE = {"weight": torch.ones(2, 2), "bias": torch.zeros(2)}  # noqa: RUF012

    @pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".th", ".bin"])
    def test_plain_weights(self, tmp_path, suffix):
        """Both kinds of file give the tensors by name."""
        path = tmp_path / f"w{suffix}"
        (safetensors.torch.save_file if suffix == ".safetensors" else torch.save)(self.STATE, path)

        assert read_state_dict(path).keys() == self.STATE.keys()

    @pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict", "model"])
    @pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
    def test_wrappers_are_taken_off(self, tmp_path, wrapper, prefix):
        """Training scripts wrap the weights; parallel and compiled models prefix the names."""
        torch.save({wrapper: {prefix + k: v for k, v in self.STATE.items()}, "epoch": 3}, tmp_path / "w.pt")

        assert read_state_dict(tmp_path / "w.pt").keys() == self.STATE.keys()

    @pytest.mark.parametrize("name", ["w.pt", "w.bin"])
    @pytest.mark.parametrize("raw", [False, True])
    def test_a_pickle_that_runs_code_is_refused(self, tmp_path, name, raw):
        """Nothing in the file is run, whether torch or pickle wrote it."""
        Evil.mark = tmp_path / "executed"
        path = tmp_path / name
        content = {"weight": Evil()}
        path.write_bytes(pickle.dumps(content)) if raw else torch.save(content, path)
        with pytest.raises(InputError, match="^expected (plain )?weights in .*, received"):
            read_state_dict(path)

        assert not Evil.mark.exists()

    def test_a_pickled_module_is_refused(self, tmp_path):
        """A whole module is code, not weights."""
        torch.save(nn.Linear(2, 2), tmp_path / "w.pt")
        with pytest.raises(InputError, match="nothing was run. Save model.state_dict\\(\\) instead"):
            read_state_dict(tmp_path / "w.pt")

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    def test_torchscript_is_named(self, tmp_path):
        """A TorchScript archive is told apart."""
        torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "w.pt")
        with pytest.raises(UnsupportedError, match="received a TorchScript archive; save the original module's state"):
            read_state_dict(tmp_path / "w.pt")

    @pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
    def test_a_truncated_file(self, tmp_path, suffix):
        """Half a file is damaged, not malicious."""
        path = tmp_path / f"w{suffix}"
        (safetensors.torch.save_file if suffix == ".safetensors" else torch.save)(self.STATE, path)
        path.write_bytes(path.read_bytes()[:-60])
        with pytest.raises(InputError, match="received a damaged file: "):
            read_state_dict(path)

    def test_other_content(self, tmp_path):
        """Plain data that is no state dict is named, and an unknown ending is refused."""
        torch.save([1, 2], tmp_path / "w.pt")
        with pytest.raises(
            InputError, match="^expected a state dict of tensors in .*, received a list with other cont"
        ):
            read_state_dict(tmp_path / "w.pt")
        (tmp_path / "w.npy").write_bytes(b"x")
        with pytest.raises(
            InputError, match="^expected weights in a file ending in .safetensors, .pt, .pth, .th, .bin"
        ):
            read_state_dict(tmp_path / "w.npy")

    def test_weights_that_do_not_fit(self):
        """At most ten names are listed of what is missing, unexpected or of another shape."""
        model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(8)])
        state = {**{f"other.{k}": torch.ones(1) for k in range(2)}, "0.weight": torch.ones(3, 2)}
        names = [f"{k}.{part}" for k in range(8) for part in ("weight", "bias")][1:]
        message = (
            "expected weights that fit the model, received w.pt:\n  missing (15):\n    "
            + "\n    ".join(names[:10])
            + "\n    and 5 more\n  unexpected (2):\n    other.0\n    other.1\n"
            "  other shape (1):\n    0.weight: (2, 2) in the model, (3, 2) in the file"
        )
        with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
            load_state_dict(model, state, "w.pt")

    def test_old_checkpoints(self):
        """A checkpoint from before num_batches_tracked still loads."""
        model = nn.BatchNorm2d(2)
        state = {k: v for k, v in model.state_dict().items() if "tracked" not in k}
        load_state_dict(model, state, "old.pt")


class TestData:
    PREPROCESSING = Preprocessing((3, 4, 6), "channels_first", (0.5,), (0.25,))

    @pytest.fixture
    def folder(self, tmp_path):
        """Two classes of images, of several sizes and colour modes."""
        for label, (name, colour) in enumerate({"a": 0, "b": 255}.items()):
            (tmp_path / name).mkdir()
            Image.new("RGB", (6, 4), (colour,) * 3).save(tmp_path / name / "0.png")
            Image.new("L", (30, 20 + label), colour).save(tmp_path / name / "1.png")
        (tmp_path / "a" / "notes.txt").write_text("not an image")
        return tmp_path

    def test_a_folder(self, folder):
        """Classes are numbered by name; images are resized, converted and scaled."""
        data = open_data(str(folder), self.PREPROCESSING)
        x, y = data.batch(range(4))

        assert (data.classes, y.tolist(), x.shape, x.dtype) == (["a", "b"], [0, 0, 1, 1], (4, 3, 4, 6), np.float32)
        assert x[:2].max() == x[:2].min() == -2
        assert x[2:].max() == x[2:].min() == 2

    @pytest.mark.parametrize("dtype", [np.uint8, np.float32])
    def test_an_npz(self, tmp_path, dtype):
        """Arrays of bytes or of shares of one give the same images."""
        images = np.full((3, 4, 6, 3), 255 if dtype == np.uint8 else 1, dtype)
        np.savez(tmp_path / "d.npz", x=images, y=np.arange(3))
        x, y = open_data(str(tmp_path / "d.npz"), self.PREPROCESSING).batch([2, 0])

        assert (x.shape, float(x.max()), y.tolist()) == ((2, 3, 4, 6), 2.0, [2, 0])

    def test_channels_last_and_grey(self, tmp_path):
        """Keras's layout, and images without a channel axis."""
        np.savez(tmp_path / "d.npz", x=np.zeros((3, 4, 6), np.uint8), y=np.zeros(3, int))
        data = open_data(str(tmp_path / "d.npz"), Preprocessing((4, 6, 1), "channels_last"))

        assert [x.shape for x, _ in data.batches(2)] == [(2, 4, 6, 1), (1, 4, 6, 1)]
        assert sorted(data.sample(3).tolist()) == [0, 1, 2]

    @pytest.mark.parametrize(
        ("arrays", "message"),
        [
            ({"x": np.zeros((2, 4, 6, 3))}, "expected arrays `x` and `y` in .*, received: "),
            ({"x": np.zeros((2, 9, 9, 3)), "y": np.zeros(2, int)}, r"expected `x` of shape \(N, 4, 6, 3\), received"),
            ({"x": np.zeros((2, 4, 6, 3), int), "y": np.zeros(2, int)}, "expected `x` of uint8 or floating-point"),
            ({"x": np.zeros((2, 4, 6, 3)), "y": np.zeros(2)}, "expected `y` of 2 non-negative integers, received"),
            ({"x": np.zeros((2, 4, 6, 3)), "y": np.array([0, -1])}, "expected `y` of 2 non-negative integers"),
            ({"x": np.array([{}, {}]), "y": np.zeros(2, int)}, "expected arrays `x` and `y` in .*, received: Object"),
        ],
    )
    def test_arrays_that_do_not_fit(self, tmp_path, arrays, message):
        """Shape, dtype and labels are checked before anything is computed; no pickle is read."""
        np.savez(tmp_path / "d.npz", **arrays)
        with pytest.raises(InputError, match=f"^{message}"):
            open_data(str(tmp_path / "d.npz"), self.PREPROCESSING)

    def test_folders_that_do_not_fit(self, folder):
        """An empty class, a single class, and a file that is no image are named."""
        (folder / "c").mkdir()
        with pytest.raises(InputError, match="^expected images in every class folder, received none in .*c$"):
            open_data(str(folder), self.PREPROCESSING)
        (folder / "c" / "x.png").write_bytes(b"no image")
        data = open_data(str(folder), self.PREPROCESSING)
        with pytest.raises(InputError, match="^expected an image in .*x.png, received: "):
            data.batch([4])
        with pytest.raises(InputError, match="^expected at least two class folders in .*, received 0$"):
            open_data(str(folder / "c"), self.PREPROCESSING)
        with pytest.raises(
            InputError, match="^expected a folder of class folders or an .npz file, received data=gone$"
        ):
            open_data("gone", self.PREPROCESSING)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (((3, 4), "channels_first"), "expected an input shape of three sizes for images, received shape=(3, 4)"),
            (((3, 4, 4), "channels_first", (0.1, 0.2)), "expected 1 or 3 values, received mean=(0.1, 0.2)"),
            (((3, 4, 4), "channels_first", (0.0,), (0.0,)), "expected positive values, received std=(0.0,)"),
        ],
    )
    def test_preprocessing_that_cannot_be(self, arguments, message):
        """Wrong shapes and scales are refused by name."""
        with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
            Preprocessing(*arguments)


class TestBundle:
    @pytest.mark.parametrize("target", ["sn", "brn", "gn", "in"])
    def test_round_trip(self, network, tmp_path, target):
        """A loaded bundle computes what was saved, and gives the original back."""
        model, x = load_model(network).eval(), torch.randn(2, 3, 8, 8)
        nn.init.uniform_(model[1].running_var, 0.5, 2)
        original = load_model(network)
        original.load_state_dict(model.state_dict())
        report = normswap.patch(model, target, example=x)
        bundle.save(report, tmp_path / "b", source=network, original=original, preprocessing=preprocessing_of(model))
        found = bundle.read(tmp_path / "b")

        assert torch.equal(normswap.load(tmp_path / "b")(x), model(x))
        assert torch.equal(found.original()(x), original.eval()(x))
        assert found.recipe == report.recipe
        assert found.preprocessing.mean == (0.5, 0.4, 0.3)

    def test_a_bundle_moves_with_its_code(self, network, tmp_path):
        """Moved together, bundle and code still find each other."""
        bundle.save(normswap.patch(load_model(network), "gn"), tmp_path / "b", source=network)
        (tmp_path / "elsewhere").mkdir()
        for name in ("b", "network.py", "helper.py"):
            (tmp_path / name).rename(tmp_path / "elsewhere" / name)

        assert isinstance(normswap.load(tmp_path / "elsewhere" / "b")[1], nn.GroupNorm)

    def test_without_a_source(self, network, tmp_path):
        """A bundle that does not know its architecture loads into a model that is given."""
        normswap.save(normswap.patch(load_model(network), "gn"), tmp_path / "b")
        with pytest.raises(InputError, match="pass a fresh model to load\\(directory, model=...\\)$"):
            normswap.load(tmp_path / "b")
        with pytest.raises(InputError, match="^expected a bundle saved with its original, received"):
            bundle.read(tmp_path / "b", model=load_model(network)).original()

        assert isinstance(normswap.load(tmp_path / "b", model=load_model(network))[1], nn.GroupNorm)

    def test_a_changed_file(self, network, tmp_path):
        """A flipped byte in the weights is found before they are used."""
        bundle.save(normswap.patch(load_model(network), "gn"), tmp_path / "b", source=network)
        path = tmp_path / "b" / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        with pytest.raises(
            InputError, match="model.safetensors as it was saved, received a file that is missing or has"
        ):
            normswap.load(tmp_path / "b")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (None, "expected a bundle in .*, received a folder without one: "),
            ("{}", "expected a bundle in .*, received a folder without one: 'schema_version'"),
            ("[", "expected a bundle in "),
            ('{"schema_version": 9}', "expected a bundle of schema_version=1, received schema_version=9"),
            ('{"schema_version": 1, "framework": "x"}', "expected a framework out of torch, keras, received 'x'"),
        ],
    )
    def test_what_is_no_bundle(self, tmp_path, text, message):
        """A folder without a whole manifest is refused."""
        if text is not None:
            Path(tmp_path / "normswap.json").write_text(text)
        with pytest.raises(InputError, match=f"^{message}"):
            normswap.load(tmp_path)
