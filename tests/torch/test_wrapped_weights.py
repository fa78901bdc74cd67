"""Weights in files as training scripts leave them: what is around them is taken off and told, and never guessed."""

import logging
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from normswap.bundles.opening import ModelOptions, Opened
from normswap.errors import InputError, UsageError
from normswap.sources.named_arrays import read_inputs
from normswap.sources.torch.state_dict import read_state_dict
from normswap.sources.torch.weights import load_weights

from ..helpers import exactly


def net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()


class Around(nn.Module):
    """A model that itself has a child of a name that wrappers have."""

    def __init__(self, name):
        super().__init__()
        self.add_module(name, net())


def filled(model):
    for number, tensor in enumerate(model.state_dict().values()):
        tensor.copy_(torch.full_like(tensor, number + 1))
    return model


def same(model, other):
    pairs = zip(model.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(one, another) for one, another in pairs)


def prefixed(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("keys", "prefix", "notes"),
    [
        ([], "", []),
        (["state_dict"], "", ["weights taken from state_dict in {}"]),
        (["model"], "module.", ["weights taken from model in {}", "module. taken off the names of the weights in {}"]),
        (["model", "state_dict"], "", ["weights taken from model.state_dict in {}"]),
        (["ema", "model_state_dict"], "", ["weights taken from ema.model_state_dict in {}"]),
        (["params_ema"], "", ["weights taken from params_ema in {}"]),
        ([], "module._orig_mod.", ["_orig_mod.module. taken off the names of the weights in {}"]),
        ([], "_orig_mod.module.", ["_orig_mod.module. taken off the names of the weights in {}"]),
        ([], "module.module.", ["module.module. taken off the names of the weights in {}"]),
        ([], "model.", ["model. taken off the names of the weights in {}"]),
        ([], "net.model.", ["net.model. taken off the names of the weights in {}"]),
        (
            ["generator"],
            "module.ema.net._orig_mod.",
            [
                "weights taken from generator in {}",
                "_orig_mod.module. taken off the names of the weights in {}",
                "ema.net. taken off the names of the weights in {}",
            ],
        ),
    ],
)
def test_wrappers_are_taken_off_and_told(tmp_path, caplog, keys, prefix, notes):
    """In any order and nesting, also those around names."""
    trained, path = filled(net()), tmp_path / "w.pth"
    content = prefixed(trained.state_dict(), prefix)
    for key in reversed(keys):
        content = {key: content, "epoch": 3, "optimizer": {"state": {}, "lr": 0.1}}
    torch.save(content, path)
    model = net()
    with caplog.at_level(logging.INFO, "normswap"):
        load_weights(model, path)

    assert same(model, trained)
    assert caplog.messages == [note.format(path) for note in notes]


@pytest.mark.parametrize("name", ["model", "net", "module", "ema"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_model_with_a_child_of_such_a_name(tmp_path, name, wrapped):
    """Its own names stay, and lose no more than what is around them."""
    trained = filled(Around(name))
    torch.save(prefixed(trained.state_dict(), "model." if wrapped else ""), tmp_path / "w.pth")
    load_weights(model := Around(name), tmp_path / "w.pth")

    assert same(model, trained)


def test_compiled_parts_and_averages(tmp_path):
    """A part that is compiled has its wrapper within names; an average counts its models beside the weights."""
    trained = filled(Around("part"))
    torch.save({name.replace("part.", "part._orig_mod."): v for name, v in trained.state_dict().items()},
               tmp_path / "compiled.pth")  # fmt: skip
    averaged = torch.optim.swa_utils.AveragedModel(trained, use_buffers=True)
    torch.save(averaged.state_dict(), tmp_path / "averaged.pth")
    safetensors.torch.save_file(prefixed(trained.state_dict(), "module."), tmp_path / "parallel.safetensors")
    for name in ("compiled.pth", "averaged.pth", "parallel.safetensors"):
        load_weights(model := Around("part"), tmp_path / name)

        assert same(model, trained)


def test_two_weights_of_one_name(tmp_path):
    """Names that would become one stay as they are, and are listed."""
    torch.save({"a.w": torch.ones(1), "a._orig_mod.w": torch.zeros(1)}, tmp_path / "w.pth")

    assert list(read_state_dict(tmp_path / "w.pth")) == ["a.w", "a._orig_mod.w"]


@pytest.mark.parametrize("keys", [("params", "params_ema"), ("state_dict", "ema"), ("state_dict", "model")])
def test_two_candidates(tmp_path, keys):
    """Of two state dicts either could be meant: none is taken."""
    path = tmp_path / "w.pth"
    torch.save({key: filled(net()).state_dict() for key in reversed(keys)}, path)
    message = (
        f"expected one state dict in {path}, received {' and '.join(keys)}; save the one that you want to a file of "
        f"its own: torch.save(torch.load('w.pth')['{keys[0]}'], 'weights.pth')"
    )
    with pytest.raises(InputError, match=exactly(message)):
        read_state_dict(path)


def test_one_state_dict_under_two_keys(tmp_path):
    """The same one twice is one."""
    state = filled(net()).state_dict()
    torch.save({"model": state, "state_dict": state}, tmp_path / "w.pth")

    assert read_state_dict(tmp_path / "w.pth").keys() == state.keys()


@pytest.mark.parametrize("content", [{}, {"state_dict": {}}, {"weights_of_mine": {"a": torch.ones(1)}}, {"a": 1}, 3])
def test_no_candidate(tmp_path, content):
    """Anything else is no state dict."""
    torch.save(content, tmp_path / "w.pth")
    kind = type(content).__name__
    message = f"expected a state dict of tensors in {tmp_path / 'w.pth'}, received a {kind} with other content"
    with pytest.raises(InputError, match=exactly(message)):
        read_state_dict(tmp_path / "w.pth")


def test_numbers_of_another_kind(tmp_path):
    """Integers and complex numbers where floats belong are listed; halves, doubles and averaged counters are taken."""
    state = filled(net()).state_dict()
    state["0.weight"], state["0.bias"] = state["0.weight"].half(), state["0.bias"].double()
    state["1.num_batches_tracked"] = state["1.num_batches_tracked"].float()
    torch.save(state, tmp_path / "w.pth")
    load_weights(net(), tmp_path / "w.pth")
    state["0.weight"], state["0.bias"] = state["0.weight"].to(torch.int8), state["0.bias"].to(torch.complex64)
    state["1.bias"] = state["1.bias"] > 0
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file(state, path)
    message = (
        f"expected weights that fit the model, received {path}:\n  other type (3):\n"
        "    0.weight: float32 in the model, int8 in the file\n"
        "    0.bias: float32 in the model, complex64 in the file\n"
        "    1.bias: float32 in the model, bool in the file"
    )
    with pytest.raises(InputError, match=exactly(message)):
        load_weights(net(), path)


class TestArchives:
    def test_a_flipped_byte(self, tmp_path):
        """PyTorch does not look at the checksums in its archives."""
        trained, path = filled(net()), tmp_path / "w.pth"
        torch.save(trained.state_dict(), path)
        content = bytearray(path.read_bytes())
        content[content.index(trained[0].weight.detach().numpy().tobytes()) + 3] ^= 1
        path.write_bytes(content)
        message = (
            f"expected weights in {path}, received a damaged file: w/data/0 is not what its checksum says; get the "
            "file once more"
        )
        with pytest.raises(InputError, match=exactly(message)):
            read_state_dict(path)

    def test_a_folder_with_bytes(self, tmp_path):
        """One bit makes a member a folder, of which PyTorch reads zeros; checksums or not."""
        path = tmp_path / "w.pth"
        torch.save(filled(net()).state_dict(), path)
        content = bytearray(path.read_bytes())
        content[content.rindex(b"w/data/1") - 8] |= 16
        path.write_bytes(content)
        message = (
            f"expected weights in {path}, received a damaged file: w/data/1 is a folder in which there are bytes; get "
            "the file once more"
        )
        with pytest.raises(InputError, match=exactly(message)):
            read_state_dict(path)

    def test_another_reader(self, tmp_path, monkeypatch):
        """What PyTorch's own reader makes of a member has to be what was written."""
        path = tmp_path / "w.pth"
        torch.save(net().state_dict(), path)
        read = torch._C.PyTorchFileReader.get_record
        monkeypatch.setattr(
            torch._C.PyTorchFileReader,
            "get_record",
            lambda reader, name: bytes(len(read(reader, name))) if name == "data/1" else read(reader, name),
        )
        message = (
            f"expected weights in {path}, received a damaged file: data/1 is not what its checksum says where PyTorch "
            "reads it; get the file once more"
        )
        with pytest.raises(InputError, match=exactly(message)):
            read_state_dict(path)

    def test_without_checksums(self, tmp_path):
        """Those that PyTorch is told to leave out are not missed."""
        before = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)
        try:
            torch.save(OrderedDict(net().state_dict()), tmp_path / "w.pth")
        finally:
            torch.serialization.set_crc32_options(before)

        assert read_state_dict(tmp_path / "w.pth").keys() == net().state_dict().keys()

    @pytest.mark.parametrize("read", [read_inputs, read_state_dict])
    def test_a_bomb(self, tmp_path, read):
        """What unpacks to far more than it is, is not unpacked."""
        path = tmp_path / ("x.npz" if read is read_inputs else "x.pth")
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("x.npy", "w") as member:
            for _ in range(600):
                member.write(bytes(1 << 20))
        what = "an .npz of named arrays" if read is read_inputs else "weights"
        message = (
            f"expected {what} in {path}, received an archive of 612 kB that unpacks to 629 MB; if it is what you "
            "want, pack it without compression"
        )
        with pytest.raises(InputError, match=exactly(message)):
            read(path)

    @pytest.mark.parametrize("read", [read_inputs, read_state_dict])
    def test_a_directory_that_python_gives_up(self, tmp_path, read):
        """Python asks whether a file is an archive, and raises for one on several disks."""
        path = tmp_path / ("x.npz" if read is read_inputs else "x.pth")
        locator = b"PK\x06\x07" + bytes(12) + (2).to_bytes(4, "little")
        path.write_bytes(b"PK\x03\x04" + bytes(60) + locator + b"PK\x05\x06" + bytes(18))
        what = "an .npz of named arrays" if read is read_inputs else "weights"
        message = (
            f"expected {what} in {path}, received a damaged file: zipfiles that span multiple disks are not supported; "
            "get the file once more"
        )
        with pytest.raises(InputError, match=exactly(message)):
            read(path)

    def test_a_large_honest_one(self, tmp_path):
        """Arrays that shrink well are read."""
        np.savez_compressed(tmp_path / "x.npz", x=np.zeros(1 << 22, np.uint8))

        assert read_inputs(tmp_path / "x.npz").kwargs["x"].nbytes == 1 << 22


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
         "expected each key of an object once in {}, received 'a' twice; get the file once more"),
        (b"[" * 99_999,
         "expected JSON nested no deeper than 100 levels in {}, received deeper; get the file once more"),
        (b"[1]", "expected an object in {}, received [1]; get the file once more"),
        (b"", "expected weights in {}, received a damaged file: its header is cut off; get the file once more"),
    ],
)  # fmt: skip
def test_headers_of_safetensors(tmp_path, header, message):
    """A name that stands twice could be either; other headers are none."""
    path = tmp_path / "w.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(InputError, match=exactly(message.format(path))):
        read_state_dict(path)


@pytest.fixture
def source(tmp_path):
    (tmp_path / "net.py").write_text(
        "from torch import nn\n\ndef build():\n    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()\n"
    )
    return f"{tmp_path}/net.py:build"


@pytest.mark.parametrize("shape", [(3, 10**6, 10**6), (10**30,)])
def test_an_example_that_no_machine_holds(source, shape, monkeypatch):
    """Memory is estimated before it is asked for."""
    monkeypatch.setattr("normswap.sources.memory._total", lambda: 16 * 10**9)
    told = ",".join(map(str, shape))
    received = "24 TB" if len(shape) == 3 else "8e+18 TB"
    message = (
        f"expected two samples of shape {told} to fit into memory, 16 GB here, received {received}; give a smaller size"
    )
    with pytest.raises(UsageError, match=exactly(message)):
        Opened(source, ModelOptions(input_shape=shape))
    with pytest.raises(UsageError):
        ModelOptions(input_shape=shape, size=(3,))
