"""Programs of `torch.export`, turned into modules that can be worked with."""

from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.nn.modules.batchnorm import _BatchNorm

from .graphs import Norm, free_name
from .lifting import lifts

_DROPOUTS: dict[Any, type[nn.Module]] = {
    torch.ops.aten.dropout.default: nn.Dropout,
    torch.ops.aten.dropout_.default: nn.Dropout,
    torch.ops.aten.feature_dropout.default: nn.Dropout2d,
}


def as_module(program: ExportedProgram) -> GraphModule:
    """Return an exported program as a module whose BatchNorms and dropouts are modules too.

    They obey ``train()`` and ``eval()``, and each starts in the mode it was exported in; whatever else depends on the
    mode stays as it was exported. The BatchNorms, and the convolutions and linear layers that may be in front of one,
    have their own tensors, all others are the program's, as in `ExportedProgram.module`.
    """
    module = program.module()
    _drop_by_module(module)
    owners = Counter(id(p) for m in module.modules() for p in m._parameters.values())
    for lift in lifts(module):
        lift.of({call.name for call, _ in lift.calls if isinstance(call, Norm)}).apply()
        for call, home in lift.calls:
            for name, parameter in home._parameters.items():
                if parameter is not None and (isinstance(call, Norm) or owners[id(parameter)] == 1):
                    home._parameters[name] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            for name, buffer in home._buffers.items() if isinstance(call, Norm) else ():
                home._buffers[name] = None if buffer is None else buffer.detach().clone()
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
