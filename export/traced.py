"""What a framework's half hands to the shared half of the exporter."""

from dataclasses import dataclass, field

import onnx_ir as ir

from .norms import Norm


@dataclass
class Traced:
    """A model as an ONNX graph, before anything is folded.

    ``model``'s graph inputs and outputs are the model's own, in its order, named ``inputs`` and ``outputs``; the graph
    may give one value as several outputs. The batch is symbolic ("batch") unless the model fixes it, which ``notes``
    say. ``sites`` maps each layer that has weights, in call order, to the name of the graph value
    it returns; the second call of a shared layer is ``"name#2"``. ``norms`` are nodes of one input and one output, in
    whose place the operators of a norm are to be written.
    """

    model: ir.Model
    inputs: list[str]
    outputs: list[str]
    sites: dict[str, str]
    norms: dict[ir.Node, Norm] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass
class Program:
    """A model as the content of a file that is not ONNX, with the shapes of its inputs and the number of operators."""

    content: bytes
    inputs: dict[str, list[int | str | None]]
    operators: int
    notes: list[str] = field(default_factory=list)
