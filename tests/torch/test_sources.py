"""Where models and data come from and bundles go: what is read, and what is refused unread."""

import importlib
import inspect
import os
import pickle
import sys
from pathlib import Path
from types import ModuleType

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from torch import nn

import normswap
from normswap.bundles import bundle
from normswap.bundles.source import load_model
from normswap.cli import main
from normswap.data.preprocessing import Preprocessing, preprocessing_of
from normswap.errors import InputError, MissingDependencyError, UnsupportedError
from normswap.sources.spec import absolute_spec, load_source, relative_spec, runs_code
from normswap.sources.torch.state_dict import load_state_dict, read_state_dict, write_state_dict

from ..helpers import exactly
from .models import trained_

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


@pytest.mark.parametrize(
    ("spec", "runs"),
    [
        ("timm:resnet18", False),
        ("timm:resnet50.a1_in1k", False),
        ("torchvision:resnet18", False),
        ("keras:ResNet50", False),
        ("normswap.models.torch:resnet18_v1", False),
        ("normswap.models.torch:partial", True),
        ("normswap.models:torch", True),
        ("normswap.cli:main", True),
        ("timm:hf-hub:stranger/x", True),
        ("timm:stranger/x", True),
        ("timm:resnet18\n", True),
        ("torchvision:../x", True),
        ("net.py:build", True),
        ("package.module:build", True),
        ("os:abort", True),
        ("net.keras", False),
        ("net.pt2", False),
        ("resnet18", False),
        (":build", False),
    ],
)
def test_which_sources_are_code(spec, runs):
    """A zoo's plain names, networks of this library's and files are none; what names nothing is refused elsewhere."""
    assert runs_code(spec) is runs


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
            (Path("gone.keras"), "expected a file at gone.keras, received nothing there"),
            (None, "expected a model as timm:NAME, .*, received model=None$"),
            (["a.keras"], r"expected a model as timm:NAME, .*, received model=\['a.keras'\]$"),
        ],
    )
    def test_what_is_no_model(self, spec, message):
        """Each kind of mistake is told apart."""
        with pytest.raises(InputError, match=f"^{message}"):
            load_model(spec)

    def test_code_that_fails(self, tmp_path):
        """An error in the user's code is reported as theirs."""
        (tmp_path / "bad.py").write_text("1 / 0\n")
        message = (
            f"expected Python code in {tmp_path}/bad.py, received code that fails: ZeroDivisionError: division by "
        )
        with pytest.raises(InputError, match=exactly(f"{message}zero")):
            load_model(f"{tmp_path}/bad.py:f")

    @pytest.mark.parametrize("where", ["file", "module"])
    @pytest.mark.parametrize(
        ("raised", "told"),
        [
            ("ValueError('no weights\\nat all')", "ValueError: no weights"),
            ("FileNotFoundError(2, 'gone', 'net.pth')", "FileNotFoundError: [Errno 2] gone: 'net.pth'"),
            ("SystemExit(0)", "SystemExit: 0"),
            ("SystemExit()", "SystemExit"),
            ("__import__('asyncio').CancelledError", "CancelledError"),
            ("__import__('click').Abort", "Abort"),
        ],
    )
    def test_a_callable_that_raises(self, tmp_path, monkeypatch, where, raised, told):
        """It is named, with the kind of its error and its first line; nothing it raises ends us without a word."""
        name = f"raising_{abs(hash(raised))}"
        (tmp_path / f"{name}.py").write_text(f"def build():\n    raise {raised}\n")
        monkeypatch.syspath_prepend(tmp_path)
        location = name if where == "module" else f"{tmp_path}/{name}.py"

        with pytest.raises(InputError, match=exactly(f"expected a model from build in {location}, received {told}")):
            load_model(f"{location}:build")

    @pytest.mark.parametrize("where", ["file", "module"])
    def test_code_that_ends_the_process(self, tmp_path, monkeypatch, where):
        """A script whose work is not in a function is told as one that fails."""
        (tmp_path / f"ending_{where}.py").write_text("import sys\n\nsys.exit('done')\n")
        monkeypatch.syspath_prepend(tmp_path)
        location = f"ending_{where}" if where == "module" else f"{tmp_path}/ending_{where}.py"
        message = f"expected Python code in {location}, received code that fails: SystemExit: done"

        with pytest.raises(InputError, match=exactly(message)):
            load_model(f"{location}:build")

    def test_code_that_is_stopped(self, tmp_path):
        """Ctrl-C is the user's."""
        (tmp_path / "slow.py").write_text("def build():\n    raise KeyboardInterrupt\n")
        with pytest.raises(KeyboardInterrupt):
            load_model(f"{tmp_path}/slow.py:build")

    def test_code_that_is_refused_by_us(self, tmp_path):
        """An error of ours in it says what it says."""
        code = "import normswap\n\ndef build():\n    return normswap.load('gone')\n"
        (tmp_path / "loads.py").write_text(code)
        with pytest.raises(InputError, match="^expected a bundle in gone, received no folder; make one with"):
            load_model(f"{tmp_path}/loads.py:build")

    @pytest.mark.parametrize(
        ("package", "told"),
        [
            ("torch", "pip install 'normswap[torch]'"),
            ("h5py", "pip install 'normswap[keras]'"),
            ("no_such_library.nn", None),
        ],
    )
    @pytest.mark.parametrize("late", [False, True])
    def test_code_that_imports_what_is_not_installed(self, tmp_path, monkeypatch, package, told, late):
        """The package is named, and how to install what is ours to know: it is no fault of the code."""
        if told is not None:
            monkeypatch.setitem(sys.modules, package, None)
        line = f"import {package}"
        (tmp_path / "net.py").write_text(f"def build():\n    {line}\n" if late else f"{line}\n")
        top = package.partition(".")[0]
        needs = f"{tmp_path}/net.py needs {top}"
        message = f"{needs}: {told}" if told else f"{needs}, which is not installed; install it"

        with pytest.raises(MissingDependencyError, match=exactly(message)):
            load_model(f"{tmp_path}/net.py:build")
        result = CliRunner().invoke(main, ["inspect", f"{tmp_path}/net.py:build"])
        assert (result.exit_code, result.stderr) == (6, f"error: {message}\n")

    def test_the_same_model_again(self, tmp_path, monkeypatch):
        """A callable that returns what it returned before is refused: that may be patched or trained by now."""
        (tmp_path / "holding.py").write_text("from torch import nn\n\nMODEL = nn.ReLU()\n\ndef same(): return MODEL\n")
        monkeypatch.syspath_prepend(tmp_path)
        load_model("holding:same")
        message = (
            "expected a source that builds a model each time it is called, received holding:same, which returns the "
            "same one again; have it build the model, or return a copy of it"
        )
        with pytest.raises(UnsupportedError, match=exactly(message)):
            load_model("holding:same")

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

    @pytest.mark.parametrize(("pretrained", "given"), [(True, {"weights": "DEFAULT"}), (False, {"weights": None})])
    @pytest.mark.parametrize("detector", [False, True])
    def test_a_zoo_whose_backbones_have_weights(self, monkeypatch, pretrained, given, detector):
        """An architecture alone is built without the weights that torchvision has for a detector's backbone."""
        asked = {}

        def plain(*, weights=None):
            asked.update(weights=weights)
            return nn.ReLU()

        def with_backbone(*, weights=None, weights_backbone="IMAGENET1K_V1"):
            asked.update(weights=weights, weights_backbone=weights_backbone)
            return nn.ReLU()

        built = with_backbone if detector else plain
        models = ModuleType("torchvision.models")
        models.get_model_builder = lambda name: built
        models.get_model = lambda name, **options: built(**options)
        monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
        monkeypatch.setitem(sys.modules, "torchvision.models", models)
        load_source("torchvision:net", pretrained=pretrained)

        assert asked == given | ({"weights_backbone": "IMAGENET1K_V1" if pretrained else None} if detector else {})

    def test_preprocessing(self, network):
        """A model's pretrained_cfg tells its input; arguments come first; without either it is unknown."""
        model = load_model(network)
        known = preprocessing_of(model)

        assert known == Preprocessing((3, 8, 8), "channels_first", (0.5, 0.4, 0.3), (0.2, 0.2, 0.2))
        assert preprocessing_of(model, input_shape=(3, 4, 4), mean=(0.0,)).shape == (3, 4, 4)
        assert preprocessing_of(nn.Linear(2, 2)) is None

    def test_preprocessing_of_a_timm_model(self, network):
        """How timm resizes and crops what it evaluates a model on goes with mean and std."""
        model = load_model(network)
        model.pretrained_cfg |= {"interpolation": "bicubic", "crop_pct": 0.875, "crop_mode": "squash"}
        known = preprocessing_of(model)

        assert (known.interpolation, known.crop, known.crop_mode) == ("bicubic", 0.875, "squash")

    def test_specs_move_with_a_bundle(self, tmp_path):
        """A file's path is kept relative to the bundle, other names as they are."""
        spec = f"{tmp_path}/code/net.py:build"

        assert relative_spec(spec, tmp_path / "bundles" / "b") == "../../code/net.py:build"
        assert absolute_spec("../../code/net.py:build", tmp_path / "bundles" / "b") == spec
        assert relative_spec("timm:resnet18", tmp_path) == absolute_spec("timm:resnet18", tmp_path) == "timm:resnet18"


PARTS = """
from helper import WIDTH, Block
from parts.deep import Deep
from torch import nn

class Net(nn.Sequential):
    class Inner(nn.Identity):
        pass

def build():
    from lazy import Last
    return Net(nn.BatchNorm2d(WIDTH), Block(), Deep(), Net.Inner(), Last()).eval()
"""
OTHER = "from torch import nn\n\nWIDTH = {}\n\nclass {}(nn.Identity):\n    pass\n"
DEEP = "from .wide import WIDTH, Wide\n\nclass Deep(Wide):\n    width = WIDTH\n"


class TestFilesOfOneName:
    """Files of several folders, each with its own modules beside it, of the same names."""

    @pytest.fixture
    def folders(self, tmp_path):
        """Two folders with such files, whose widths are 2 and 5."""
        for name, width in (("a", 2), ("b", 5)):
            (folder := tmp_path / name).joinpath("parts").mkdir(parents=True)
            (folder / "network.py").write_text(PARTS)
            (folder / "helper.py").write_text(OTHER.format(width, "Block"))
            (folder / "lazy.py").write_text(OTHER.format(width, "Last"))
            (folder / "parts" / "__init__.py").write_text("")
            (folder / "parts" / "wide.py").write_text(OTHER.format(width, "Wide"))
            (folder / "parts" / "deep.py").write_text(DEEP)
        return [tmp_path / name for name in "ab"]

    @pytest.fixture(autouse=True)
    def _forgotten(self, monkeypatch):
        """Leave no module of these tests to others, and none of theirs to these."""
        for name in {"network", "helper", "lazy"} & sys.modules.keys():
            monkeypatch.delitem(sys.modules, name)
        before = set(sys.modules)
        yield
        for name in set(sys.modules) - before:
            del sys.modules[name]

    def test_each_has_its_own_modules(self, folders):
        """Those imported by the file, by its callable and by a package beside it, whichever comes first and again."""
        path = [*sys.path]
        for number in (0, 1, 0, 1):
            model = load_model(f"{folders[number]}/network.py:build")

            assert (model[0].num_features, model[2].width) == ((2, 2), (5, 5))[number]
            assert [inspect.getfile(type(layer)) for layer in model[1:]] == [
                str(folders[number] / name) for name in ("helper.py", "parts/deep.py", "network.py", "lazy.py")
            ]
        assert sys.path == path

    def test_their_classes_are_pickled(self, folders):
        """Each model comes back as what it was."""
        models = [load_model(f"{folder}/network.py:build") for folder in folders]
        for model in models:
            found = pickle.loads(pickle.dumps(model))

            assert [type(layer) for layer in (found, *found)] == [type(layer) for layer in (model, *model)]

    def test_the_names_of_who_was_first(self, folders, monkeypatch):
        """The modules of a program that runs stay what they are."""
        monkeypatch.syspath_prepend(folders[0])
        helper = importlib.import_module("helper")
        model = load_model(f"{folders[1]}/network.py:build")

        assert model[0].num_features == 5
        assert importlib.import_module("helper") is helper
        assert type(helper.Block()).__module__ == "helper"


class Evil:
    """Runs a command when unpickled."""

    def __reduce__(self):
        return os.system, (f"touch {Evil.mark}",)


META = "weight", "bias", "running_mean", "running_var", "num_batches_tracked"


class TestWeights:
    @pytest.mark.parametrize(
        ("build", "error", "message", "names"),
        [
            (lambda: nn.Sequential(nn.LazyConv2d(4, 3), nn.BatchNorm2d(4)), UnsupportedError,
             "expected a model whose weights are there, received 2 of lazy layers, which wait for the first input: run "
             "the model once on an example:", ["0.weight", "0.bias"]),
            (lambda: nn.Sequential(nn.BatchNorm2d(4).to("meta")), InputError,
             "expected a model whose weights have values, received 5 on the meta device, which have none; build it on "
             "another device, and load weights:", [f"0.{n}" for n in META]),
        ],
    )  # fmt: skip
    def test_weights_without_values(self, tmp_path, build, error, message, names):
        """Nothing is written of layers that are not initialized, which are listed."""
        with pytest.raises(error, match=exactly("\n  ".join([message, *names]))) as caught:
            write_state_dict(build(), tmp_path / "m.safetensors")
        assert type(caught.value) is error

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
        with pytest.raises(InputError, match=exactly(message)):
            load_state_dict(model, state, "w.pt")

    def test_old_checkpoints(self):
        """A checkpoint from before num_batches_tracked still loads."""
        model = nn.BatchNorm2d(2)
        state = {k: v for k, v in model.state_dict().items() if "tracked" not in k}
        load_state_dict(model, state, "old.pt")


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
        """Moved together, bundle and code still find each other, the code run where it is trusted."""
        bundle.save(normswap.patch(load_model(network), "gn"), tmp_path / "b", source=network)
        (tmp_path / "elsewhere").mkdir()
        for name in ("b", "network.py", "helper.py"):
            (tmp_path / name).rename(tmp_path / "elsewhere" / name)

        assert isinstance(normswap.load(tmp_path / "elsewhere" / "b", trust_code=True)[1], nn.GroupNorm)

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
            (None, "expected a bundle in .*, received a folder without normswap.json; make one with `normswap.save`$"),
            ("{}", "expected a bundle of schema_version=2 in .*, received schema_version=None; patch the model again$"),
            ("[", "expected JSON in .*, received text that is not: Expecting value: line 1 column 2"),
            (
                '{"schema_version": 1}',
                "expected a bundle of schema_version=2 in .*, received schema_version=1; patch the model again$",
            ),
            (
                '{"schema_version": 2, "framework": "x"}',
                "expected a file as it was written in .*normswap.json, received one without its seal; take the bundle "
                "from where it came once more, or patch the model again$",
            ),
        ],
    )
    def test_what_is_no_bundle(self, tmp_path, text, message):
        """A folder without a whole manifest is refused."""
        if text is not None:
            Path(tmp_path / "normswap.json").write_text(text)
        with pytest.raises(InputError, match=f"^{message}"):
            normswap.load(tmp_path)


def test_a_bundle_patched_once_more_loads(tmp_path):
    """What a bundle's model was patched to before is in the new bundle's recipe beside what it is now."""
    build = lambda: trained_(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))  # noqa: E731
    normswap.save(normswap.patch(build(), "gn", include="0"), tmp_path / "first")
    model = normswap.load(tmp_path / "first", model=build())
    normswap.save(normswap.patch(model, "sn", include="2"), tmp_path / "both")
    loaded = normswap.load(tmp_path / "both", model=build())

    assert [type(layer).__name__ for layer in loaded] == ["GroupNorm", "Conv2d", "SwitchNorm2d"]
    assert loaded.state_dict().keys() == model.state_dict().keys()
