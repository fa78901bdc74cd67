"""What any PyTorch module can be asked; see `contract`."""

import copy
import inspect
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr
from io import StringIO
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..errors import UnsupportedError
from .contract import ROUNDING, Array, Arrays, Key
from .detect import traced_shape
from .example import Inputs, Place
from .names import distinct
from .outputs import outputs_of


def named_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every module under every name, as the model is called where it is not compiled."""
    for name, module in model.named_modules(remove_duplicate=False):
        yield (_uncompiled(name) if "_orig_mod" in name else name), module


def call(model: nn.Module, example: Any) -> Any:
    """Call ``model`` on an example, all arrays on its device; NumPy's floats take its type, and doubles and halves."""
    device = next((state.device for state in _states(model)), None)

    def tensor(value: Any) -> Any:
        value = taken_by(model, value) if isinstance(value, np.ndarray) else value
        if isinstance(value, Tensor) and value.dtype in (torch.float64, torch.float16, torch.bfloat16):
            value = value.to(float_type(model))  # which NumPy or an image reader has chosen
        return value.to(device) if isinstance(value, Tensor) else value

    moved = Inputs.of(example).map(tensor)
    return model(*moved.args, **moved.kwargs)


def is_built(model: nn.Module) -> bool:
    """Return whether no parameter or buffer waits for the first input."""
    return not any(nn.parameter.is_lazy(tensor) for tensor in _states(model))


def taken_by(model: nn.Module, array: Array) -> Tensor:
    """Return an array as a tensor, its floats in the type that ``model`` computes in."""
    tensor = torch.as_tensor(array)
    return tensor.to(float_type(model)) if tensor.is_floating_point() else tensor


def float_type(model: nn.Module) -> torch.dtype:
    """Return the type of floats that ``model`` computes in."""
    return next((state.dtype for state in _states(model) if state.is_floating_point()), torch.float32)


@contextmanager
def inference(model: nn.Module, *, compiled: bool = True) -> Iterator[None]:
    """Run the body with every module in eval mode and without gradients, then restore each module's own flag.

    With ``compiled=False`` what `torch.compile` has wrapped runs as it is written, for hooks to see it.
    """
    flags = [(module, module.training) for module in model.modules()]
    for module in model.modules():  # not model.eval(), which a module made by torch.export refuses
        module.training = False
    try:
        with torch.no_grad(), nullcontext() if compiled else _eager():
            yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def watching(
    layers: Mapping[Key, nn.Module], see: Callable[[Key, Any, Any], object], *, first: bool = False
) -> Iterator[None]:
    """Tell ``see(key, input, output)`` of every call of the modules; ``first`` of all their forward hooks."""

    def hook(key: Key) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            see(key, args[0] if args else next(iter(kwargs.values()), None), output)

        return note

    handles = [
        module.register_forward_hook(hook(key), prepend=first, with_kwargs=True) for key, module in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def snapshot(model: nn.Module) -> Callable[[], None]:
    """Return what gives the model back all parameters and buffers that it has now, those that are not saved too."""
    kept = [
        (tensors, name, tensor, tensor.detach().clone())
        for module in model.modules()
        for tensors in (module._parameters, module._buffers)
        for name, tensor in tensors.items()
        if tensor is not None
    ]

    def restore() -> None:
        with torch.no_grad():
            for tensors, name, tensor, value in kept:
                tensors[name] = tensor.copy_(value)  # type: ignore[assignment]

    return restore


def copied(model: nn.Module) -> nn.Module:
    """Return a copy of ``model``, where tensors that a forward has left in it have no history.

    Those are what the hook of weight_norm computes, or an activation that is kept.

    Raises `UnsupportedError` that names a module with something that Python cannot copy.
    """
    left = (tensor for module in model.modules() for tensor in _held(list(vars(module).values())))
    memo: dict[int, Any] = {id(tensor): tensor.detach().clone() for tensor in left if not tensor.is_leaf}
    try:
        return copy.deepcopy(model, memo)
    except (RuntimeError, TypeError, copy.Error) as error:
        name, module = _not_copied(model)
        raise UnsupportedError(
            f"{name or 'the model'}: expected a module that Python can copy, received a {type(module).__name__} that "
            f"it cannot ({error}); take that out, or patch the model itself"
        ) from error


def _held(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in an attribute: in containers, but not in modules."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _held(list(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _held(each)


def _not_copied(model: nn.Module) -> tuple[str, nn.Module]:
    """Return the last module, the innermost, that Python cannot copy."""
    for name, module in reversed(list(model.named_modules())):
        try:
            copy.deepcopy(module)
        except (RuntimeError, TypeError, copy.Error):
            return name, module
    return "", model


def in_double(model: nn.Module) -> nn.Module:
    """Return a copy of ``model`` that computes in float64."""
    with quiet():
        return copied(model).double()


def round_weights(model: nn.Module, seed: int) -> None:
    """Move every weight of a model in float64 as rounding it to float32 may, up or down as ``seed`` has it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in (value for value in _states(model) if value.is_floating_point()):
            signs = torch.randint(0, 2, value.shape, generator=generator).to(value) * 2 - 1
            value.mul_(1 + ROUNDING * signs)


def record(model: nn.Module, example: Inputs) -> tuple[Arrays, Arrays]:
    """Return the outputs of ``model`` in eval mode, and those of its layers with weights, in call order."""
    device = next((parameter.device for parameter in model.parameters()), None)
    tensors = [torch.as_tensor(array).to(device) for array in example.arrays.values()]
    probe = Probe(model, example)
    exact = _double() if float_type(model) == torch.float64 else nullcontext()
    with inference(probe, compiled=False), exact:
        values = [value.cpu().numpy() for value in probe(*tensors)]
    split = len(probe.output_names)
    outputs = dict(zip(probe.output_names, values[:split], strict=True))
    return outputs, dict(zip(probe.site_names, values[split:], strict=True))


class _Double(TorchFunctionMode):
    """Computes in float64 where code asks for float32 by name, as for what it reads as bytes."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        wide = [torch.float64 if value is torch.float32 else value for value in args]
        named = {name: torch.float64 if value is torch.float32 else value for name, value in (kwargs or {}).items()}
        run: Callable[..., Any] = Tensor.double if function is Tensor.float else function
        return run(*wide, **named)


@contextmanager
def _double() -> Iterator[None]:
    """Let code that makes floats make them in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Double():
            yield
    finally:
        torch.set_default_dtype(before)


def input_names(model: nn.Module, example: Inputs) -> list[str]:
    """Return the names of the arguments of the model's forward, those within one with their way into it.

    An array that the forward has no argument for has none.
    """
    names: list[str] = []
    parameters = inspect.signature(model.forward).parameters
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for parameter in parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}_{index}" for index in range(len(example.args) - len(names))]
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(parameter.name)
    named = [
        (names[first] if isinstance(first, int) else first, *way)
        for first, *way in example.arrays
        if (first < len(names) if isinstance(first, int) else anything or first in parameters)
    ]
    return distinct(named)


def ordered(model: nn.Module, example: Inputs) -> Inputs:
    """Return the arguments of an example with those by name in the order of the forward's arguments."""
    return example.ordered(list(inspect.signature(model.forward).parameters))


def input_shapes(model: nn.Module) -> list[tuple[int | None, ...]] | None:
    """Return what the model says of its input shapes, which for a torch module is nothing (see `sources`)."""
    return None


def input_types(model: nn.Module) -> list[str] | None:
    """Return what the model says of the types of its inputs, which for a torch module is nothing."""
    return None


def tables(model: nn.Module) -> dict[str, tuple[nn.Module, int, Tensor]]:
    """Return every embedding with its rows."""
    kinds = (nn.Embedding, nn.EmbeddingBag)
    found = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    return {name: (module, module.num_embeddings, module.weight) for name, module in found.items()}


def zeros(model: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """Return two samples of zeros, or as many as the model was traced for."""
    batch = (traced_shape(model) or (None,))[0]
    return torch.zeros(2 if batch is None else batch, *shape, dtype=float_type(model))


def unusable(model: nn.Module) -> dict[str, str]:
    """Return which parameters and running statistics are not finite, and which variances are below 0, or none."""
    statistics = (item for item in model.named_buffers() if item[0].endswith(("running_mean", "running_var")))
    found: dict[str, str] = {}
    for name, tensor in chain(model.named_parameters(), statistics):
        if nn.parameter.is_lazy(tensor) or tensor.is_meta or tensor.layout is not torch.strided:
            continue
        if not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        values = tensor.detach() if tensor.element_size() > 1 else tensor.detach().float()  # as float8
        # Their sum is read at a fifth of the cost, and finite only if they all are.
        if not bool(values.sum().isfinite()) and not bool((finite := values.isfinite()).all()):
            found[name] = f"{int((~finite).sum())} of {values.numel()} not finite"
        elif name.endswith("running_var") and not values.numel():
            found[name] = "of no channels"
        elif name.endswith("running_var") and bool((values < 0).any()):
            found[name] = f"{int((values < 0).sum())} of {values.numel()} below 0"
    return found


def to_numpy(value: Tensor) -> Array:
    """Return a tensor as an array, in float32 where it is narrower."""
    wide = torch.promote_types(value.dtype, torch.float32) if value.is_floating_point() else value.dtype
    array: Array = value.detach().to("cpu", wide).numpy()
    return array


class Probe(nn.Module):
    """A model that also returns what each of its layers with weights computed.

    It takes the arrays of ``example`` one by one and puts them where they are there.
    """

    def __init__(self, model: nn.Module, example: Inputs, before: Callable[[], None] | None = None) -> None:
        super().__init__()
        self.model = model
        self._example, self._before = example, before
        self.output_names: list[str] = []
        self.site_names: list[str] = []
        self._layers = {
            name: module
            for name, module in model.named_modules()
            if name and any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False)))
        }

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        """Return the model's outputs and then the layers' in call order."""
        seen: list[tuple[str, Tensor]] = []
        if self._before is not None:
            self._before()

        def note(name: str, x: Any, output: Any) -> None:
            if torch.is_tensor(output):  # which an activation in place would change
                seen.append((name, output.clone()))

        filled = self._example.filled(inputs)
        with watching(self._layers, note, first=True):
            outputs = outputs_of(self.model(*filled.args, **filled.kwargs), _read)
        calls: dict[str, int] = {}
        site_names = []
        for name, _ in seen:
            calls[name] = calls.get(name, 0) + 1
            site_names.append(name if calls[name] == 1 else f"{name}#{calls[name]}")
        self.output_names, self.site_names = self._names(list(outputs)), site_names
        return [*outputs.values(), *(output for _, output in seen)]

    def _names(self, places: Sequence[Place]) -> list[str]:
        """Return a name for each output: the way to it from a key or field that has a name, or from "output"."""
        named = [place if place and str(place[0]) and not isinstance(place[0], int) else ("output", *place)
                 for place in places]  # fmt: skip
        return distinct(named, taken=input_names(self.model, self._example))


_NUMBERS: tuple[tuple[Any, torch.dtype], ...] = (
    ((bool, torch.SymBool), torch.bool),  # first, since a bool is an int
    ((int, torch.SymInt), torch.int64),
    ((float, torch.SymFloat), torch.float32),
)
"""What a number becomes that a model returns; where torch traces, one that depends on sizes is of its own class."""


def _read(value: Any) -> Any:
    """Return a tensor for a number or array, and the parts of an object that torch's own exporter takes apart."""
    for kinds, dtype in _NUMBERS:
        if isinstance(value, kinds):
            return torch.scalar_tensor(value, dtype=dtype)
    if isinstance(value, np.ndarray | np.generic):
        return torch.as_tensor(value)
    if value is None or isinstance(value, Tensor | Mapping | list | tuple):
        return value
    parts, spec = pytree.tree_flatten(value, is_leaf=lambda each: each is not value)
    return value if spec.is_leaf() else parts


_TALKING = "torch.onnx", "torch.fx.experimental.symbolic_shapes", "torch.utils._pytree"


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what torch says of its own internals while copying and exporting."""
    loggers = [logging.getLogger(name) for name in _TALKING]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _eager() -> AbstractContextManager[None]:
    """Run what torch.compile has wrapped without compiling it."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: Callable[[str], AbstractContextManager[None]] = torch.compiler.set_stance
    return stance("force_eager")


def _states(model: nn.Module) -> Iterator[Tensor]:
    return chain(model.parameters(), model.buffers())


def _uncompiled(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "_orig_mod")
