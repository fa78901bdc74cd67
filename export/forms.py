"""How a norm is written in ONNX: few operators, each named after its layer and its part in the formula.

Which form is taken is measured (docs/export.md). With one value of each map read at a time, the cost is the number of
passes over the data: BatchNormalization 1, the forms below 2.7 to 4.

- ``batch``: statistics are constant, one BatchNormalization, which `fold` then takes away;
- ``instance``: a group's statistics alone, the InstanceNormalization pattern, γ and β as a BatchNormalization, or
  InstanceNormalization by itself where every channel is a group;
- ``moments``: E[x] and E[x²] of each map, all else on arrays (N, C), then one Mul and one Add;
- ``shifted``: the same with x less the running mean in place of x, for maps whose mean is far above their deviation;
- ``centred``: the same with x - E[x], where there is no running mean.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isqrt
from typing import Any, Literal, get_args

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from .norms import BATCH, INSTANCE, LAYER, SAFE, Array, Norm

Form = Literal["batch", "instance", "moments", "shifted", "centred"]
Runtime = Literal["portable", "ort", "web"]
RUNTIMES: tuple[Runtime, ...] = get_args(Runtime)

LONG_SUM = 2**17
"""Largest group for InstanceNormalization, whose sums go value by value: beyond, it is off by more than 1.4e-6."""

LONG_SUM_ALIKE = 4096
"""The same where many values are alike, as the zeros of a ReLU are: their roundings add up (65,536 of them: 2e-5)."""

WEB_SUM = 256
"""The same in onnxruntime-web, which has one sum where onnxruntime has one in each lane of SIMD.

It is off by 8 to 10 times as much, and the layers of a network add up: a ResNet-20 with groups of up to 8,192 values is
off by 2e-5, with moments in their place by 2e-6. Moments of longer maps are summed in parts: a U-Net of volumes is off
by 1.8e-5 else, by 1.9e-6 so.
"""

PRODUCT = 512
"""Smallest map whose squares are summed as a product with itself: below it, Mul and ReduceMean are faster."""


def write_norm(model: ir.Model, node: ir.Node, norm: Norm, *, runtime: Runtime, careful: bool = False) -> Form:
    """Put the operators of ``norm`` in the place of ``node``, its one input x (N, C, ...), and return their form."""
    x, old = node.inputs[0], node.outputs[0]
    assert x is not None
    form = choose(norm, alike=_may_be_alike(x), careful=careful, runtime=runtime)
    writer = _Writer(model, norm.reduced(), runtime, form)
    if form == "batch":
        new = writer.batch(x)
    elif form == "instance":
        new = writer.instance(x)
    else:
        new = writer.moments(x)
    new.shape, new.type = old.shape, old.type
    model.graph.insert_before(node, writer.tape.nodes)
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    model.graph.remove(node, safe=True)
    new.name = old.name
    return form


def choose(norm: Norm, *, alike: bool = False, careful: bool = False, runtime: Runtime = "portable") -> Form:
    """Return the fastest form that is safe for a norm in a runtime, or if ``careful`` the one that is for any input.

    ``alike`` says whether many values of its input may be the same.
    """
    norm = norm.reduced()
    if norm.gates == (BATCH, BATCH):
        return "batch"
    if careful and norm.spatial:
        return "centred"
    size = None if norm.values is None else norm.values * norm.channels // norm.groups
    most = WEB_SUM if runtime == "web" else LONG_SUM_ALIKE if alike else LONG_SUM
    short = size is not None and size <= most
    if norm.gates == (LAYER, LAYER) and short and not norm.unbiased and (norm.seen or 0) <= SAFE:
        return "instance"
    if norm.amplification() <= SAFE or not norm.spatial:
        alone = norm.gates == (INSTANCE, INSTANCE) and norm.values is not None and norm.values <= most
        return "instance" if alone and norm.spatial and not norm.unbiased else "moments"
    return "centred" if norm.mean is None else "shifted"


def _may_be_alike(value: ir.Value) -> bool:
    """Whether ``value`` is neither an input nor what a linear layer computes."""
    node = value.producer()
    while node is not None and node.op_type in ("Transpose", "Reshape", "Identity", "Add"):
        if node.op_type == "Add" and node.inputs[1] is not None and node.inputs[1].const_value is None:
            return True
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    return node is not None and node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass
class _Writer:
    """Builds the nodes that compute one norm."""

    model: ir.Model
    norm: Norm
    runtime: Runtime
    form: Form
    tape: Tape = field(default_factory=Tape)

    def constant(self, part: str, array: Any) -> ir.Value:
        """Return a new initializer, named after the layer and ``part``."""
        name = f"{self.norm.name}/{part}"
        value = ir.val(name, const_value=ir.tensor(np.ascontiguousarray(array), name=name))
        self.model.graph.register_initializer(value)
        return value

    def op(self, part: str, op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        """Append an operator, named after the layer and ``part``, and return its output."""
        value = self.tape.op(op_type, inputs, attributes, name=f"{self.norm.name}/{part}")
        value.name = f"{self.norm.name}/{part}"
        return value

    def mean(self, part: str, x: ir.Value, axes: Sequence[int]) -> ir.Value:
        """Append a mean over ``axes``, which stay with size 1."""
        if self.model.opset_imports[""] < 18:
            return self.op(part, "ReduceMean", x, axes=list(axes))
        return self.op(part, "ReduceMean", x, self.constant(f"{part}_axes", np.array(axes, np.int64)))

    def reshape(self, part: str, x: ir.Value, shape: Sequence[int]) -> ir.Value:
        """Append a Reshape; 0 keeps a size."""
        return self.op(part, "Reshape", x, self.constant(f"{part}_shape", np.array(shape, np.int64)))

    def batch(self, x: ir.Value) -> ir.Value:
        """Write the running statistics as a BatchNormalization."""
        norm = self.norm
        assert norm.mean is not None
        assert norm.var is not None
        parts = {"gamma": norm.gamma, "beta": norm.beta, "mean": norm.mean, "var": norm.var}
        constants = [self.constant(part, _float32(array)) for part, array in parts.items()]
        return self.op("batch_norm", "BatchNormalization", x, *constants, epsilon=norm.eps)

    def instance(self, x: ir.Value) -> ir.Value:
        """Write the statistics of each group as InstanceNormalization, γ and β as a BatchNormalization.

        Where every channel is a group, it takes γ and β itself.
        """
        norm, groups = self.norm, self.norm.groups
        if norm.gates == (INSTANCE, INSTANCE):
            affine = (self.constant("gamma", _float32(norm.gamma)), self.constant("beta", _float32(norm.beta)))
            return self.op("normalized", "InstanceNormalization", x, *affine, epsilon=norm.eps)
        one = self.constant("one", np.ones(groups, np.float32))
        zero = self.constant("zero", np.zeros(groups, np.float32))
        grouped = self.reshape("grouped", x, [0, groups, (norm.values or 0) * norm.channels // groups or -1])
        normalized = self.op("normalized", "InstanceNormalization", grouped, one, zero, epsilon=norm.eps)
        restored = self.restored(normalized, x)
        plain = np.zeros(norm.channels), np.ones(norm.channels)
        parts = zip(("gamma", "beta", "mean", "var"), (norm.gamma, norm.beta, *plain), strict=True)
        constants = [self.constant(part, _float32(array)) for part, array in parts]
        return self.op("affine", "BatchNormalization", restored, *constants, epsilon=0.0)

    def moments(self, x: ir.Value) -> ir.Value:
        """Write the norm by the moments of each map, or of each map less a mean."""
        norm = self.norm
        base = x  # of the rank of scale and shift, which are (N, C, 1, 1)
        if len(norm.spatial) not in (0, 2):
            base = self.reshape("whole_rows", x, [0, norm.channels, 1, norm.values or -1])
        mean = None
        if self.form == "centred":
            mean = self.row_mean("mean", self.rows("rows_of_mean", base))
            base = self.op("centred", "Sub", base, mean)
        elif self.form == "shifted":
            running_mean = self.constant("running_mean", _float32(self.running_mean)[None, :, None, None])
            base = self.op("shifted", "Sub", base, running_mean)
        rows = self.rows("rows", base)
        mean = mean or (self.row_mean("mean", rows) if norm.spatial else x)
        sampled = bool(norm.spatial) and norm.gates[1] != BATCH
        squares = self.laid_out("squares", self.squares(rows)) if sampled else None
        unbias = self.unbias(rows) if norm.unbiased and norm.gates[1] != BATCH else None
        mean = self.laid_out("mean", mean)
        layer_mean = self.mean("layer_mean", mean, [self.axis]) if norm.gates[0][1] or norm.gates[1][1] else None
        mixed_mean = self.mixed_mean(mean, layer_mean)
        mixed_var = self.mixed_var(mean, layer_mean, squares, unbias)
        if self.form == "centred":
            mixed_mean = self.op("offset", "Sub", mixed_mean, mean)
        if self.runtime == "ort" and norm.spatial and norm.values is not None:
            y = self.as_batch_norm(base, mean, mixed_mean, mixed_var)
            return self.reshape("restored", y, [-1, norm.channels, *norm.sizes])
        scale = self.op("scale", "Div", self.each("gamma", norm.gamma), self.op("deviation", "Sqrt", mixed_var))
        moved = self.op("moved", "Mul", mixed_mean, scale)
        shift = self.op("shift", "Sub", self.each("beta", norm.beta), moved)
        if self.grouped:
            scale, shift = (
                self.reshape(f"{part}_of_maps", value, [0, norm.channels, *[1] * (2 if norm.spatial else 0)])
                for part, value in (("scale", scale), ("shift", shift))
            )
        y = self.op("y", "Add", self.op("scaled", "Mul", base, scale), shift)
        return y if len(norm.spatial) in (0, 2) else self.restored(y, x)

    def as_batch_norm(self, base: ir.Value, each: ir.Value, mean: ir.Value, var: ir.Value) -> ir.Value:
        """Return (base - mean) γ/√var + β as one BatchNormalization of N·C channels; ``each`` is (N, C, 1, 1)."""
        norm = self.norm
        shape = self.op("shape_of_moments", "Shape", each)
        full = {"gamma": self.each("gamma", norm.gamma), "beta": self.each("beta", norm.beta), "mean": mean, "var": var}
        flat = [
            self.reshape(f"{part}_of_maps", self.op(f"{part}_of_each", "Expand", value, shape), [-1])
            for part, value in full.items()
        ]
        maps = self.reshape("maps", base, [1, -1, norm.values or 0])
        return self.op("affine", "BatchNormalization", maps, *flat, epsilon=0.0)

    def rows(self, part: str, maps: ir.Value) -> ir.Value:
        """Return maps (N, C, H, W) as rows (N, C, 1, H·W), and what has no two axes, which is in rows, as it is."""
        norm = self.norm
        if len(norm.spatial) != 2:
            return maps
        return self.reshape(part, maps, [0, norm.channels, 1, norm.values or -1])

    def mixed_mean(self, mean: ir.Value, layer_mean: ir.Value | None) -> ir.Value:
        """Return Σ w μ over the statistics, less the running mean in the form `shifted`, in the layout of ``mean``."""
        instance, layer, batch = self.norm.gates[0]
        terms = [*self.gated("mean_of_instance", instance, mean), *self.gated("mean_of_layer", layer, layer_mean)]
        if self.form == "shifted":
            terms.append(self.each("mean_of_shift", -layer * self.above_layer))
        elif batch:
            terms.append(self.each("mean_of_batch", batch * self.running_mean))
        return self.total("mixed_mean", terms)

    def mixed_var(
        self, mean: ir.Value, layer_mean: ir.Value | None, squares: ir.Value | None, unbias: ir.Value | None
    ) -> ir.Value:
        """Return Σ w′ σ² + ε over the statistics, in the layout of ``mean``.

        ``squares`` are E[x²] of each map, in the form `centred` its variance; None where a map is one value.
        ``unbias`` is what the variance of a map, or without one that of the layer, is multiplied with, if anything.
        """
        norm = self.norm
        instance, layer, batch = norm.gates[1]
        raw = squares is not None and self.form != "centred"
        by_maps = self.form == "shifted" or unbias is not None  # the layer's variance, from those of its maps
        var = squares
        if raw and (instance or by_maps):
            assert squares is not None
            var = self.op("var", "Sub", squares, self.op("mean_squared", "Mul", mean, mean))
        if var is not None and unbias is not None:
            var = self.op("unbiased", "Mul", var, unbias)
        terms = self.gated("var_of_instance", instance, var)
        if layer:
            assert layer_mean is not None
            if raw and not by_maps:
                assert squares is not None
                whole = self.mean("layer_squares", squares, [self.axis])
                layer_var = self.op("layer_var", "Sub", whole, self.op("layer_squared", "Mul", layer_mean, layer_mean))
            else:
                between = self.op("between", "Sub", mean, layer_mean)
                if self.form == "shifted":
                    between = self.op("between_means", "Add", between, self.each("above_layer", self.above_layer))
                spread = self.op("spread", "Mul", between, between)
                within = spread if var is None else self.op("within", "Add", var, spread)
                layer_var = self.mean("layer_var", within, [self.axis])
                if var is None and unbias is not None:
                    layer_var = self.op("unbiased", "Mul", layer_var, unbias)
            terms += self.gated("var_of_layer", layer, layer_var)
        if raw and terms:  # of a constant map, rounding may leave less than 0
            terms = [self.op("clamped", "Relu", self.total("sample_var", terms))]
        eps = self.constant("eps", np.float32(norm.eps))
        terms.append(eps if norm.var is None or not batch else self.each("var_of_batch", batch * norm.var + norm.eps))
        return self.total("mixed_var", terms)

    def unbias(self, rows: ir.Value) -> ir.Value:
        """Return n / (n - 1), n the values of a map, which is in rows, or the channels where there is none."""
        norm = self.norm
        values = norm.values if norm.spatial else norm.channels
        if values is not None:
            return self.constant("unbias", np.float32(values / (values - 1)))
        sizes = self.op(
            "values_of_rows", "Cast", self.op("shape_of_rows", "Shape", rows, start=3), to=int(ir.DataType.FLOAT)
        )
        return self.op("unbias", "Div", sizes, self.op("fewer", "Sub", sizes, self.constant("one", np.float32(1))))

    @property
    def running_mean(self) -> Array:
        """The running mean (C,) in float32, as what is taken off is, with the digits of float64."""
        assert self.norm.mean is not None
        return _float32(self.norm.mean).astype(np.float64)

    @property
    def above_layer(self) -> Array:
        """How far each channel's running mean is above its group's."""
        grouped = self.running_mean.reshape(self.norm.groups, -1)
        above: Array = grouped - grouped.mean(1, keepdims=True)
        return above.reshape(-1)

    def gated(self, part: str, gate: float, value: ir.Value | None) -> list[ir.Value]:
        """Return ``value`` times its gate, or nothing where the gate is closed."""
        if value is None or gate == 0:
            return []
        return [value if gate == 1 else self.op(part, "Mul", value, self.constant(f"{part}_gate", np.float32(gate)))]

    def total(self, part: str, terms: Sequence[ir.Value]) -> ir.Value:
        """Return the sum of ``terms``; the operator Sum is slower than one Add for each."""
        total = terms[0]
        for number, term in enumerate(terms[1:], 2):
            total = self.op(part if number == len(terms) else f"{part}_of_{number}", "Add", total, term)
        return total

    def squares(self, rows: ir.Value) -> ir.Value:
        """Return the mean square (N, C, 1, 1) of rows (N, C, 1, L)."""
        norm = self.norm
        if norm.values is None or norm.values < PRODUCT or self.parts:
            return self.row_mean("squares", self.op("squared", "Mul", rows, rows))
        column = self.op("column", "Transpose", rows, perm=[0, 1, 3, 2])
        product = self.op("product", "MatMul", rows, column)
        # A vector, since onnxruntime moves a scalar factor into the product, and then takes a slower way.
        share = np.full((1, norm.channels, 1, 1), 1 / norm.values, np.float32)
        return self.op("squares", "Mul", product, self.constant("one_over_values", share))

    def row_mean(self, part: str, rows: ir.Value) -> ir.Value:
        """Return the mean (N, C, 1, 1) of rows (N, C, 1, L), of those that are too long for one sum part by part."""
        if not self.parts:
            return self.mean(part, rows, [3])
        split = self.reshape(f"{part}_in_parts", rows, [0, self.norm.channels, self.parts, -1])
        return self.mean(part, self.mean(f"{part}_of_parts", split, [3]), [2])

    @property
    def parts(self) -> int:
        """How many parts of one length a row is summed in, about the root of its values; 0 for all at once."""
        values = self.norm.values or 0
        if self.runtime != "web" or values <= WEB_SUM:
            return 0
        return max((each for each in range(2, isqrt(values) + 1) if values % each == 0), default=0)

    @property
    def grouped(self) -> bool:
        """Whether moments are laid out (N, groups, channels of a group), not (N, C, 1, 1)."""
        return self.norm.groups > 1

    @property
    def axis(self) -> int:
        """The axis of a group's channels in that layout."""
        return 2 if self.grouped else 1

    def laid_out(self, part: str, moment: ir.Value) -> ir.Value:
        """Return a moment of each map in the layout of small arrays."""
        return self.reshape(f"{part}_of_groups", moment, [0, self.norm.groups, -1]) if self.grouped else moment

    def each(self, part: str, array: Any) -> ir.Value:
        """Return a constant per channel in that layout."""
        norm = self.norm
        shape = (1, norm.groups, -1) if self.grouped else (1, norm.channels, *[1] * (2 if norm.spatial else 0))
        return self.constant(part, _float32(array).reshape(shape))

    def restored(self, y: ir.Value, x: ir.Value) -> ir.Value:
        """Return ``y`` in the shape of ``x``."""
        if None in self.norm.spatial:
            return self.op("restored", "Reshape", y, self.op("shape", "Shape", x))
        return self.reshape("restored", y, [0, self.norm.channels, *self.norm.sizes])


def _float32(array: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.asarray(array, np.float32)
