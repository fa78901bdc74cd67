"""The bad inputs of `docs/bad_inputs.md` that a PyTorch model is given: what is said, with which code, what is left."""

import json
import os
import pickle
import resource
import shutil
import struct
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from PIL import Image
from torch import nn

import normswap
from normswap.cli import main

from ..bad_inputs import cases, hold

CASES = cases("torch")
NETWORKS = """
import torch
from torch import nn


def build(norm=nn.BatchNorm2d, **options):
    torch.manual_seed(0)
    pool = nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm(4, **options), nn.ReLU(), pool, nn.Flatten(), nn.Linear(4, 2)).eval()


def other():
    return nn.Sequential(*[nn.Linear(2, 2) for _ in range(12)])


def empty():
    return build().append(nn.BatchNorm2d(0)).eval()


def lazy():
    return nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d())


def meta():
    with torch.device("meta"):
        return build()


def no_norm():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())


def no_statistics():
    return build(track_running_stats=False)


def no_affine():
    return build(affine=False)


def pooled():
    model = build()
    return nn.Sequential(model[0], model[3], model[1], *model[4:]).eval()


def half():
    return build().half()


def double():
    return build().double()


def quantized():
    from torch.ao.nn.intrinsic import qat
    from torch.ao.quantization import get_default_qat_qconfig

    return nn.Sequential(qat.ConvBn2d(3, 4, 1, qconfig=get_default_qat_qconfig("fbgemm")))


def synchronized():
    return nn.SyncBatchNorm.convert_sync_batchnorm(build())


class FrozenBatchNorm2d(nn.Module):
    def __init__(self, channels):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(channels))


def frozen():
    return build(FrozenBatchNorm2d)


class InplaceABN(nn.BatchNorm2d):
    def forward(self, x):
        return nn.functional.leaky_relu(super().forward(x))


def activated():
    return build(InplaceABN)


class Logarithm(nn.Module):
    def forward(self, x):
        return torch.log(-1 - x)


def not_finite():
    model = build()
    model[2] = Logarithm()
    return model


def needs_timm():
    import no_such_library

    return build()
"""


class Evil:
    """Runs a command where it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch executed",)


def network():
    """What `build` of the networks makes."""
    space = {"__name__": "networks"}
    exec(NETWORKS, space)
    return space["build"]()


STATE = network().state_dict()


def saved(content, share=1.0, **options):
    """A maker of a file of `torch.save`, or a part of one."""

    def make():
        torch.save(content, "w.pth", **options)
        data = Path("w.pth").read_bytes()
        Path("w.pth").write_bytes(data[: int(len(data) * share)])

    return make


def written(content, name="w.pth"):
    """A maker of a file of these bytes."""
    return lambda: Path(name).write_bytes(content)


def tensors(header, content=bytes(8), length=None):
    """A maker of a safetensors file with this header, which says to be of ``length``."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return written(struct.pack("<Q", len(text) if length is None else length) + text + content, "w.safetensors")


def tensor(shape, begin=0, end=8, dtype="F32"):
    """What a header says of a tensor."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def changed(name, value, count=1):
    """A maker of weights with some values of one tensor replaced."""

    def make():
        state = {key: each.clone() for key, each in STATE.items()}
        state[name].view(-1)[:count] = value
        safetensors.torch.save_file(state, "w.safetensors")

    return make


def _script():
    torch.jit.script(nn.Linear(2, 2)).save("w.pth")


def _flipped():
    saved(STATE)()
    content = bytearray(Path("w.pth").read_bytes())
    content[content.index(STATE["0.weight"].numpy().tobytes())] ^= 1
    Path("w.pth").write_bytes(content)


def program(share=1.0):
    """A maker of a program, or a part of one."""

    def make():
        torch.export.save(torch.export.export(network(), (torch.zeros(2, 3, 8, 8),)), "net.pt2")
        data = Path("net.pt2").read_bytes()
        Path("net.pt2").write_bytes(data[: int(len(data) * share)])

    return make


def _program_as_weights():
    program()()
    Path("net.pt2").rename("w.pth")


def _damaged_bundle():
    shutil.copytree("bundle", "damaged")
    path = Path("damaged/model.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _strangers_bundle():
    shutil.copytree("bundle", "theirs")


def _wrong_file():
    import onnx

    model = onnx.load("bundle.onnx")
    for initializer in model.graph.initializer:
        array = onnx.numpy_helper.to_array(initializer)
        if array.ndim > 1 and array.dtype == np.float32:
            initializer.CopyFrom(onnx.numpy_helper.from_array(1.01 * array, initializer.name))
    onnx.save(model, "wrong.onnx")


@contextmanager
def _full():
    """A disk on which no file can be longer than a kilobyte."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def folder(**classes):
    """A maker of a folder of images, so many in each class; None for a file that is none."""

    def make():
        for label, count in classes.items():
            Path("images", label).mkdir(parents=True)
            for number in range(count or 0):
                Image.fromarray(np.full((8, 8, 3), 40 * number, np.uint8)).save(f"images/{label}/{number}.png")
            if count is None:
                Path("images", label, "0.png").write_bytes(b"no image")

    return make


def arrays(count, constant=False, classes=2):
    """A maker of images in an .npz."""

    def make():
        x = np.random.default_rng(0).integers(0, 255, (count, 8, 8, 3), np.uint8)
        np.savez("d.npz", x=0 * x if constant else x, y=np.arange(count) % classes)

    return make


def _pooled_bundle():
    arrays(8)()
    invoke("patch", "net.py:pooled", "--to", "brn", "--input-shape", "3,8,8", "-o", "pooled")


def _photos():
    Path("photos").mkdir()
    Path("photos/a.jpg").write_bytes(b"a photo")


def _project():
    Path("project/run").mkdir(parents=True)
    Path("project/thesis.txt").write_text("years")


def _nothing():
    pass


MAKE = {
    "a pickle that runs code": saved({"weight": Evil()}),
    "a plain pickle by another name": written(pickle.dumps({"weight": Evil()})),
    "text by another name": written(b"hello, world"),
    "an archive of something else": written(b"PK\x05\x06" + bytes(18)),
    "a whole module": saved(nn.Linear(2, 2)),
    "TorchScript": _script,
    "a program that is not trusted": program(),
    "a program as weights": _program_as_weights,
    "a truncated checkpoint": saved(STATE, 0.5),
    "a truncated checkpoint of the old kind": saved(STATE, 0.9, _use_new_zipfile_serialization=False),
    "a truncated program": program(0.5),
    "an empty file": written(b""),
    "a git-LFS pointer": written(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"),
    "a web page": written(b"<!DOCTYPE html>\n<title>404</title>"),
    "the answer of a store": written(b'<?xml version="1.0"?><Error><Code>NoSuchKey</Code></Error>'),
    "a flipped bit": _flipped,
    "a flipped bit in a bundle": _damaged_bundle,
    "a header of 200 MB": tensors(b"{}", length=200_000_000),
    "a header longer than the file": tensors(b"{}", length=1000),
    "overlapping tensors": tensors({"a": tensor([2]), "b": tensor([2], 4, 12)}, bytes(12)),
    "a shape of other bytes": tensors({"a": tensor([3])}),
    "a shape that overflows": tensors({"a": tensor([2**62, 2**62])}),
    "bytes too many": tensors({"a": tensor([2])}, bytes(12)),
    "bytes too few": tensors({"a": tensor([2])}, bytes(4)),
    "a name twice": tensors(b'{"a":%b,"a":%b}' % ((json.dumps(tensor([2])).encode(),) * 2)),
    "a header that is no JSON": tensors(b'{"a":{'),
    "an unknown dtype": tensors({"a": tensor([2], dtype="F33")}),
    "a norm of no channels": _nothing,
    "running variances that are not finite": changed("1.running_var", torch.nan, 2),
    "an infinite weight of a convolution": changed("0.weight", torch.inf),
    "not finite, in a dry run": changed("0.weight", torch.nan),
    "negative running variances": changed("1.running_var", -1.0),
    "running variances of 0": changed("1.running_var", 0.0, 2),
    "gammas of 0": changed("1.weight", 0.0, 4),
    "neither gamma nor beta": _nothing,
    "no running statistics": _nothing,
    "no running statistics, and named": _nothing,
    "lazy layers": _nothing,
    "lazy layers with an example": _nothing,
    "weights on the meta device": _nothing,
    "weights of another network": saved(nn.Sequential(*[nn.Linear(2, 2) for _ in range(12)]).state_dict()),
    "weights of a larger network": saved(network().append(nn.Linear(2, 2)).state_dict()),
    "wrapped weights": saved({"state_dict": {f"module._orig_mod.{k}": v for k, v in STATE.items()}, "epoch": 3}),
    "an average of weights": saved({"ema": {f"model.{name}": value for name, value in STATE.items()}}),
    "no BatchNorm": _nothing,
    "groups that do not divide": _nothing,
    "groups of one value": _nothing,
    "one value per channel in training": _pooled_bundle,
    "an input that no machine holds": _nothing,
    "weights in the place of a model": saved(STATE),
    "a folder that is no bundle": _photos,
    "an operator set that is not written": _nothing,
    "a model that is not finite": _nothing,
    "a file that computes something else": _wrong_file,
    "a full disk": _full,
    "an output that exists": _nothing,
    "an output in the place of photos": _photos,
    "an output in the place of a project": _project,
    "an output in the place of its source": _nothing,
    "an output in the place of a device": _nothing,
    "an output below a file": _nothing,
    "class folders without images": folder(a=0, b=0),
    "one class": folder(a=2),
    "a file that is no image": folder(a=1, b=None),
    "more classes than scores": arrays(8, classes=8),
    "images of one class": arrays(8, classes=1),
    "few images to calibrate on": arrays(8),
    "images that are all the same": arrays(32, constant=True),
    "float16": _nothing,
    "float64": _nothing,
    "quantization-aware training": _nothing,
    "a synchronized BatchNorm": _nothing,
    "a frozen BatchNorm": _nothing,
    "a BatchNorm with an activation": _nothing,
    "code that imports what is not installed": _nothing,
    "a bundle of a stranger's code": _strangers_bundle,
}


def invoke(*arguments):
    """Run a command that succeeds."""
    result = CliRunner().invoke(main, [str(each) for each in arguments])
    assert result.exit_code == 0, result.stderr


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the networks, and a bundle of one with its file."""
    path = tmp_path_factory.mktemp("bad")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        Path("net.py").write_text(NETWORKS)
        invoke("patch", "net.py:build", "--to", "gn", "--input-shape", "3,8,8", "-o", "bundle")
        invoke("export", "bundle", "-o", "bundle.onnx")
    return path


@pytest.fixture
def _folder(place, monkeypatch):
    """Work there, and leave it as it was."""
    monkeypatch.chdir(place)
    before = set(place.iterdir())
    yield
    for path in set(place.iterdir()) - before:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.usefixtures("_folder")
@pytest.mark.parametrize("name", CASES)
def test_bad_input(name):
    """What the page says is what is said; nothing of the file is run, and nothing is left of what fails."""
    hold(CASES[name], MAKE[CASES[name].title])

    assert not Path("executed").exists()


def test_every_file_is_asked_for():
    """What is made here is on the page."""
    assert {case.title for case in CASES.values()} == MAKE.keys()


@pytest.mark.usefixtures("_folder")
@pytest.mark.parametrize("target", ["gn", "sn", "brn"])
def test_gammas_of_0_are_kept(target):
    """What says nothing before the patch says nothing after it."""
    model = network()
    nn.init.zeros_(model[1].weight)
    with pytest.warns(normswap.errors.NormswapWarning):
        normswap.patch(model, target, example=torch.randn(2, 3, 8, 8))

    assert torch.count_nonzero(model[1].weight) == 0
