"""Programs of `torch.export`: read where they are trusted, and turned into modules that can be worked with."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import InputError
from .files import require_file
from .graphs import free_name
from .lifting import lifts

_DROPOUTS: dict[Any, type[nn.Module]] = {
    torch.ops.aten.dropout.default: nn.Dropout,
    torch.ops.aten.dropout_.default: nn.Dropout,
    torch.ops.aten.feature_dropout.default: nn.Dropout2d,
}


def read_program(path: Path, *, trust: bool) -> GraphModule:
    """Return the module in a ``.pt2`` file that `torch.export.save` wrote; see `as_module`.

    Raises `InputError` unless ``trust`` says that the file may run code, which reading one can, or if it is damaged.
    """
    require_file(path)
    if not trust:
        raise InputError(
            f"expected a model that is read without running code, received {path}, which torch.export unpickles; "
            "if you trust whoever made it, add --trust (trust=True)"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.load(path)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"expected a program of torch.export in {path}, received a file it refuses: {reason}"
        ) from error
    return as_module(program)


def as_module(program: ExportedProgram) -> GraphModule:
    """Return an exported program as a module whose BatchNorms and dropouts are modules too.

    They obey ``train()`` and ``eval()``, and each starts in the mode it was exported in; whatever else depends on the
    mode stays as it was exported. The BatchNorms have their own tensors, all others are the program's, as in
    `ExportedProgram.module`.
    """
    module = program.module()
    _drop_by_module(module)
    for lift in lifts(module):
        lift.apply()
        for _, norm in lift.norms:
            for name, parameter in norm._parameters.items():
                if parameter is not None:
                    norm._parameters[name] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            for name, buffer in norm._buffers.items():
                norm._buffers[name] = None if buffer is None else buffer.detach().clone()
    for name in {"train", "eval"} & vars(module).keys():  # which refuse
        delattr(module, name)
    modes = {m: m.training for m in module.modules() if isinstance(m, (_BatchNorm, *_DROPOUTS.values()))}
    module.train(any(modes.values()))
    for with_mode, training in modes.items():
        with_mode.training = training
    return module


def _drop_by_module(module: GraphModule) -> None:
    """Turn the calls of dropout in a graph into modules."""
    calls = [node for node in module.graph.nodes if node.op == "call_function" and node.target in _DROPOUTS]
    for node in calls:
        x, p, training = node.args
        name = free_name(module, node.name)
        setattr(module, name, _DROPOUTS[node.target](p).train(training))
        with module.graph.inserting_before(node):
            call = module.graph.call_module(name, (x,))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        module.graph.erase_node(node)
    if calls:
        module.recompile()
