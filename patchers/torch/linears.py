"""The convolutions and linear layers of a traced graph, which are calls there."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from .graphs import AFFINE, attribute_of, place

_CONVOLUTION = ("input", *AFFINE, "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", *AFFINE, "stride", "padding", "output_padding", "groups", "dilation")
_PYTHON: dict[Any, tuple[str, ...]] = {
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _CONVOLUTION),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), _TRANSPOSED),
    F.linear: ("input", *AFFINE),
}
_ATEN = {
    *("aten::conv1d", "aten::conv2d", "aten::conv3d", "aten::convolution", "aten::linear", "aten::addmm", "aten::mm"),
    *("aten::conv_transpose1d", "aten::conv_transpose2d", "aten::conv_transpose3d"),
}
_TURNS: dict[Any, tuple[Any, ...]] = {
    torch.ops.aten.t.default: (),
    torch.ops.aten.permute.default: ([1, 0],),
    torch.ops.aten.transpose.int: (0, 1),
}
_SETTINGS: dict[str, Any] = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
_CLASSES: dict[tuple[int, bool], type[nn.Module]] = {
    (1, False): nn.Conv1d,
    (2, False): nn.Conv2d,
    (3, False): nn.Conv3d,
    (1, True): nn.ConvTranspose1d,
    (2, True): nn.ConvTranspose2d,
    (3, True): nn.ConvTranspose3d,
}


@dataclass
class Linear:
    """One convolution, transposed convolution or linear layer of a graph: a call with a weight, and maybe a bias.

    ``name`` is that of the module it would be, which holds both in the graph module under their names there, so that
    neither moves; of a call that cannot be one, for the reason in ``obstacle``, the node's. ``layer`` is such a module
    without values, ``attributes`` says where the tensors are, ``doomed`` are the nodes that only serve the call.
    """

    name: str
    calls: list[Node]
    attributes: dict[str, str] = field(default_factory=dict)
    layer: nn.Module | None = None
    obstacle: str = ""
    doomed: set[Node] = field(default_factory=set)

    def input_of(self, call: Node) -> Any:
        """Return what ``call``, or its copy in another graph, takes besides the weight and the bias."""
        arguments = _arguments(call)
        assert arguments is not None
        return arguments["input"]

    def become(self, home: nn.Module) -> None:
        """Make the module that holds the tensors the layer it is."""
        assert self.layer is not None
        base = vars(nn.Module())
        home.__dict__.update({name: value for name, value in vars(self.layer).items() if name not in base})
        home._parameters.setdefault("bias", None)
        home.__class__ = type(self.layer)


def linears_of(module: nn.Module) -> list[Linear]:
    """Return the convolutions and linear layers that are calls in the graph of ``module``."""
    if not isinstance(module, GraphModule):
        return []
    readers: dict[str, list[Node]] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            readers.setdefault(str(node.target), []).append(node)
    found = ((node, _arguments(node)) for node in module.graph.nodes)
    return [_read(module, node, arguments, readers) for node, arguments in found if arguments is not None]


def kept_calls(module: nn.Module) -> dict[str, str]:
    """Return why a call whose output goes straight to a module of the graph is none itself, by that module's name."""
    return {
        str(user.target): f"{linear.name}: {linear.obstacle}"
        for linear in linears_of(module)
        for user in (linear.calls[0].users if linear.obstacle else ())
        if user.op == "call_module"
    }


def _read(module: GraphModule, node: Node, arguments: Mapping[str, Any], readers: Mapping[str, list[Node]]) -> Linear:
    linear = Linear(node.name, [node], doomed={node})
    tensors = {name: value for name in AFFINE if (value := arguments.get(name)) is not None}
    for name, value in tensors.items():
        attribute, problem = attribute_of(module, name, value, "parameter")
        if problem:
            linear.obstacle = problem
            return linear
        linear.attributes[name] = attribute
    parent = linear.attributes["weight"].rpartition(".")[0]
    linear.obstacle = (
        _misplaced(module, linear.attributes, parent) or _unknown(arguments) or _claim(linear, arguments, readers)
    )
    if not linear.obstacle:
        weight, bias = (module.get_submodule(parent)._parameters.get(name) for name in AFFINE)
        assert weight is not None
        linear.name = parent
        linear.layer, linear.obstacle = _layer(arguments, weight, bias)
    return linear


def _arguments(node: Node) -> dict[str, Any] | None:
    """Return the arguments of a call of a convolution or linear layer by name, None for other nodes."""
    function: Any = node.target
    if node.op != "call_function":
        return None
    if function in _PYTHON:
        names = _PYTHON[function]
    elif (schema := getattr(function, "_schema", None)) is not None and schema.name in _ATEN:
        names = tuple(argument.name for argument in schema.arguments)
    else:
        return None
    named = {"transposed": "conv_transpose" in str(function)} | dict(zip(names, node.args, strict=False)) | node.kwargs
    return _of_product(named) if "mat2" in named else named


def _of_product(named: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the arguments of the linear layer that a matrix product is, None if its right factor is no transpose."""
    turned = named["mat2"]
    if not isinstance(turned, Node) or turned.target not in _TURNS or turned.args[1:] != _TURNS[turned.target]:
        return None
    if named.get("alpha", 1) != 1 or named.get("beta", 1) != 1:
        return None
    bias = named["self"] if "mat1" in named else None
    x = named.get("mat1", named["self"])
    return {"input": x, "weight": turned.args[0], "bias": bias, "turned": turned, "transposed": False}


def _misplaced(module: GraphModule, attributes: Mapping[str, str], parent: str) -> str:
    """Return why a module could not be the layer while its tensors stay where they are."""
    for name, attribute in attributes.items():
        holder, own = place(module, attribute)
        if own not in holder._parameters:
            return f"its {name} is a buffer of the graph, {attribute}: make it a parameter"
        if not parent or attribute != f"{parent}.{name}":
            return f"its {name} is called {attribute}: call it {parent or 'LAYER'}.{name}"
        if type(holder) is not nn.Module:
            return f"its {name} belongs to a {type(holder).__name__}, {parent}"
    if "bias" not in attributes and hasattr(module.get_submodule(parent), "bias"):
        return f"it does without {parent}.bias"
    return ""


def _unknown(arguments: Mapping[str, Any]) -> str:
    """Return which setting of a call only the graph knows."""
    for name in (*_SETTINGS, "output_padding"):
        value = arguments.get(name)
        if any(isinstance(each, Node) for each in (value if isinstance(value, tuple | list) else [value])):
            return f"its {name} is computed in the graph"
    return ""


def _claim(linear: Linear, arguments: Mapping[str, Any], readers: Mapping[str, list[Node]]) -> str:
    """Collect the nodes that only serve the call; return what else uses its tensors, "" if nothing does."""
    turned = arguments.get("turned")
    linear.doomed |= set() if turned is None else {turned}
    for attribute in linear.attributes.values():
        linear.doomed.update(readers[attribute])
    for node in linear.doomed - {linear.calls[0]}:
        if others := [user for user in node.users if user not in linear.doomed]:
            read = next((name for name, attribute in linear.attributes.items() if attribute == node.target), "weight")
            return f"its {read} is read by {others[0].name} too"
    return ""


def _layer(arguments: Mapping[str, Any], weight: Tensor, bias: Tensor | None) -> tuple[nn.Module | None, str]:
    """Return the layer, without values, that computes what a call does, and what is wrong with its tensors."""
    named = {**_SETTINGS, **{name: value for name, value in arguments.items() if value is not None}}
    groups, transposed, rank, shape = named["groups"], named["transposed"], weight.ndim - 2, tuple(weight.shape)
    if rank == 0:
        outputs, inputs = shape
        layer: nn.Module = nn.Linear(inputs, outputs, bias is not None, device="meta")
    elif (rank, transposed) in _CLASSES:
        inputs, outputs = (shape[0], shape[1] * groups) if transposed else (shape[1] * groups, shape[0])
        settings = {name: _each(named[name], rank) for name in ("stride", "padding", "dilation")}
        if transposed:
            settings["output_padding"] = _each(named.get("output_padding", 0), rank)
        cls: Any = _CLASSES[rank, transposed]
        layer = cls(inputs, outputs, shape[2:], groups=groups, bias=bias is not None, device="meta", **settings)
    else:
        return None, f"its weight has {weight.ndim} dimensions"
    if bias is not None and tuple(bias.shape) != (outputs,):
        return None, f"its bias has the shape {tuple(bias.shape)}"
    return layer, ""


def _each(value: Any, rank: int) -> Any:
    """Return a setting of a convolution for each of its dimensions; a padding may be a word."""
    if isinstance(value, str):
        return value
    several = tuple(value) if isinstance(value, tuple | list) else (value,)
    return several * rank if len(several) == 1 else several
