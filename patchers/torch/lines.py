"""Which norms an exported file is rid of: those whose input is a line of what a linear layer computes.

A norm that is a scale and a shift at inference goes into the convolution or product of matrices before it, if every
value in between has one reader and is moved, or added to or multiplied by constants, channel by channel. A forward pass
shows that of functions as of layers; what it cannot tell for certain is not known.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

_aten = torch.ops.aten
_LINEAR = {
    _aten.convolution.default: 0,
    _aten.addmm.default: 1,
    _aten.mm.default: 0,
    _aten.linear.default: 0,
}
"""Where linear operations read what they are given; all else is weights."""

_ARITHMETIC = {
    *(_aten.add.Tensor, _aten.sub.Tensor, _aten.mul.Tensor, _aten.div.Tensor),
    *(_aten.add_.Tensor, _aten.sub_.Tensor, _aten.mul_.Tensor, _aten.div_.Tensor),
    *(_aten.add.Scalar, _aten.sub.Scalar, _aten.mul.Scalar, _aten.div.Scalar),
}

_QUOTIENTS = {_aten.div.Tensor, _aten.div_.Tensor}
"""Whose first operand alone is scaled."""

_UNCERTAIN = {
    *(_aten.slice.Tensor, _aten.select.int, _aten.index_select.default, _aten.index.Tensor, _aten.gather.default),
    *(_aten.neg.default, _aten.expand.default, _aten._to_copy.default, _aten.flip.default, _aten.roll.default),
    *(_aten.bmm.default, _aten.rsub.Scalar, _aten.rsub.Tensor, _aten.pixel_shuffle.default),
}
"""What a file may have such a form of that the norm goes through it, or not."""


@dataclass
class _Line:
    """A value on the way, the one before, where its channels are, None where nobody knows, and how many read it."""

    before: "_Line | None"
    axis: int | None
    readers: int = 0


class Lines:
    """What one forward pass shows of values that are lines of what linear operations compute.

    ``constants`` are what the model holds; ``moves`` are the operations that only move values about.
    """

    def __init__(self, constants: Collection[Tensor], moves: Collection[Any]) -> None:
        self.moves = moves
        self.constants: Any = WeakIdKeyDictionary(dict.fromkeys(constants, True))
        self.lines: Any = WeakIdKeyDictionary()
        self.read_by: dict[int, list[_Line | None]] = {}
        self.rests = False

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Take nothing down within the context."""
        self.rests = True
        try:
            yield
        finally:
            self.rests = False

    def note(self, function: Any, arguments: Any, output: Any, moved: Any, *, within: bool) -> None:
        """Take down one operation; ``within`` a norm it is the norm's own. ``moved`` follows channels, see `fronts`."""
        if self.rests:
            return
        tensors = [each for each in tree_leaves(arguments) if isinstance(each, Tensor)]
        live = [tensor for tensor in tensors if tensor not in self.constants]
        if not live:
            for each in tree_leaves(output):
                if isinstance(each, Tensor):
                    self.constants[each] = True
            return
        if within:
            return
        known = [self.lines.get(tensor) for tensor in live]
        for line in known:
            if line is not None:
                line.readers += 1
        if len(live) > 1 or not isinstance(output, Tensor):
            return
        (x,), (line,) = live, known
        args = arguments[0]
        if function in _QUOTIENTS and args[0] is not x:
            return
        if (place := _LINEAR.get(function)) is not None and len(args) > place and args[place] is x:
            self.lines[output] = _Line(None, 1 if function is _aten.convolution.default else output.ndim - 1)
        elif line is not None and function in self.moves:
            axis = None if line.axis is None else moved(function, arguments, x, line.axis, output)
            self.lines[output] = _Line(line, axis)
        elif line is not None and function in _ARITHMETIC:
            others = [tensor for tensor in tensors if tensor is not x]
            alike = line.axis is not None and all(_by_channel(other, x, line.axis) for other in others)
            self.lines[output] = _Line(line, line.axis if alike else None)
        elif line is not None and function in _UNCERTAIN:
            self.lines[output] = _Line(line, None)

    def reads(self, site: int, x: Any) -> None:
        """Take down what a norm is given."""
        line = self.lines.get(x) if isinstance(x, Tensor) else None
        if line is not None:
            line.readers += 1
        self.read_by.setdefault(site, []).append(line)

    def returned(self, outputs: Any) -> None:
        """Take what the model returned, which the file keeps."""
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, Tensor) and (line := self.lines.get(tensor)) is not None:
                line.readers += 1

    def end_at(self, site: int) -> bool | None:
        """Return whether what a norm was given is a line in each of its calls, None where that is not known."""
        found = {_is_line(line) for line in self.read_by.get(site, [])}
        return found.pop() if len(found) == 1 else None


def constants_of(modules: Sequence[nn.Module]) -> list[Tensor]:
    """Return all parameters and buffers of modules."""
    held = (tensor for module in modules for tensor in (*module._parameters.values(), *module._buffers.values()))
    return [tensor for tensor in held if tensor is not None]


def _is_line(line: _Line | None) -> bool | None:
    if line is None:
        return False
    certain = line.axis == 1
    while line is not None:
        if line.readers > 1:
            return False
        line = line.before
    return True if certain else None


def _by_channel(constant: Tensor, x: Tensor, axis: int) -> bool:
    """Whether a constant is one number, or one for each channel of ``x``."""
    behind = x.ndim - axis - 1
    shape = list(constant.shape)
    place = len(shape) - behind - 1
    return all(size == 1 for index, size in enumerate(shape) if index != place)
