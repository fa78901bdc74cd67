"""Every row of the table of bad inputs is on its page, and held there: by a block that is run, or by a test named."""

import ast
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from normswap.verification.reference import Batch, Reference
from normswap.verification.stored import save_reference

from .bad_inputs import ROOT, ROWS, cases, hold, named_tests, sections
from .onnx_models import WEIGHT, endless, external, scores

CASES = cases("any")


def _reference(weight=WEIGHT):
    x = np.zeros((2, 3), np.float32)
    save_reference(Reference([Batch(1.0, {"x": x}, {"y": x @ weight}, {})]), Path("ref.npz"), overwrite=True)


def onnx(proto, share=1.0):
    """A maker of a file, or a part of one."""

    def make():
        content = proto.SerializeToString()
        Path("m.onnx").write_bytes(content[: int(len(content) * share)])

    return make


def beside(**entries):
    """A maker of a file whose weight lies elsewhere."""

    def make():
        path = Path()
        for name in ("w.bin", "linked.bin"):
            (path / name).write_bytes(WEIGHT.tobytes())
        (path / "short.bin").write_bytes(bytes(20))
        (path / "there").mkdir()
        (path / "there" / "w.bin").write_bytes(WEIGHT.tobytes())
        (path / "link.bin").symlink_to("w.bin")
        (path / "link").symlink_to("there")
        os.link("linked.bin", "second.bin")
        external(path, **entries)

    return make


def _endless():
    _reference(np.eye(3, dtype=np.float32))
    onnx(endless())()


def _huge():
    proto = scores()
    proto.graph.initializer[0].dims[:] = [2**40]
    onnx(proto)()


def images(**arrays):
    """A maker of an .npz of images, other than it should be."""
    x = np.zeros((8, 2, 2, 3), np.uint8)
    return lambda: np.savez("d.npz", **({"x": x, "y": np.arange(8) % 2} | arrays))


def archive(**members):
    """A maker of an archive that is none of ours."""

    def make():
        with zipfile.ZipFile("d.npz", "w", zipfile.ZIP_DEFLATED) as file:
            for name, content in members.items():
                with file.open(name, "w") as member:
                    for part in content:
                        member.write(part)

    return make


def _declared():
    with zipfile.ZipFile("d.npz", "w", zipfile.ZIP_DEFLATED) as file, file.open("x.npy", "w") as member:
        header = {"descr": "|u1", "fortran_order": False, "shape": (1 << 20, 1 << 22)}
        np.lib.format.write_array_header_1_0(member, header)


def _nothing():
    pass


MAKE = {
    "external data above the folder": beside(location="../secret.bin", length=48),
    "external data at an absolute path": beside(location="/etc/passwd", length=48),
    "external data above the folder, as Windows writes it": beside(location="..\\secret.bin", length=48),
    "external data through a symbolic link": beside(location="link.bin", length=48),
    "external data in a linked folder": beside(location="link/w.bin", length=48),
    "external data in a file of two names": beside(location="second.bin", length=48),
    "external data that is not there": beside(location="gone.bin", length=48),
    "external data that is too short": beside(location="short.bin", length=48),
    "an offset below 0": beside(location="w.bin", offset=-1, length=48),
    "a length of 10^15": beside(location="w.bin", length=10**15),
    "a tensor of 2^40 numbers in 48 bytes": _huge,
    "an empty ONNX file": onnx(scores(), 0.0),
    "a truncated ONNX file": onnx(scores(), 0.9),
    "an operator set that does not exist": onnx(scores(opset=999)),
    "an IR version that does not exist": onnx(scores(ir_version=99)),
    "an operator that does not exist": onnx(scores(op="FooBar")),
    "a domain that does not exist": onnx(scores(op="MatMul", domain="com.example")),
    "a loop without end": _endless,
    "a provider that is not installed": onnx(scores()),
    "a name that is none": _nothing,
    "an archive that unpacks to far more": archive(**{"x.npy": [bytes(1 << 20)] * 600}),
    "an array that declares far more": _declared,
    "a name that leads out of an archive": archive(**{"../x.npy": [b"x"]}),
    "a name that leads out of an archive on Windows": archive(**{"..\\x.npy": [b"x"]}),
    "a member that is no array": archive(x=[b"x"], y=[b"y"]),
    "an array of Python objects": images(y=np.array([None] * 8, object)),
    "labels that are no integers": images(y=np.zeros(8)),
    "labels below 0": images(y=np.full(8, -1)),
    "no images": images(x=np.zeros((0, 2, 2, 3), np.uint8), y=np.zeros(0, np.int64)),
    "images that are not finite": images(x=np.full((8, 2, 2, 3), np.nan, np.float32)),
}


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    (tmp_path / "secret.bin").write_bytes(WEIGHT.tobytes())
    monkeypatch.chdir(tmp_path / "work")
    _reference()
    proto = scores()
    told = '{"shape": [2, 2, 3], "layout": "channels_last", "mean": [0.0], "std": [1.0]}'
    proto.metadata_props.add(key="normswap.preprocessing", value=told)
    Path("images.onnx").write_bytes(proto.SerializeToString())


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name):
    """What the page says is what is said; nothing is left."""
    hold(CASES[name], MAKE[CASES[name].title])


def test_every_row_is_held():
    """Each of the 68 rows has a block that is run, or names tests that are there."""
    found = sections()
    held = {case.row for kind in ("any", "torch", "keras") for case in cases(kind).values()}
    for row, text in found.items():
        for file, name in named_tests(text):
            names = name.split("::")
            body = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
            for part in names:
                body = next(each.body for each in body if getattr(each, "name", None) == part)
            held.add(row)

    assert sorted(found) == sorted(held) == list(ROWS)


def test_every_file_is_asked_for():
    """What is made here is on the page."""
    assert {case.title for case in CASES.values()} == MAKE.keys()
