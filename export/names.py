"""Names in a graph: inputs and outputs have the model's own, and every value has one that no other has."""

from collections.abc import Iterator, Sequence

import onnx_ir as ir

from ..frameworks.names import unique


def settle(graph: ir.Graph, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Give the graph's inputs and outputs their names, and another one to whatever else is called like these.

    Of several values with one name the first has it, a node's output before a constant. A value that is several outputs
    has the first of their names until `part` gives each its own.
    """
    named = {
        id(value): (value, name)
        for value, name in reversed(list(zip([*graph.inputs, *graph.outputs], [*inputs, *outputs], strict=True)))
    }
    values = list(_values(graph))
    taken = {name for _, name in named.values()}
    met = taken | {value.name for value in values if value.name is not None}

    def rename(value: ir.Value) -> None:
        value.name = unique(value.name or "value", met)
        met.add(value.name)

    for value in (value for value in values if id(value) not in named):
        if value.name is None or value.name in taken:
            rename(value)
        taken.add(str(value.name))
    for value, _ in named.values():  # of which two may have each other's name
        rename(value)
    for value, name in named.values():
        value.name = name


def part(graph: ir.Graph) -> None:
    """Let every output be a value of its own: one that is an output already, an input or a constant is copied.

    So it is within nodes, whose graphs may return what is outside of them too.
    """
    for each in (graph, *graph.subgraphs()):
        own: set[int] = set()
        for index, value in enumerate(each.outputs):
            node = value.producer()
            if id(value) in own or node is None or node.graph is not each:
                copied = ir.node("Identity", [value])
                copy = copied.outputs[0]
                copy.name, copy.shape, copy.type = None, value.shape, value.type
                each.append(copied)
                each.outputs[index] = copy
            own.add(id(each.outputs[index]))


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    """Yield every value of a graph and of those within its nodes once."""
    yield from graph.inputs
    for node in ir.traversal.RecursiveGraphIterator(graph):
        yield from node.outputs
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                yield from _inner(attribute.as_graph())
            elif attribute.type == ir.AttributeType.GRAPHS:
                for each in attribute.as_graphs():
                    yield from _inner(each)
    yield from list(graph.initializers.values())


def _inner(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from list(graph.initializers.values())
