"""References: what a model answers, saved, and held against files where no framework is installed."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import normswap
from normswap.errors import InputError, OutputExistsError
from normswap.verification.stored import load_reference
from normswap.verification.verify import verify_against

from .models import Residual, trained_

DATA = [np.random.default_rng(1).standard_normal((4, 3, 12, 12), np.float32)]


@pytest.fixture(scope="module")
def written(proven, tmp_path_factory):
    """A folder with a patched model's file ``m.onnx`` and its answers ``r.npz``, and the model."""
    model, path, _ = proven("sn")
    folder = Path(shutil.copy(path, tmp_path_factory.mktemp("saved"))).parent
    assert normswap.verify(model, path, data=DATA, save_reference=folder / "r.npz")
    return folder, model


@pytest.fixture
def saved(written, tmp_path):
    """The same in a folder of the test's own."""
    for name in ("m.onnx", "r.npz"):
        shutil.copy(written[0] / name, tmp_path)
    return tmp_path, written[1]


def corrupt(path, factor=1.01):
    proto = onnx.load(path)
    weight = next(i for i in proto.graph.initializer if i.name == "head.weight")
    array = onnx.numpy_helper.to_array(weight) * np.float32(factor)
    weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))
    onnx.save(proto, path)


def test_the_same_verdict(saved):
    """Against the reference a file passes and fails as it does against the model, with the same figures."""
    folder, model = saved
    for _ in range(2):
        by_model = normswap.verify(model, folder / "m.onnx", data=DATA)
        by_reference = verify_against(folder / "r.npz", folder / "m.onnx")

        assert by_reference.to_dict() == by_model.to_dict()
        corrupt(folder / "m.onnx")
    assert by_reference.first_diverging == "head"
    assert len(by_reference.checks) == 10


def test_no_framework_is_needed(saved):
    """The command verifies against a reference without importing a framework, and exits 5 on a miss."""
    folder, _ = saved
    script = (
        "import sys; from normswap.cli import main\n"
        "try: main(['verify', 'm.onnx', '--against', 'r.npz', '--json'])\n"
        "finally: assert not {'torch', 'keras', 'tensorflow'} & set(sys.modules)"
    )

    def run():
        done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True)
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, json.loads(done.stdout)

    code, said = run()
    assert (code, said["passed"], len(said["checks"])) == (0, True, 10)
    corrupt(folder / "m.onnx")
    code, said = run()
    assert (code, said["passed"], said["first_diverging"]) == (5, False, "head")


def test_the_same_bytes(saved):
    """Two references of one model are the same file, which is not replaced unasked."""
    folder, model = saved
    normswap.verify(model, folder / "m.onnx", data=DATA, save_reference=folder / "again.npz")

    assert (folder / "again.npz").read_bytes() == (folder / "r.npz").read_bytes()
    with pytest.raises(OutputExistsError):
        normswap.verify(model, folder / "m.onnx", save_reference=folder / "r.npz")


def test_layers_are_kept_of_one_batch(saved):
    """The layers' outputs, which make a reference large, are kept of the first batch alone."""
    with np.load(saved[0] / "r.npz") as stored:
        assert {name.partition(".")[0] for name in stored.files if ".layers." in name} == {"0"}
        assert len([name for name in stored.files if ".outputs." in name]) == 5


def rewritten(path, change):
    """Change the arrays of an .npz file."""
    with np.load(path) as stored:
        arrays = dict(stored)
    change(arrays)
    with path.open("wb") as file:
        np.savez(file, **arrays)


def told(change):
    """Change the index of a reference."""

    def apply(arrays):
        index = json.loads(str(arrays["index"]))
        change(index)
        arrays["index"] = np.array(json.dumps(index))

    return apply


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.write_bytes(b"no archive"), "File is not a zip file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-50]), "File is not a zip file"),
        (lambda path: np.savez(path, x=np.zeros(3)), "no index in it"),
        (lambda path: np.savez(path, index=np.array([{}])), "Object arrays cannot be loaded when allow_pickle=False"),
        (lambda path: rewritten(path, told(lambda i: i.update(format=2))), "format=2 where this version reads 1"),
        (lambda path: rewritten(path, told(lambda i: i.update(batches=[]))), "no batch in it"),
        (
            lambda path: rewritten(path, told(lambda i: i["batches"][1].update(inputs=[]))),
            "batch 1 without inputs or outputs",
        ),
        (
            lambda path: rewritten(path, told(lambda i: i["batches"][1].update(inputs=["z"]))),
            "batches of different inputs or outputs",
        ),
        (lambda path: rewritten(path, lambda a: a.pop("2.outputs.0")), "no 2.outputs.0 in it"),
        (lambda path: np.savez_compressed(path, x=np.zeros(10**6)), "its arrays are compressed"),
    ],
)
def test_damaged_references(saved, damage, reason):
    """What is no reference, or a part of one, is refused, and nothing in it is unpickled or inflated."""
    folder, _ = saved
    damage(folder / "r.npz")
    with pytest.raises(InputError) as caught:
        verify_against(folder / "r.npz", folder / "m.onnx")

    assert str(caught.value) == (
        f"expected a reference written by save_reference= in {folder / 'r.npz'}, received {reason}; write it again"
    )


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "expected JSON in {}, received text that is not: Expecting property name enclosed in double quotes: line "
         "1 column 2 (char 1)"),
        ("[" * 9999, "expected JSON nested no deeper than 100 levels in {}, received deeper"),
        ('{"format": 1, "notes": []}', "expected a value at batches in {}, received none"),
        ('{"format": 1, "notes": "n", "batches": []}', "expected a list at notes in {}, received 'n'"),
        ('{"format": 1, "notes": [], "batches": [{"scale": "1", "inputs": [], "outputs": [], "exact_outputs": []}]}',
         "expected a number at batches[0].scale in {}, received '1'"),
        ('{"format": 1, "notes": [], "batches": [], "coverage": {"e": [1]}}',
         "expected a value at coverage.e[1] in {}, received none"),
    ],
)  # fmt: skip
def test_an_index_of_other_kinds(tmp_path, index, message):
    """Every field of it is read as declared, and told by its name."""
    np.savez(tmp_path / "r.npz", index=np.array(index))
    with pytest.raises(InputError) as caught:
        load_reference(tmp_path / "r.npz")

    assert str(caught.value) == message.format(tmp_path / "r.npz") + "; write it again with save_reference="


def test_a_bit_that_flipped(saved):
    """A reference with a changed byte is refused by its checksum."""
    path = saved[0] / "r.npz"
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    content = bytearray(path.read_bytes())
    content[largest.header_offset + largest.file_size // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="^expected a reference written by save_reference= in .*Bad CRC-32"):
        verify_against(path, saved[0] / "m.onnx")


def test_an_enormous_array(saved):
    """An array said to be of terabytes is refused."""
    path = saved[0] / "r.npz"
    with zipfile.ZipFile(path, "w") as archive:
        header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776, 1024), }"
        archive.writestr("index.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    with pytest.raises(InputError, match="^expected a reference written by save_reference= in "):
        verify_against(path, saved[0] / "m.onnx")


class TestOfAnotherModel:
    @staticmethod
    def refusal(saved, model, example):
        folder, _ = saved
        normswap.to_onnx(model.eval(), folder / "o.onnx", example=example, check=False)
        with pytest.raises(InputError) as caught:
            verify_against(folder / "r.npz", folder / "o.onnx")
        start = f"expected a reference of the model in {folder / 'o.onnx'}, received {folder / 'r.npz'} of another: "
        end = "; write one of this model by save_reference="
        assert str(caught.value).startswith(start)
        assert str(caught.value).endswith(end)
        return str(caught.value).removeprefix(start).removesuffix(end)

    def test_other_inputs(self, saved):
        """A reference for inputs of another name is refused."""
        said = self.refusal(saved, nn.Linear(3, 2), torch.zeros(2, 3))

        assert said == "expected the inputs x, received input"

    def test_other_shapes(self, saved):
        """So is one for inputs of another size."""
        said = self.refusal(saved, trained_(Residual()), torch.zeros(2, 3, 16, 12))

        assert said == "expected the input x of float32 (1, 3, 12, 12), received float32 (?, 3, 16, 12)"

    def test_other_outputs(self, saved, images):
        """So is one for outputs of another name."""

        class Named(Residual):
            def forward(self, x):
                """Return the scores by name."""
                return {"scores": super().forward(x)}

        assert self.refusal(saved, trained_(Named()), images) == "expected the outputs output, received scores"

    def test_other_weights(self, saved, images):
        """One of a model that differs in its weights alone fails the file."""
        folder, _ = saved
        torch.manual_seed(5)
        other = normswap.patch(trained_(Residual()), "sn", example=images).model
        normswap.to_onnx(other, folder / "o.onnx", example=images, check=False)

        assert verify_against(folder / "r.npz", folder / "o.onnx").first_diverging == "stem.0"
