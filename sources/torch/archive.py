"""The archives that PyTorch writes, and reads by a reader of its own: it has to find in them what Python's does."""

from pathlib import Path
from zipfile import ZipFile
from zlib import crc32

import torch

from ..archives import require_whole
from ..files import damaged


def require_as_written(path: Path, what: str) -> None:
    """Raise `InputError` as `require_whole` does, and unless PyTorch reads of each member what its checksum says.

    PyTorch compares no checksum, and one changed bit of the archive's directory, by which a member is told from a
    folder, has it take zeros for a weight.
    """
    require_whole(path, what)
    with ZipFile(path) as archive:
        members = archive.infolist()
    if folders := [each.filename for each in members if each.file_size and (each.is_dir() or each.external_attr & 16)]:
        raise damaged(what, path, f"{folders[0]} is a folder in which there are bytes")
    if not any(each.CRC for each in members):
        return
    sums = {each.filename.partition("/")[2]: each.CRC for each in members}
    try:
        with path.open("rb") as file:
            reader = torch._C.PyTorchFileReader(file)
            bad = [name for name in reader.get_all_records() if crc32(reader.get_record(name)) != sums.get(name)]
    except RuntimeError as error:
        raise damaged(what, path, str(error).splitlines()[0]) from None
    if bad:
        raise damaged(what, path, f"{bad[0]} is not what its checksum says where PyTorch reads it")
