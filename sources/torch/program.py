"""A file of `torch.export`, read where it is trusted."""

import warnings
from pathlib import Path

import torch
from torch.export import ExportedProgram

from ...errors import InputError, option
from ..files import require_file
from .archive import require_as_written


def read_program(path: Path, *, trust: bool) -> ExportedProgram:
    """Return the program in a ``.pt2`` file that `torch.export.save` wrote.

    Raises `InputError` unless ``trust`` says that the file may run code, which reading one can, or if it is damaged.
    """
    require_file(path)
    if not trust:
        raise InputError(
            f"expected a model that is read without running code, received {path}, which torch.export unpickles; "
            f"if you trust whoever made it, add {option('trust')}"
        )
    require_as_written(path, "a program of torch.export")  # or torch would log a traceback
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.load(path)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"expected a program of torch.export in {path}, received a file it refuses: {reason}"
        ) from error
