"""The BatchNorms of a traced graph, which are calls there."""

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

AFFINE = ("weight", "bias")
STATISTICS = ("running_mean", "running_var")
COUNT = "num_batches_tracked"
_PYTHON: dict[Any, tuple[str, ...]] = {
    F.batch_norm: ("input", *STATISTICS, *AFFINE, "training", "momentum", "eps"),
    torch.batch_norm: ("input", *AFFINE, *STATISTICS, "training", "momentum", "eps", "cudnn_enabled"),
}
_ATEN = {
    *("aten::batch_norm", "aten::native_batch_norm", "aten::cudnn_batch_norm", "aten::miopen_batch_norm"),
    *("aten::_native_batch_norm_legit", "aten::_native_batch_norm_legit_functional"),
    *("aten::_batch_norm_with_update", "aten::_batch_norm_with_update_functional"),
    *("aten::_native_batch_norm_legit_no_training", "aten::_batch_norm_no_update"),
}
_UPDATES = {
    *(torch.ops.aten.copy_.default, torch.ops.aten.add_.Tensor, torch.ops.aten.add.Tensor, operator.iadd),
    *("copy_", "add_"),
}


@dataclass
class Norm:
    """One BatchNorm of a graph: the calls that share its tensors.

    ``name`` is that of the module it is, or would be; ``attributes`` says where the graph module holds each of its
    tensors. ``doomed`` are the nodes that only serve these calls. ``obstacle`` says why the calls cannot be those of
    a module, "" where they can.
    """

    name: str
    channels: int
    settings: dict[str, Any]
    attributes: dict[str, str]
    calls: list[Node]
    obstacle: str
    doomed: set[Node] = field(default_factory=set)

    def input_of(self, call: Node) -> Any:
        """Return what one of the calls, or its copy in another graph, normalizes."""
        arguments = arguments_of(call)
        assert arguments is not None
        return arguments["input"]


def norms_of(module: nn.Module) -> list[Norm]:
    """Return the BatchNorms that are calls in the graph of ``module``; there are none in what has no graph."""
    if not isinstance(module, GraphModule):
        return []
    found: dict[str | Node, Norm] = {}
    readers: dict[str, list[Node]] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            readers.setdefault(node.target, []).append(node)
        norm = _read(module, node)
        if norm is None:
            continue
        key = norm.attributes.get("running_mean", norm.attributes.get("weight", node))
        first = found.setdefault(key, norm)
        if first is not norm:
            first.calls += norm.calls
            if (first.settings, first.attributes) != (norm.settings, norm.attributes):
                first.obstacle = first.obstacle or f"{node.name} takes its statistics with another scale, shift or eps"
    for norm in found.values():
        norm.obstacle = norm.obstacle or _claim(norm, readers)
    return list(found.values())


def _read(module: GraphModule, node: Node) -> Norm | None:
    """Return the BatchNorm that a node calls, None if it calls none."""
    arguments = arguments_of(node)
    if arguments is None:
        return None
    attributes: dict[str, str] = {}
    problems = [] if arguments else [f"{node.target} is no form of batch_norm that is known"]
    for name in (*STATISTICS, *AFFINE):
        attribute, problem = attribute_of(module, name, arguments.get(name), "buffer")
        if attribute:
            attributes[name] = attribute
        elif problem:
            problems.append(problem)
    if "weight" not in attributes and "no_stats" in str(node.target):
        return None  # what a decomposed InstanceNorm computes
    settings = {name: arguments.get(name) for name in ("training", "momentum", "eps")}
    problems += [f"its {name} is computed in the graph" for name, v in settings.items() if isinstance(v, Node)]
    value = arguments["input"].meta.get("val") if isinstance(arguments.get("input"), Node) else None
    settings["rank"] = None if value is None else max(1, value.ndim - 2)
    tensor = next((_tensor(module, attribute) for attribute in attributes.values()), None)
    channels = int(value.shape[1]) if tensor is None and value is not None else 0 if tensor is None else tensor.numel()
    if not channels:
        problems.append("its number of channels is not known")
    name, problem = _home(module, node, arguments, attributes)
    return Norm(name, channels, settings, attributes, [node], next(filter(None, [*problems, problem]), ""))


def arguments_of(node: Node) -> dict[str, Any] | None:
    """Return the arguments of a call of batch_norm by name, {} for a form that is not known; None for other nodes."""
    function = node.target
    if node.op != "call_function" or "batch_norm" not in str(function) or "backward" in str(function):
        return None
    if function in _PYTHON:
        defaults = {"training": False, "momentum": 0.1, "eps": 1e-5}
        return defaults | dict(zip(_PYTHON[function], node.args, strict=False)) | node.kwargs
    schema = getattr(function, "_schema", None)
    if schema is None or schema.name not in _ATEN:
        return {}
    named = dict(zip((argument.name for argument in schema.arguments), node.args, strict=False)) | node.kwargs
    renamed = {"epsilon": "eps", "exponential_average_factor": "momentum"}
    named = {renamed.get(name, name): value for name, value in named.items()}
    return {"training": "with_update" in schema.name} | named


def attribute_of(module: GraphModule, name: str, value: Any, wanted: str) -> tuple[str, str]:
    """Return where the graph module holds an argument of a call, and what is wrong with it.

    ``wanted`` is what one that is a constant should be instead.
    """
    while isinstance(value, Node) and value.target is operator.getitem:  # what the call before has updated
        call, index = value.args
        before = arguments_of(call) if isinstance(call, Node) else None
        if not before or index not in (3, 4):
            break
        value = before.get(STATISTICS[int(index) - 3])  # type: ignore[arg-type]
    if value is None:
        return "", ""
    if not isinstance(value, Node):
        return "", f"its {name} is not a tensor of the graph"
    if value.op == "placeholder":
        return "", f"its {name} is an input of the graph, {value.name}: patch the program or its module()"
    if value.op != "get_attr":
        return "", f"its {name} is computed in the graph, by {value.name}"
    if _tensor(module, str(value.target)) is None:
        return "", f"its {name} is a constant of the graph, {value.target}: make it a {wanted}"
    return str(value.target), ""


def _home(
    module: GraphModule, node: Node, arguments: Mapping[str, Any], attributes: Mapping[str, str]
) -> tuple[str, str]:
    """Return the name of the module that holds a BatchNorm's tensors, or of a new one for them, and what is wrong.

    The module is the one that holds the first tensor, if it has the others as well or room for them, and nothing of the
    name of one that the call does without.
    """
    places = {name: place(module, attribute) for name, attribute in attributes.items()}
    for name, (holder, _) in places.items():
        if type(holder) is not nn.Module and holder is not module:
            return node.name, f"its {name} belongs to a {type(holder).__name__}, {attributes[name].rpartition('.')[0]}"
    first, (holder, own) = next(iter(places.items()), ("", (module, "")))
    parent = next(iter(attributes.values()), "").rpartition(".")[0]
    elsewhere = {name for name, attribute in attributes.items() if attribute != f"{parent}.{name}"}
    without = {name for name in (*STATISTICS, *AFFINE) if arguments.get(name) is None}
    if parent and own == first and not any(hasattr(holder, name) for name in elsewhere | without):
        return parent, ""
    own = free_name(holder, node.name)
    return f"{parent}.{own}" if parent else own, ""


def free_name(holder: nn.Module, name: str) -> str:
    """Return a name for a new child of ``holder``: the one given, with underscores behind it while it is taken."""
    while hasattr(holder, name):
        name += "_"
    return name


def _claim(norm: Norm, readers: Mapping[str, list[Node]]) -> str:
    """Collect the nodes that only serve the calls of ``norm``; return what else uses its tensors, "" if nothing does.

    Besides the calls these are the reads of its tensors, and the updates that training writes back.
    """
    for name in AFFINE:
        for read in readers.get(norm.attributes.get(name, ""), ()):
            norm.doomed.add(read)
            for user in read.users:
                if user not in norm.calls:
                    return f"its {name} is read by {user.name} too"
    norm.doomed.update(norm.calls)
    waiting = [read for name in STATISTICS for read in readers.get(norm.attributes.get(name, ""), ())]
    waiting += readers.get(f"{norm.name}.{COUNT}", ())
    for call in norm.calls:
        if returns_many(call):
            outputs = [user for user in call.users if user.target is operator.getitem]
            norm.doomed.update(outputs)
            waiting += [output for output in outputs if output.args[1] != 0]
            if len(outputs) < len(call.users):
                return "its outputs are used together"
    norm.doomed.update(waiting)
    while waiting:
        for user in [user for user in waiting.pop().users if user not in norm.doomed]:
            if user.target not in _UPDATES or user.args[0] not in norm.doomed:
                return f"its statistics are read by {user.name} too"
            norm.doomed.add(user)
            waiting.append(user)
    return ""


def returns_many(call: Node) -> bool:
    """Return whether a call of batch_norm returns more than the normalized tensor, as a tuple."""
    schema = getattr(call.target, "_schema", None)
    return schema is not None and len(schema.returns) > 1


def place(module: GraphModule, attribute: str) -> tuple[nn.Module, str]:
    """Return the module that holds an attribute of a graph module, and the attribute's name there."""
    parent, _, name = attribute.rpartition(".")
    return module.get_submodule(parent), name


def _tensor(module: GraphModule, attribute: str) -> Tensor | None:
    """Return the parameter or buffer that a graph module holds under a name."""
    holder, name = place(module, attribute)
    found = holder._parameters.get(name)
    return holder._buffers.get(name) if found is None else found
