"""How a Keras normalization layer is written in ONNX: as the operators runtimes know.

TensorFlow spells a normalization out in up to 31 operators, in its own layout. So each call is traced as one mark,
channels first, and the mark is then replaced in the ONNX graph: by BatchNormalization for layers that use running
statistics alone, by the InstanceNormalization pattern for GroupNormalization, and for SwitchNormalization by its
formula on constants.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import keras
import numpy as np
import onnx_ir as ir
from onnx_ir import tape

from ..layers.keras import BatchRenormalization, SwitchNormalization
from ..patchers.keras import MARK
from ..patchers.keras_walk import named_layers
from .keras_graph import mark

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Call:
    """One normalization call: the layer, and the shape (N, channels, *spatial) it has channels first."""

    layer: Any
    channels: int
    spatial: tuple[int | None, ...]

    def vector(self, name: str, default: float) -> Array:
        """Return the layer's variable ``name`` (C,), or ``default`` where it has none."""
        variable = getattr(self.layer, name)
        if variable is None:
            return np.full(self.channels, default, np.float32)
        return np.asarray(keras.ops.convert_to_numpy(variable), np.float32)


@dataclass
class StandIns:
    """The normalization calls of one trace; the n-th left the mark n."""

    calls: list[Call] = field(default_factory=list)

    @contextmanager
    def standing_in(self, model: Any) -> Iterator[None]:
        """Let every layer of ``model`` that has a form leave a mark in place of its own output."""
        self.calls.clear()
        layers = {id(layer): layer for _, layer in named_layers(model) if _form_of(layer) is not None}.values()
        before = [dict(vars(layer)) for layer in layers]
        try:
            for layer in layers:
                vars(layer)["call"] = self._stand_in(layer, layer.call)
            yield
        finally:
            for layer, own in zip(layers, before, strict=True):
                del vars(layer)["call"]
                vars(layer).update({"call": own["call"]} if "call" in own else {})

    def _stand_in(self, layer: Any, call: Callable[..., Any]) -> Callable[..., Any]:
        def stand_in(inputs: Any, *args: Any, **kwargs: Any) -> Any:
            rank = len(inputs.shape)
            training = kwargs.get("training") or any(arg is True for arg in args)
            if training or layer.axis not in {-1, rank - 1, 1}:
                return call(inputs, *args, **kwargs)
            last = rank > 2 and layer.axis != 1
            x = keras.ops.moveaxis(inputs, -1, 1) if last else inputs
            y = mark(x, len(self.calls))
            self.calls.append(Call(layer, int(x.shape[1]), tuple(x.shape[2:])))
            y = keras.ops.moveaxis(y, 1, -1) if last else y
            return keras.ops.cast(y, layer.compute_dtype)

        return stand_in

    def write(self, model: ir.Model, marks: Mapping[int, ir.Node]) -> None:
        """Put each layer's operators in the place of its mark."""
        for number, call in enumerate(self.calls):
            _Writer(model, f"{call.layer.name}_{number}").write(call, marks[number])


class _Writer:
    """Builds the nodes that take one mark's place."""

    def __init__(self, model: ir.Model, prefix: str) -> None:
        self._graph, self._opset = model.graph, model.opset_imports[""]
        self._prefix, self._tape = prefix, tape.Tape()

    def constant(self, name: str, array: Array) -> ir.Value:
        """Return a new initializer, its name below the layer's."""
        name = f"{self._prefix}/{name}"
        value = ir.val(name, const_value=ir.tensor(array, name=name))
        self._graph.register_initializer(value)
        return value

    def op(self, op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        """Append an operator and return its output."""
        return self._tape.op(op_type, inputs, attributes)

    def mean(self, x: ir.Value, axes: Sequence[int], name: str) -> ir.Value:
        """Append a mean over ``axes``, which stay with size 1."""
        if self._opset < 18:
            return self.op("ReduceMean", x, axes=list(axes))
        return self.op("ReduceMean", x, self.constant(name, np.array(axes, np.int64)))

    def write(self, call: Call, node: ir.Node) -> None:
        """Replace ``node`` by the layer's operators."""
        form, old, x = _form_of(call.layer), node.outputs[0], node.inputs[0]
        assert form is not None
        assert x is not None
        new = form(self, call, x)
        new.shape, new.type = old.shape, old.type
        self._graph.insert_before(node, self._tape.nodes)
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        self._graph.remove(node, safe=True)
        new.name = old.name


def _batch_norm(writer: _Writer, call: Call, x: ir.Value) -> ir.Value:
    return writer.op(
        "BatchNormalization",
        x,
        writer.constant("gamma", call.vector("gamma", 1)),
        writer.constant("beta", call.vector("beta", 0)),
        writer.constant("mean", call.vector("moving_mean", 0)),
        writer.constant("variance", call.vector("moving_variance", 1)),
        epsilon=float(call.layer.epsilon),
    )


def _group_norm(writer: _Writer, call: Call, x: ir.Value) -> ir.Value:
    groups = int(call.layer.groups)
    each = (call.channels, *[1] * len(call.spatial))
    grouped = writer.op("Reshape", x, writer.constant("groups", np.array([0, groups, -1], np.int64)))
    normalized = writer.op(
        "InstanceNormalization",
        grouped,
        writer.constant("one", np.ones(groups, np.float32)),
        writer.constant("zero", np.zeros(groups, np.float32)),
        epsilon=float(call.layer.epsilon),
    )
    if None in call.spatial:
        shape = writer.op("Shape", x)
    else:
        shape = writer.constant("shape", np.array([0, call.channels, *call.spatial], np.int64))
    restored = writer.op("Reshape", normalized, shape)
    scaled = writer.op("Mul", restored, writer.constant("gamma", call.vector("gamma", 1).reshape(each)))
    return writer.op("Add", scaled, writer.constant("beta", call.vector("beta", 0).reshape(each)))


def _switch_norm(writer: _Writer, call: Call, x: ir.Value) -> ir.Value:
    """Write the centred form: a mean far above the deviation costs no digits."""
    layer, op = call.layer, writer.op
    frozen = layer.batch_statistics != "none"
    (m_in, m_ln, *m_bn), (v_in, v_ln, *v_bn) = (
        np.asarray(keras.ops.convert_to_numpy(gates), np.float32) for gates in layer.gates()
    )
    if frozen and m_bn[0] == v_bn[0] == 1:
        return _batch_norm(writer, call, x)
    each = (1, call.channels, *[1] * len(call.spatial))
    spatial = list(range(2, len(each)))
    centred, instance_mean, instance_var = x, x, None
    if spatial:
        instance_mean = writer.mean(x, spatial, "spatial")
        centred = op("Sub", x, instance_mean)
        instance_var = writer.mean(op("Mul", centred, centred), spatial, "spatial_")
    layer_mean = writer.mean(instance_mean, [1], "channels")
    between = op("Sub", instance_mean, layer_mean)
    squares = op("Mul", between, between)
    layer_var = writer.mean(squares if instance_var is None else op("Add", instance_var, squares), [1], "channels_")
    if instance_var is None:  # one value per channel: the layer's statistics stand for the instance's
        m_in, m_ln, v_in, v_ln = (np.float32(0), m_in + m_ln, np.float32(0), v_in + v_ln)

    def weighted(gate: Any, value: ir.Value | None, name: str) -> list[ir.Value]:
        return [] if value is None or gate == 0 else [op("Mul", value, writer.constant(name, np.asarray(gate)))]

    running_mean = call.vector("moving_mean", 0) * m_bn[0] if frozen else np.zeros(call.channels, np.float32)
    running_var = call.vector("moving_variance", 0) * v_bn[0] if frozen else np.zeros(call.channels, np.float32)
    mean = [
        *weighted(m_in, instance_mean, "mean_gate_instance"),
        *weighted(m_ln, layer_mean, "mean_gate_layer"),
        writer.constant("mean", running_mean.reshape(each)),
    ]
    var = [
        *weighted(v_in, instance_var, "var_gate_instance"),
        *weighted(v_ln, layer_var, "var_gate_layer"),
        writer.constant("variance", (running_var + np.float32(layer.epsilon)).reshape(each)),
    ]
    deviation = op("Sqrt", reduce(lambda a, b: op("Add", a, b), var))
    scale = op("Div", writer.constant("gamma", call.vector("gamma", 1).reshape(each)), deviation)
    beta = writer.constant("beta", call.vector("beta", 0).reshape(each))
    offset = op("Sub", instance_mean, reduce(lambda a, b: op("Add", a, b), mean))
    if not spatial:
        return op("Add", op("Mul", offset, scale), beta)
    return op("Add", op("Mul", centred, scale), op("Add", op("Mul", offset, scale), beta))


Form = Callable[[_Writer, Call, ir.Value], ir.Value]

_FORMS: dict[type, Form] = {
    keras.layers.BatchNormalization: _batch_norm,
    keras.layers.GroupNormalization: _group_norm,
    BatchRenormalization: _batch_norm,
    SwitchNormalization: _switch_norm,
}


def _form_of(layer: Any) -> Form | None:
    """Return the form for ``layer``'s ``call``, unless a subclass or a user has put another in its place."""
    if "call" in vars(layer) and MARK not in vars(layer):
        return None
    return next((form for cls, form in _FORMS.items() if type(layer).call is cls.call), None)  # type: ignore[attr-defined]
