"""A stranger's bundle runs no code of its author; one that was written here runs its writer's own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import normswap
from normswap.bundles import bundle
from normswap.bundles.source import load_model
from normswap.cli import main
from normswap.data.dataset import open_data
from normswap.errors import InputError
from normswap.finetune import Settings, finetune
from normswap.formats.seal import sealed
from normswap.sources.spec import FORMS

from ..helpers import exactly
from ..strangers import PAYLOAD, SOURCES, commands, invoke, marks, refusal, stranger, work_in, write_own
from .models import batch_norms

CODE = """
import torch
from torch import nn


def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3),
                          nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    model.pretrained_cfg = {"input_size": (3, 8, 8), "mean": (0.5, 0.5, 0.5), "std": (0.3, 0.3, 0.3)}
    return model.eval()
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with a network, a bundle of it that has gates and a layer left, its ONNX file, and data."""
    path = tmp_path_factory.mktemp("own")
    write_own(path, CODE, {"own": ["build", "--to", "sn", "--exclude", "4"]}, exported="own")
    return path


@pytest.fixture
def folder(written, tmp_path, monkeypatch):
    """The working folder, whose modules can be imported, with data and an ONNX file."""
    return work_in(tmp_path, written, monkeypatch)


@pytest.fixture
def own(folder):
    """A bundle that was written in the working folder just now, its code beside it."""
    (folder / "net.py").write_text(CODE)
    assert invoke("patch", "net.py:build", "--to", "sn", "-o", "b")[0] == 0
    return folder / "b"


class TestStrangers:
    @pytest.mark.parametrize("source", SOURCES)
    def test_no_code_in_any_command(self, written, folder, source):
        """Whatever a bundle names, every command that needs its model refuses it, and those that do not go on."""
        path, named = stranger(written / "own", folder, source)

        for name, command in commands(path).items():
            assert (name, *invoke(*command)) == (name, 3, f"error: {refusal(path, named)}\n")
            assert invoke(*command, "--trust")[0] == 3, name
        for command in (["inspect", path], ["plot", path, "-o", "plot.png"], ["report", path, "-o", "report.html"]):
            assert invoke(*command)[0] == 0
        assert marks(folder) == []
        assert not (folder / "new").exists()

    @pytest.mark.parametrize("source", SOURCES)
    def test_no_code_in_python(self, written, folder, source):
        """So do `load`, `read` and `finetune`; a model given in place of the source is filled."""
        path, named = stranger(written / "own", folder, source)
        message = exactly(refusal(path, named, "pass trust_code=True, or a fresh model as model="))
        data = open_data("data.npz", bundle.read(written / "own").preprocessing)

        for call in (normswap.load, bundle.read, lambda path: finetune(path, "new", data, Settings(steps=1))):
            with pytest.raises(InputError, match=message):
                call(path)
        with pytest.raises(InputError, match=message):
            normswap.load(path, trust=True)
        opened = bundle.read(path, model=load_model(f"{written}/net.py:build"))
        with pytest.raises(InputError, match=message):
            opened.original()
        assert batch_norms(opened.model) == ["4"]
        assert marks(folder) == []

    @pytest.mark.parametrize("name", commands(""))
    def test_a_program(self, written, folder, name):
        """A .pt2 file is read by a word of its own: that for code is not enough."""
        path, _ = stranger(written / "own", folder, "net.pt2")
        (path / "net.pt2").write_bytes(b"a program")
        message = (
            f"expected a model that is read without running code, received {path}/net.pt2, which torch.export "
            "unpickles; if you trust whoever made it, add --trust"
        )

        for more in ([], ["--trust-code"]):
            assert invoke(*commands(path)[name], *more) == (3, f"error: {message}\n")

    @pytest.mark.parametrize("name", commands(""))
    def test_trusted(self, written, folder, name):
        """With --trust-code the code is run, from the command line and in Python."""
        path, _ = stranger(written / "own", folder, "payload.py:build")
        (path / "payload.py").write_text(PAYLOAD.partition("def build")[0] + CODE)
        code, said = invoke(*commands(path)[name], "--trust-code")

        assert code == 0, said
        assert marks(folder) == [path / "mark"]

    def test_trusted_in_python(self, written, folder):
        """The model has its original too."""
        path, _ = stranger(written / "own", folder, "payload.py:build")
        (path / "payload.py").write_text(CODE)

        assert batch_norms(normswap.load(path, trust_code=True)) == ["4"]
        assert batch_norms(bundle.read(path, trust_code=True).original()) == ["1", "4"]

    @pytest.mark.parametrize(
        "source",
        ["timm:resnet18", "timm:resnet50.a1_in1k", "torchvision:resnet18", "normswap.models.torch:resnet18_v1"],
    )
    def test_a_plain_name(self, written, folder, monkeypatch, source):
        """An architecture of a zoo or of this library's is built without a word, and without weights of the zoo's."""
        asked = []

        def build(spec, *, pretrained, trust):
            asked.append((spec, pretrained, trust))
            return load_model(f"{written}/net.py:build")

        monkeypatch.setattr(bundle, "load_model", build)
        path, _ = stranger(written / "own", folder, source)
        normswap.load(path)

        assert asked == [(source, False, False)]

    @pytest.mark.parametrize("source", ["x\0.py:build", "build", ""])
    def test_what_names_nothing(self, written, folder, source):
        """A source that is none is told as that."""
        path, _ = stranger(written / "own", folder, source)
        told = repr(source) if "\0" in source else source

        assert invoke("export", path, "-o", "new") == (
            3,
            f"error: expected a model as {FORMS}, received model={told}\n",
        )

    @pytest.mark.parametrize(("settings", "kept"), [(True, "NullCache"), (False, "FunctionCache")])
    def test_settings_of_the_working_folder(self, tmp_path, settings, kept):
        """A file there cannot have Numba read what it has compiled, which is pickled, from where somebody put it."""
        if settings:
            (tmp_path / ".numba_config.yaml").write_text("cache_dir: theirs\n")
        code = "from normswap.layers.torch import kernels; print(type(kernels._sum._cache).__name__)"
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)

        assert done.stdout.splitlines() == [kept], done.stderr

    def test_nothing_is_built_of_a_file_held_against_a_reference(self, folder, monkeypatch):
        """`verify FILE --against` and `evaluate FILE.onnx` ask for no model at all."""
        for module in ("normswap.sources.spec.builder", "normswap.bundles.source.load_source"):
            monkeypatch.setattr(module, lambda *_, **__: pytest.fail("was asked for"))
        for command in (["verify", "own.onnx", "--against", "own.npz"], ["evaluate", "own.onnx", "--data", "data.npz"]):
            code, said = invoke(*command)
            assert code == 0, said

    @pytest.mark.parametrize(
        ("command", "message"),
        [
            (["export", "net.py:build", "--trust-code", "-o", "new"],
             "expected a bundle for --trust-code, received net.py:build; leave that out"),
            (["inspect", "own", "--trust-code"],
             "expected no --trust-code beside the bundle own, of which nothing is run, received --trust-code; "
             "leave that out"),
            (["inspect", "own", "--input-shape", "3,8,8"],
             "expected no --input-shape beside the bundle own, which tells its own, received --input-shape 3,8,8; "
             "leave that out"),
            (["plot", "own", "--trust", "-o", "new.png"], "expected a .pt2 file for --trust, received --trust"),
            (["verify", "own.onnx", "--against", "own.npz", "--trust-code"],
             "expected no option of a MODEL beside --against, which stands in its place, received --trust-code"),
        ],
    )  # fmt: skip
    def test_where_there_is_nothing_to_trust(self, written, monkeypatch, command, message):
        """The options are an error where nothing reads them."""
        monkeypatch.chdir(written)
        code, said = invoke(*command)

        assert (code, said.splitlines()[-1].removeprefix("Error: ").removeprefix("error: ")) == (2, message)


class TestFiles:
    """What a bundle's files tell of it."""

    def test_inspect(self, written, monkeypatch):
        """Its recipe tells what layers were and became, its weights what was left."""
        result = CliRunner().invoke(main, ["inspect", str(written / "own"), "--json"])
        keys = "name", "type", "channels", "shape", "patched_to"

        assert [tuple(site[key] for key in keys) for site in json.loads(result.stdout)["sites"]] == [
            ("1", "BatchNorm2d", 8, [8, 8], "sn"),
            ("4", "", 8, None, None),
        ]
        monkeypatch.chdir(written)
        assert invoke("inspect", "own")[1] == (
            "2 norms in own\n"
            "name  type         C  shape  patched to\n"
            "----------------------------------------\n"
            "1     BatchNorm2d  8  8x8    sn\n"
            "4                  8\n"
            "as its recipe and its weights tell; no model is built\n"
            "next: normswap patch own --to sn -o own-sn\n"
        )

    def test_the_gates_are_those_of_the_model(self, own):
        """As `plot` tells them, in the order in which the model has its layers."""
        result = CliRunner().invoke(main, ["plot", str(own), "-o", "plot.png", "--json"])
        layers = {name: module for name, module in normswap.load(own).named_modules() if hasattr(module, "gates")}
        told = json.loads(result.stdout)["gates"]

        assert list(told) == list(layers) == ["1", "4"]
        for name, layer in layers.items():
            mean, variance = layer.gates()
            np.testing.assert_allclose(told[name]["mean"], mean.tolist(), rtol=1e-6)
            np.testing.assert_allclose(told[name]["variance"], variance.tolist(), rtol=1e-6)


class TestOwn:
    """What was written here is remembered, by path, manifest and code, outside of the bundle."""

    def test_the_whole_job_needs_no_flag(self, own):
        """Nor does what comes of a bundle, in commands and in Python."""
        for command in (
            ["patch", "b", "--to", "bn", "--calibrate", "data.npz", "-o", "back"],
            ["finetune", "b", "--data", "data.npz", "--steps", "2", "-o", "tuned"],
            ["export", "tuned", "-o", "tuned.onnx"],
            ["export", "back", "-o", "back.onnx"],
        ):
            code, said = invoke(*command)
            assert code == 0, said
        model = normswap.load("tuned")
        normswap.save(model, "again")
        assert torch.equal(normswap.load("again")[1].mean_weight, model[1].mean_weight)

    def test_code_that_goes_on_being_written(self, own, folder):
        """Code outside of the bundle is its user's, whatever becomes of it, and is found from everywhere."""
        (folder / "net.py").write_text(CODE + "\n# more\n")
        os.chdir("/")

        assert invoke("export", own, "-o", folder / "b.onnx")[0] == 0

    @pytest.mark.parametrize("change", ["moved", "copied", "manifest", "unpacked"])
    def test_what_is_not_as_it_was_written_asks(self, own, folder, change):
        """Moved, copied, changed, or unpacked over what was there, bit for bit the same."""
        path, manifest = own, own / "normswap.json"
        if change == "moved":
            path = own.rename(folder / "c")
        elif change == "copied":
            path = Path(shutil.copytree(own, folder / "c"))
        elif change == "manifest":
            told = json.loads(manifest.read_text()) | {"normswap": "0"}
            del told["seal"]
            manifest.write_text(json.dumps(sealed(told)))
        else:
            copy = shutil.copytree(own, folder / "c")
            shutil.rmtree(own)
            shutil.copytree(copy, own)

        assert invoke("export", path, "-o", "new") == (3, f"error: {refusal(path, f'{folder}/net.py:build')}\n")

    def test_code_in_the_bundle_asks(self, own, folder):
        """It goes where the bundle goes, so that it is nobody's own, whoever names it."""
        report = normswap.patch(load_model("net.py:build"), "gn")
        normswap.save(report, "c", source="c/net.py:build")
        shutil.copy("net.py", "c")

        with pytest.raises(InputError, match="^expected a bundle that is read without running its author's code"):
            normswap.load("c")

    def test_a_module_that_is_another(self, folder, tmp_path_factory, monkeypatch):
        """A module is the user's own where it was, not one of its name that comes first elsewhere."""
        (folder / "own_net.py").write_text(CODE)
        assert invoke("patch", "own_net:build", "--to", "gn", "-o", "b")[0] == 0
        assert invoke("export", "b", "-o", "b.onnx")[0] == 0
        other = tmp_path_factory.mktemp("other")
        (other / "own_net.py").write_text(PAYLOAD)
        monkeypatch.delitem(sys.modules, "own_net")
        monkeypatch.syspath_prepend(other)

        assert invoke("export", folder / "b", "-o", "new") == (3, f"error: {refusal(folder / 'b', 'own_net:build')}\n")
        assert marks(other) == []

    def test_what_is_made_of_a_strangers_bundle_asks_too(self, written, folder):
        """Trust is for one call: the code is theirs still. What to type next says so."""
        path, named = stranger(written / "own", folder, "payload.py:build")
        (path / "payload.py").write_text(CODE)
        for command in (
            ["patch", path, "--to", "sn", "--trust-code", "-o", "new"],
            ["finetune", path, "--data", "data.npz", "--steps", "1", "--trust-code", "-o", "tuned"],
        ):
            code, said = invoke(*command)
            output = Path(command[-1])
            assert (code, f"next: normswap export {output} --trust-code -o {output}.onnx" in said) == (0, True)
            assert invoke("export", output, "-o", "out.onnx") == (3, f"error: {refusal(output, named)}\n")

    def test_a_model_given_answers_for_no_code(self, written, folder):
        """What was loaded into a model given, and saved again, names code that still is not trusted."""
        path, named = stranger(written / "own", folder, "payload.py:build")
        model = normswap.load(path, model=load_model(f"{written}/net.py:build"))
        normswap.save(model, "again")
        message = refusal("again", named, "pass trust_code=True, or a fresh model as model=")

        with pytest.raises(InputError, match=exactly(message)):
            normswap.load("again")
        normswap.save(model, "mine", source=f"{written}/net.py:build")
        assert batch_norms(normswap.load("mine")) == ["4"]
        assert marks(folder) == []

    @pytest.mark.parametrize("state", ["file", "damaged", "other"])
    def test_without_a_memory(self, own, folder, monkeypatch, state):
        """Where it cannot be written or read, nothing fails, and trust is asked for."""
        place = folder / "state"
        if state == "file":
            place.write_text("in the way")
        else:
            (place / "normswap").mkdir(parents=True)
            (place / "normswap" / "bundles.json").write_text("[" * 5000 if state == "damaged" else "[]")
        monkeypatch.setenv("XDG_STATE_HOME", str(place))
        assert invoke("export", "b", "-o", "new")[0] == 3
        code, said = invoke("patch", "net.py:build", "--to", "gn", "-o", "c")

        assert code == 0, said
        assert invoke("export", "c", "-o", "new")[0] == (3 if state == "file" else 0)
        assert invoke("export", "c", "--trust-code", "-o", "c.onnx")[0] == 0


class TestConfig:
    """A file of --config may be another's, such as the run.toml of a bundle."""

    @pytest.mark.parametrize("name", ["trust", "trust_code"])
    def test_it_answers_for_nobody(self, folder, name):
        """Trust is given on the command line alone."""
        (folder / "run.toml").write_text(f"{name} = true\n")
        code, said = invoke("finetune", "b", "-c", "run.toml", "--data", "data.npz", "-o", "new")

        assert (code, f"expected options of this command in run.toml, received {name}; there are" in said) == (2, True)

    def test_its_code_is_not_run(self, folder):
        """A MODEL that is code is typed, or not run."""
        (folder / "payload.py").write_text(PAYLOAD)
        (folder / "run.toml").write_text('bundle = "payload.py:build"\n')
        message = (
            "expected a MODEL that is code on the command line, received bundle='payload.py:build' in the file of "
            "--config; if you trust that code, give it there"
        )

        assert invoke("finetune", "-c", "run.toml", "--data", "data.npz", "-o", "new") == (3, f"error: {message}\n")
        assert marks(folder) == []
