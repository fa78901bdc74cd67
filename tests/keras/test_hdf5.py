"""HDF5 files on which the library itself fails: given up, in a file and within a ``.keras``."""

import zipfile

import h5py
import numpy as np
import pytest

from normswap.errors import InputError
from normswap.interop.keras_h5 import read_keras_h5
from normswap.sources.keras import hdf5
from normswap.sources.keras.hdf5 import require_readable
from normswap.sources.keras.model_file import read_model

from ..helpers import exactly


@pytest.fixture
def path(tmp_path):
    """A file with weights."""
    with h5py.File(tmp_path / "w.h5", "w") as file:
        file.create_dataset("layer/gamma", data=np.ones(8, np.float32))
    return tmp_path / "w.h5"


def test_what_is_read(path, tmp_path):
    """A whole file, one that is no HDF5, and an archive of both are left to their readers."""
    (tmp_path / "no.h5").write_bytes(b"no HDF5")
    with zipfile.ZipFile(tmp_path / "m.keras", "w") as archive:
        archive.write(path, "model.weights.h5")
        archive.writestr("config.json", "{}")
    for name in ("w.h5", "no.h5", "m.keras"):
        require_readable(tmp_path / name)


@pytest.mark.parametrize("reads", [read_model, read_keras_h5, require_readable])
@pytest.mark.parametrize("packed", [False, True])
def test_a_search_without_end(path, tmp_path, monkeypatch, reads, packed):
    """It is given up after its time, wherever the file lies."""
    if packed:
        with zipfile.ZipFile(tmp_path / "m.keras", "w") as archive:
            archive.write(path, "model.weights.h5")
        path = tmp_path / "m.keras"
    monkeypatch.setattr(hdf5, "SECONDS", 0.2)
    monkeypatch.setattr(hdf5, "_READ", "while True: pass")
    message = f"expected an HDF5 file that is read within 0 s, received {path}, which is not; it is damaged"
    with pytest.raises(InputError, match=exactly(message)):
        reads(path)


def test_a_crash(path, monkeypatch):
    """One of the library's is not one of ours."""
    monkeypatch.setattr(hdf5, "_READ", "import os; os.abort()")
    message = f"expected an HDF5 file, received {path}, on which the HDF5 library crashes; it is damaged"
    with pytest.raises(InputError, match=exactly(message)):
        require_readable(path)


def test_a_bomb(tmp_path):
    """A few bytes that hold half a gigabyte are not weights."""
    path = tmp_path / "w.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("zeros", (2**27,), np.float32, chunks=(2**20,), compression="gzip", fillvalue=0)
    message = (
        f"expected an HDF5 file of up to 100 times its size, received {path}, which holds more in its "
        f"{path.stat().st_size} bytes"
    )
    with pytest.raises(InputError, match=exactly(message)):
        require_readable(path)
