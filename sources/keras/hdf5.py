"""HDF5 files, in whose library a few damaged bytes can start a search without end, or a crash."""

import shutil
import subprocess
import sys
import zipfile
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

from ...errors import InputError
from ..archives import RATIO, is_archive, most_in, require_whole

HDF5_SUFFIXES = (".h5", ".hdf5")

SECONDS, BYTES_A_SECOND = 60.0, 5e6
"""How long a file may take to be read: so much, and what its size takes on a slow disk."""

_TOO_LARGE = 33
_READ = f"""
import sys
import h5py

most, found = int(sys.argv[2]), 0
with h5py.File(sys.argv[1], "r") as file:
    def see(name, member):
        global found
        dict(member.attrs)
        if isinstance(member, h5py.Dataset) and member.shape is not None and not (member.external or member.is_virtual):
            found += member.nbytes
            if found > most:
                sys.exit({_TOO_LARGE})
            member[()]
    dict(file.attrs)
    file.visititems(see)
"""


def require_hdf5(path: Path, what: str) -> None:
    """Raise `InputError` for a file that is called as HDF5 is, and is none."""
    import h5py

    if path.suffix in HDF5_SUFFIXES and not h5py.is_hdf5(path):
        raise InputError(
            f"expected {what} in {path}, received a file of another kind than HDF5; get the file once more"
        )


def require_readable(path: Path, what: str = "a Keras model", *, looks_at_sizes: bool = False) -> None:
    """Raise `InputError` for HDF5 that cannot be read to its end, in a file or in the archive that a ``.keras`` is.

    It is read in a process of its own first, which can be given up; an archive is whole, or holds no ``what``. Other
    files are left to their reader, and what holds too much to one that ``looks_at_sizes`` itself.
    """
    stat = path.stat()
    _require_readable(path, what, path.resolve(), stat.st_size, stat.st_mtime_ns, looks_at_sizes)


@lru_cache(maxsize=64)
def _require_readable(path: Path, what: str, place: Path, size: int, changed: int, looks_at_sizes: bool) -> None:
    if path.suffix != ".keras" and not is_archive(path):
        _read(path, path, looks_at_sizes)
        return
    require_whole(path, what)
    with TemporaryDirectory() as folder, zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith((".h5", ".hdf5")):
                part = Path(folder) / "part.h5"
                with archive.open(name) as packed, part.open("wb") as file:
                    shutil.copyfileobj(packed, file)
                _read(part, path, looks_at_sizes)


def _read(file: Path, path: Path, looks_at_sizes: bool) -> None:
    size = file.stat().st_size
    seconds = SECONDS + size / BYTES_A_SECOND
    try:
        # -P: no h5py of the working folder's
        command = [sys.executable, "-P", "-c", _READ, str(file), str(most_in(size))]
        ended = subprocess.run(command, capture_output=True, timeout=seconds, check=False).returncode
    except subprocess.TimeoutExpired:
        raise InputError(
            f"expected an HDF5 file that is read within {seconds:.0f} s, received {path}, which is not; it is damaged"
        ) from None
    if ended < 0:
        raise InputError(f"expected an HDF5 file, received {path}, on which the HDF5 library crashes; it is damaged")
    if ended == _TOO_LARGE and not looks_at_sizes:
        raise InputError(
            f"expected an HDF5 file of up to {RATIO} times its size, received {path}, which holds more in its "
            f"{size} bytes"
        )
