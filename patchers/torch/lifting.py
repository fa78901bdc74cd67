"""Calls of a traced graph turned into the modules that such calls come from, and back.

They are BatchNorms, and the convolutions and linear layers that may be in front of one.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.nn.modules.batchnorm import _BatchNorm

from .graphs import AFFINE, COUNT, STATISTICS, Norm, norms_of, place, returns_many
from .linears import Linear, linears_of

_RANKS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class BatchNorm(_BatchNorm):
    """A BatchNorm of a graph that does not tell how many dimensions its input has."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass


class FrozenBatchNorm2d(nn.Module):
    """A constant scale and shift in four buffers, of (N, C, H, W) input."""

    eps: float

    def forward(self, x: Tensor) -> Tensor:
        """Return (x - running_mean) / sqrt(running_var + eps) · weight + bias, whatever the mode."""
        tensors: dict[str, Any] = {name: getattr(self, name) for name in (*STATISTICS, *AFFINE)}
        return F.batch_norm(x, **tensors, training=False, eps=self.eps)


class Lift:
    """Some calls of a graph module turned into modules, in place and reversibly.

    The object that holds a call's tensors becomes the layer, so that every tensor keeps its name. Training and
    inference can be chosen from then on, also where `torch.export` forbids it. ``name`` is the graph module's, and
    ``calls`` are what is turned into which object.
    """

    def __init__(self, name: str, module: GraphModule, calls: Sequence[tuple[Norm | Linear, nn.Module]]) -> None:
        self.name, self.module, self.calls = name, module, calls
        self.graph = module.graph
        self.before: list[dict[str, Any]] = []
        self.compared = False
        self.stubs: dict[str, Any] = {}

    def of(self, names: Collection[str]) -> "Lift":
        """Return what turns the calls with these names alone into modules, the same objects as this does."""
        prefix = f"{self.name}." if self.name else ""
        return Lift(self.name, self.module, [(call, home) for call, home in self.calls if prefix + call.name in names])

    def apply(self) -> None:
        """Turn the calls into modules."""
        if not self.calls:
            return
        lifted = _lifted(self.graph, [call for call, _ in self.calls])
        for call, home in self.calls:
            self.before.append(dict(vars(home)))
            _gather(self.module, call, home)
            if isinstance(call, Norm):
                _become(home, call)
            else:
                call.become(home)
        self.stubs = {name: vars(self.module).pop(name) for name in ("train", "eval") if name in vars(self.module)}
        self.module.graph = lifted

    def restore(self) -> None:
        """Turn the modules into calls again, with the tensors of the present."""
        for (call, home), before in zip(self.calls, self.before, strict=False):
            home.__class__ = nn.Module
            home.training = before["training"]
            for key in vars(home).keys() - before.keys():
                del vars(home)[key]
            for group in (home._parameters, home._buffers):
                for name in [name for name, tensor in group.items() if tensor is None]:
                    del group[name]
            _scatter(self.module, call, home)
        if self.before:
            vars(self.module).update(self.stubs)
            self.module.graph = self.graph
        self.before.clear()

    def as_original(self) -> AbstractContextManager[None]:
        """Change nothing: the modules compute what the calls did."""
        return nullcontext()

    def accept(self, found: Any) -> None:
        """Do nothing: the tensors are the calls' own."""

    def trained(self) -> bool:
        """Return False: what the modules hold is the calls' own."""
        return False


def lifts(model: nn.Module) -> list[Lift]:
    """Return what turns the calls in each graph of ``model`` into modules, as far as they can be."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, GraphModule):
            known: list[Norm | Linear] = [*norms_of(module), *linears_of(module)]
            calls = [call for call in known if not call.obstacle]
            homes = [(call, _home(module, call)) for call in calls]
            found.append(Lift(".".join(part for part in name.split(".") if part != "_orig_mod"), module, homes))
    return found


@contextmanager
def lifted(model: nn.Module) -> Iterator[list[Lift]]:
    """Run the body with the calls in the graphs of ``model`` as modules."""
    found = lifts(model)
    try:
        for lift in found:
            lift.apply()
        yield found
    finally:
        for lift in reversed(found):
            lift.restore()


def _lifted(graph: Graph, calls: Sequence[Norm | Linear]) -> Graph:
    """Return a copy of ``graph`` with modules for the calls."""
    nodes: dict[Node, Node] = {}
    new = Graph(tracer_cls=graph._tracer_cls)
    new.output(new.graph_copy(graph, nodes))
    new.set_codegen(graph._codegen)
    for call in calls:
        for node in call.calls:
            old = nodes[node]
            outputs = [user for user in old.users if user.args[1] == 0] if returns_many(node) else [old]
            with new.inserting_before(old):
                module_call = new.create_node("call_module", call.name, (call.input_of(old),))
            for output in outputs:
                module_call.meta = dict(output.meta)
                output.replace_all_uses_with(module_call)
    doomed = {node for call in calls for node in call.doomed}
    for node in reversed(graph.nodes):
        if node in doomed:
            new.erase_node(nodes[node])
    return new


def _home(module: GraphModule, call: Norm | Linear) -> nn.Module:
    """Return the module that holds the tensors of a call, or a new one for them."""
    above, own = place(module, call.name)
    return above._modules.get(own) or nn.Module()


def _gather(module: GraphModule, call: Norm | Linear, home: nn.Module) -> None:
    """Move the tensors of a call into its home, as far as they lie elsewhere."""
    above, own = place(module, call.name)
    above._modules[own] = home
    for name, attribute in call.attributes.items():
        if attribute != f"{call.name}.{name}":
            _move(place(module, attribute), (home, name))


def _scatter(module: GraphModule, call: Norm | Linear, home: nn.Module) -> None:
    """Move the tensors of a call back to where the graph reads them."""
    for name, attribute in call.attributes.items():
        if attribute != f"{call.name}.{name}":
            _move((home, name), place(module, attribute))
    if not any(attribute.startswith(f"{call.name}.") for attribute in call.attributes.values()):
        above, own = place(module, call.name)
        del above._modules[own]


def _move(source: tuple[nn.Module, str], target: tuple[nn.Module, str]) -> None:
    holder, name = source
    group = "_parameters" if name in holder._parameters else "_buffers"
    getattr(target[0], group)[target[1]] = getattr(holder, group).pop(name)


def _become(home: nn.Module, norm: Norm) -> None:
    """Make the module that holds the tensors of ``norm`` the BatchNorm it is."""
    tensors: dict[str, Any] = {**home._buffers, **home._parameters}
    constant = not any(tensors.get(name) is None or name in home._parameters for name in (*AFFINE, *STATISTICS))
    frozen = constant and not norm.settings["training"] and norm.settings["rank"] in (2, None)
    for name in (*AFFINE, *STATISTICS, COUNT):
        if name not in tensors:
            (home._parameters if name in AFFINE else home._buffers)[name] = None
    home.training = bool(norm.settings["training"])
    home.__dict__["eps"] = norm.settings["eps"]
    if frozen:
        home.__class__ = FrozenBatchNorm2d
        return
    home.__dict__.update(
        {
            "num_features": norm.channels,
            "momentum": norm.settings["momentum"],
            "affine": tensors.get("weight") is not None,
            "track_running_stats": tensors.get("running_mean") is not None,
        }
    )
    home.__class__ = _RANKS.get(norm.settings["rank"], BatchNorm)
