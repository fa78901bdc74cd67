"""The proof that an ONNX file computes what a model computes.

The file is run in onnxruntime with graph optimisation off and on, at several batch sizes, input scales and, where
they are free, heights and widths, on random inputs and on data where given. An output passes if it is finite and
differs from the framework's by at most 1e-5 of its largest value; bounds relative to the output's scale hold for
any input scale, where absolute ones fail correct models. On a miss a float64 copy of the model is asked whether the
model is ill-conditioned on that input: there, ten times the framework's own float32 error is allowed.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from ..errors import InputError, MissingDependencyError, option
from ..frameworks import several
from ..frameworks.detect import get_framework
from ..frameworks.example import Inputs, to_array
from ..frameworks.several import texts
from ..sources.files import require_file
from ..sources.outputs import require_output
from .drawn import Input
from .elsewhere import Elsewhere, Runs, feed, in_order
from .evaluator import evaluate, first_infinite
from .file import OnnxFile, read_model
from .int8 import Rounded, judged
from .quantized import weights_of
from .reference import BATCH_SIZES, FEW, Arrays, Batch, Reference, collect, samples
from .rows import row_problems
from .runtime import TIMEOUT, answers, chosen_providers, session
from .runtimes.known import ONNXRUNTIME, chosen_runtimes, kind_of
from .sizes import changed, contradictions
from .stored import load_reference, wrote
from .stored import save_reference as save
from .verdict import (
    ERRORS,
    HALF_LAYER,
    HALF_TOLERANCE,
    LAYER,
    MOST,
    TOLERANCE,
    Check,
    Ran,
    Verdict,
    compare,
    excused,
    joined,
    unequal,
)

__all__ = ["Check", "Verdict", "verify", "verify_against"]

Array = NDArray[Any]


def verify(
    model: Any,
    path: str | Path,
    *,
    example: Any = None,
    data: Any = None,
    batch_sizes: int | Iterable[int] = BATCH_SIZES,
    runtime: str | Iterable[str] = ONNXRUNTIME,
    providers: str | Iterable[str] = ("cpu",),
    float_file: str | Path | None = None,
    save_reference: str | Path | None = None,
    overwrite: bool = False,
    seed: int = 0,
    timeout: float = TIMEOUT,
) -> Verdict:
    """Hold an ONNX file against the model it was made from; the verdict is true if the file passes.

    Every output has to be within 1e-5 of its scale on random inputs and on data. On a miss the verdict names the first
    layer, in call order, whose output differs.

    Args:
        model: The model, of PyTorch or Keras.
        path: The ONNX file; for LiteRT and ExecuTorch one of their own.
        example: What the model takes (see `normswap.Inputs`): the file is run on it, and on inputs made of it. A model
            needs one whose arguments are more than arrays by position, or not any numbers.
        data: Further inputs of the user's own, each as an example has them: as many arrays as the file has inputs. An
            array by itself is one.
        batch_sizes: One or several numbers of samples of the random inputs, which are standard normal at several
            scales; a file of a fixed batch size is run at that.
        runtime: What has to compute the same: ``"onnxruntime"``, ``"openvino"``, ``"web"`` (onnxruntime-web on
            WebAssembly), ``"litert"``, ``"executorch"``, ``"ncnn"``, ``"cuda"`` or ``"tensorrt"``. One or several;
            all but onnxruntime in processes of their own.
        providers: Where onnxruntime runs the file: ``"cpu"``, ``"cuda"``, ``"tensorrt"``, ``"openvino"``, ``"coreml"``,
            ``"dml"``, or ``"auto"`` for all that are installed. One or several.
        float_file: Of an int8 file the float file that it was made of, with the weights its codes are held against.
        save_reference: An ``.npz`` to write the model's answers to, for `verify_against`, if the file passes.
        overwrite: Replace a reference that is there.
        seed: Of the random inputs.
        timeout: How many seconds the file may take to answer a batch.

    Returns:
        The `Verdict`, which is true if the file passes; ``print(verdict)`` says what it passed, or why it failed.

    Raises:
        InputError: If the file is damaged or unsafe, takes too long, or data does not fit it.
        UnsupportedError: If a runtime does not load it.
        MissingDependencyError: If a runtime or a provider is not installed.
        VerificationError: If a runtime crashes while it loads the file.
        OutputExistsError: If ``save_reference`` exists.

    Example:
        >>> import normswap, torch
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)).eval()
        >>> written = normswap.to_onnx(model, "net.onnx", example=torch.randn(2, 3, 8, 8))
        >>> print(normswap.verify(model, "net.onnx", save_reference="net.npz"))
        passed: 8 checks, largest difference ...e-... of scale
        >>> with torch.no_grad():
        ...     model[0].weight *= 2
        >>> bool(normswap.verify(model, "net.onnx"))
        False
    """
    sizes = _sizes(batch_sizes)
    if save_reference is not None:
        require_output(Path(save_reference), overwrite=overwrite)
    framework = get_framework(model)
    further = [framework.ordered(model, Inputs.of(batch)) for batch in ([] if data is None else several.batches(data))]
    whole = _read(Path(path))
    rounded = _rounded(whole, Path(path), float_file, runtime)
    if rounded is not None and rounded.problems:
        return Verdict((), tuple(rounded.problems))
    examples = [] if example is None else [framework.ordered(model, Inputs.of(example))]
    with _opened(Path(path), whole, runtime, providers, timeout) as runs:
        inputs = [Input.of(value) for value in runs[0].file.inputs]
        shown = [*examples, *(batch for batch in further if len(batch) == len(inputs))]
        template = shown[0] if shown else _by_name(model, inputs)
        if not runs[0].ordered:
            inputs = in_order(inputs, framework.input_names(model, template), lambda entry: entry.name)
        if problems := _input_problems(model, inputs, template):
            return Verdict((), tuple(problems))
        reference = collect(
            model,
            template,
            inputs,
            examples=[given_arrays(inputs, batch, template) for batch in examples],
            data=[given_arrays(inputs, batch, template) for batch in further],
            batch_sizes=sizes,
            seed=seed,
        )
        if rounded is None:
            verdict = joined([_judge(each, reference) for each in runs])
        else:
            plain, simulated = _Here(rounded.plain, providers, timeout), _Here(rounded.simulated, ("cpu",), timeout)
            verdict = judged(_judge(plain, reference), runs[0], simulated, plain, reference)
    if save_reference is not None and verdict:
        save(reference, Path(save_reference), overwrite=overwrite)
    return verdict


def verify_against(
    reference: str | Path,
    path: str | Path,
    *,
    runtime: str | Iterable[str] = ONNXRUNTIME,
    providers: str | Iterable[str] = ("cpu",),
    timeout: float = TIMEOUT,
) -> Verdict:
    """Hold an ONNX file against the answers `verify` saved of a model; needs no framework.

    Args:
        reference: The ``.npz`` that `verify` wrote as ``save_reference``. Nothing in it is run.
        path: The file, as `verify` takes it.
        runtime: What has to compute the same; see `verify`.
        providers: Where onnxruntime runs the file; see `verify`.
        timeout: How many seconds the file may take to answer a batch.

    Returns:
        The `Verdict`, as that of `verify`.

    Raises:
        InputError: If the reference is damaged, or belongs to a model of other inputs or outputs.
        UnsupportedError: If a runtime does not load the file.
        MissingDependencyError: If a runtime or a provider is not installed.
        VerificationError: If a runtime crashes while it loads the file.

    Example:
        >>> import normswap, torch
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)).eval()
        >>> written = normswap.to_onnx(model, "net.onnx", example=torch.randn(2, 3, 8, 8))
        >>> verdict = normswap.verify(model, "net.onnx", save_reference="net.npz")
        >>> bool(normswap.verify_against("net.npz", "net.onnx"))
        True
    """
    known = _read(Path(path))
    if known is not None and known.int8:
        raise InputError(f"expected a file in float beside a reference, received {path} in int8, which is held "
                         "against its model and its float file")  # fmt: skip
    with _opened(Path(path), known, runtime, providers, timeout) as runs:
        stored = load_reference(Path(reference))
        file, first = runs[0].file, stored.batches[0]
        order = (lambda names: names) if runs[0].ordered else sorted
        problems = [
            *unequal(order(list(first.arrays)), order([value.name for value in file.inputs]), "inputs"),
            *unequal(order(list(first.outputs)), order([value.name for value in file.proto.graph.output]), "outputs"),
        ]
        for value, batch in product([] if problems else file.inputs, stored.batches):
            problems += _unfit(value, batch.arrays[value.name], "input")
        if problems:
            raise InputError(
                f"expected a reference of the model in {path}, received {reference} of another: {problems[0]}; "
                f"write one of this model by {wrote()}"
            )
        return joined([_judge(each, stored) for each in runs])


def _rounded(
    file: OnnxFile | None, path: Path, float_file: str | Path | None, runtime: str | Iterable[str]
) -> Rounded | None:
    """Return an int8 file with its float file's weights, None for another file.

    Raises `InputError` for one of both without the other, and for a runtime that int8 files are not proved in.
    """
    if file is None or not file.int8:
        if float_file is None:
            return None
        raise InputError(
            f"expected an int8 file beside a float file, received {path} in float and float_file={float_file}"
        )
    if float_file is None:
        raise InputError(f"expected the float file that {path} in int8 was made of, received float_file=None")
    if others := [name for name in texts(runtime, "a runtime") if name != ONNXRUNTIME]:
        raise InputError(
            f"expected {option('runtime', ONNXRUNTIME)} for a file in int8, which is proved there alone, "
            f"received {option('runtime', others[0])}"
        )
    return Rounded(file, weights_of(read_model(Path(float_file)).path))


def _sizes(given: Any) -> tuple[int, ...]:
    """Return one number of samples or several as a tuple; raises `InputError` for what is no such number."""
    found = tuple(given) if isinstance(given, Iterable) else (given,)
    if not found or any(not isinstance(size, int | np.integer) or size < 1 for size in found):
        raise InputError(f"expected `batch_sizes` of one number above 0 or several, received batch_sizes={given!r}")
    return found


def _read(path: Path) -> OnnxFile | None:
    """Return an ONNX file, None for one of another kind, of which its runtime tells."""
    require_file(path)
    return read_model(path) if kind_of(path) == "ONNX" else None


@contextmanager
def _opened(
    path: Path,
    file: OnnxFile | None,
    runtime: str | Iterable[str],
    providers: str | Iterable[str],
    timeout: float,
) -> Iterator[list[Runs]]:
    """Open a file in each of the runtimes, within a ``with`` block."""
    names = chosen_runtimes(texts(runtime, "a runtime"), path)
    with ExitStack() as stack:
        yield [
            stack.enter_context(Elsewhere(name, path, file, timeout))
            if file is None or name != ONNXRUNTIME
            else _Here(file, providers, timeout)
            for name in names
        ]


class _Here:
    """The sessions of onnxruntime a file is judged by: every provider, optimisation off and on.

    Without optimisation the layers' outputs can be asked for too.
    """

    name, ordered = ONNXRUNTIME, True

    def __init__(self, file: OnnxFile, providers: str | Iterable[str], timeout: float) -> None:
        self.file, self.timeout = file, timeout
        self.sites = file.sites
        self.outputs = [value.name for value in file.proto.graph.output]
        contents = {"off": file.with_outputs(sorted(set(self.sites.values()))), "on": file.content}
        self.sessions: dict[tuple[str, str], onnxruntime.InferenceSession] = {}
        self.notes: list[str] = []
        asked = texts(providers, "a provider")
        for provider in chosen_providers(asked):
            try:
                self.sessions |= {
                    (provider, level): session(
                        content, optimised=level == "on", provider=provider, spinning=False, folder=file.path.parent
                    )
                    for level, content in contents.items()
                }
            except MissingDependencyError as error:
                if provider in asked:
                    raise
                self.notes.append(f"{provider} left out: {error}")

    @property
    def hows(self) -> list[tuple[str, str]]:
        """The ways it is run: provider, and optimisation."""
        return list(self.sessions)

    def outputs_of(self, how: tuple[str, str], batch: Batch) -> Arrays:
        """Return what the file computes on a batch, in one of its ways."""
        return self.run(self.sessions[how], batch, self.outputs)

    def by_default(self, batches: Sequence[Batch]) -> Ran:
        """Return what the runtime is."""
        return Ran(self.name, onnxruntime.__version__, "f32", "f32", None)

    def ways_out(self) -> list[str]:
        """Return nothing: files are written for it."""
        return []

    def layers(self, batch: Batch) -> Arrays:
        """Return what the file computes for each layer on a batch."""
        values = list(dict.fromkeys(self.sites.values()))  # no names would stand for all
        found = self.run(next(iter(self.sessions.values())), batch, values) if values else {}
        return {site: found[value] for site, value in self.sites.items()}

    def every_value(self, batch: Batch) -> Arrays:
        """Return every value in the graph, in order, without optimisation."""
        names = list(dict.fromkeys(name for node in self.file.proto.graph.node for name in node.output if name))
        runner = session(self.file.with_outputs(names), optimised=False, folder=self.file.path.parent)
        return self.run(runner, batch, names)

    def run(self, runner: onnxruntime.InferenceSession, batch: Batch, names: Sequence[str]) -> Arrays:
        """Return the values asked for, by name."""
        return dict(zip(names, answers(runner, list(names), feed(self.file, batch), timeout=self.timeout), strict=True))


def _judge(runs: Runs, reference: Reference) -> Verdict:
    if problems := reference.problems or _output_problems(runs, reference.batches[0]):
        return Verdict((), tuple(problems), notes=(*reference.notes, *runs.notes), coverage=reference.coverage)
    problems = [
        *changed(runs.file),
        *row_problems(runs.file, reference.rows, HALF_LAYER if runs.file.half else TOLERANCE),
    ]
    values = [*runs.file.inputs, *runs.file.proto.graph.output]
    checks: list[Check] = []
    ran: list[Batch] = []
    failed: list[Batch] = []
    for batch in reference.batches:
        if runs.file.half and (batch.scale or 1.0) > 1:
            continue  # float16 ends at 65504
        try:
            found = {how: runs.outputs_of(how, batch) for how in runs.hows}
        except InputError:  # which is of time alone
            raise
        except Exception as error:
            shapes = ", ".join(str(array.shape) for array in batch.arrays.values())
            problems.append(f"{runs.name} fails on inputs of shape {shapes}, which the model takes: {error}")
            continue
        if not problems:
            problems += contradictions(values, {**batch.arrays, **next(iter(found.values()))})
        new = [c for how, out in found.items() for c in _checks(out, batch, reference, runs, how)]
        if not all(check.passed for check in new) and (own := _undetermined(batch, reference)):
            reference.notes.append(
                f"inputs {batch.inputs} left out: float32 does not determine the model there, {own} of scale"
            )
            continue
        checks += new
        ran.append(batch)
        failed += [] if all(check.passed for check in new) else [batch]
    inside: Arrays = {}
    if runs.file.half and ran and runs.name == ONNXRUNTIME:
        try:
            inside = evaluate(runs.file, feed(runs.file, ran[0]))
            checks += _checks(inside, ran[0], reference, runs, ("onnx.reference", "off"))
        except Exception as error:
            problems.append(f"onnx.reference fails, which shows what overflows in float16: {error}")
    elif failed and not all(check.finite for check in checks):
        inside = runs.every_value(failed[0])
    suspect = next(iter(failed or ran), None)
    bound = HALF_LAYER if runs.file.half else TOLERANCE if failed else LAYER
    diverging = suspect and _first_diverging(runs, reference, suspect, bound)
    diverging = diverging or next((check.output for check in checks if not check.passed), None)
    infinite = None if all(check.finite for check in checks) else first_infinite(runs.file, inside)
    told = (runs.by_default(ran),)
    notes = (*reference.notes, *runs.notes, *(runs.ways_out() if failed else ()))
    return Verdict(tuple(checks), tuple(problems), diverging, notes, infinite, reference.coverage, told)


def _undetermined(batch: Batch, reference: Reference) -> str:
    """Return where the framework's own error on drawn inputs is beyond what a file could be held to, or nothing.

    A BatchNorm's running statistics do not scale with its input: what is multiplied behind it (gates, stars) may grow
    by powers. Inputs of the user's own count in any case, and
    plain noise where there are none.
    """
    if not batch.spare:
        return ""
    exact_outputs, exact_layers = reference.exact(batch)
    for found, exact in ((batch.layers, exact_layers), (batch.outputs, exact_outputs)):
        for name in (name for name in found if name in exact):
            own = compare(found[name], found[name], exact[name]).get("own", 0.0)
            if own > MOST / ERRORS:
                return f"{name} is off by {own:.1e}"
    return ""


def _checks(
    found: Mapping[str, Array], batch: Batch, reference: Reference, runs: Runs, how: tuple[str, str]
) -> Iterator[Check]:
    half = runs.file.half
    tolerance = HALF_TOLERANCE if half else TOLERANCE
    for name, expected in batch.outputs.items():
        figures = compare(found[name], expected)
        if figures["finite"] and figures["max_rel"] > tolerance and not half:
            figures = _inexact(found[name], expected, reference, batch, name, 0)
        yield Check(name, batch.size, batch.inputs, *how, tolerance=tolerance, runtime=runs.name, **figures)


def _inexact(found: Array, expected: Array, reference: Reference, batch: Batch, name: str, kind: int) -> dict[str, Any]:
    """Return how far an output (``kind`` 0) or layer (1) that missed is from float64, beside the framework's own."""
    exact = reference.exact(batch)[kind].get(name)
    figures = compare(found, expected, exact)
    near = "own" in figures and figures["max_rel"] <= MOST and not excused(figures["own"], figures["ratio"])
    if near and expected.size < FEW:
        figures = compare(found, expected, exact, reference.errors(batch)[kind].get(name, 0.0))
    return figures


def _first_diverging(runs: Runs, reference: Reference, batch: Batch, tolerance: float) -> str | None:
    """Return the first layer in call order whose output differs by more than ``tolerance`` of its scale.

    A layer may differ where the outputs do not, as a scaled convolution before a GroupNorm.
    """
    if not batch.layers:  # a stored reference has those of its first batch alone
        batch = reference.batches[0]
    found = runs.layers(batch)
    for name in (name for name in batch.layers if name in found):
        own, expected = samples(found[name]), batch.layers[name]
        figures = compare(own, expected)
        if figures["finite"] and figures["max_rel"] > tolerance and not runs.file.half:
            figures = _inexact(own, expected, reference, batch, name, 1)
        if not figures["finite"] or (figures["max_rel"] > tolerance and figures.get("ratio", np.inf) > ERRORS):
            return name
    return None


def _by_name(model: Any, inputs: Sequence[Input]) -> Inputs:
    """Return arguments with an array of no size in each input's place: by position, those behind by keyword."""
    arrays = [np.zeros((), entry.dtype) for entry in inputs]
    positional = len(get_framework(model).input_names(model, Inputs(*arrays)))
    by_keyword = zip(inputs[positional:], arrays[positional:], strict=True)
    return Inputs(*arrays[:positional], **{entry.name: array for entry, array in by_keyword})


def given_arrays(inputs: Sequence[Input], given: Inputs, template: Inputs) -> Arrays:
    """Return inputs of the user's own by the names of the file's; raises `InputError` if they are not as many."""
    found = given.arrays
    if len(found) != len(inputs):
        raise InputError(
            f"expected data of {len(inputs)} arrays, one for each input of the file, received {len(found)}; "
            "give each, in their order or by name"
        )
    places = template.arrays if set(template.arrays) == set(found) else found  # keywords come in any order
    arrays = {entry.name: entry.as_taken(to_array(found[place])) for entry, place in zip(inputs, places, strict=True)}
    if unfit := [f"{entry} with {arrays[entry.name].shape}" for entry in inputs if not entry.takes(arrays[entry.name])]:
        raise InputError(
            f"expected data of the shapes the file takes, received {', '.join(unfit)}; give such, or export the model "
            f"with {option('dynamic_size')}"
        )
    return arrays


def _input_problems(model: Any, inputs: Sequence[Input], template: Inputs) -> list[str]:
    """Return where the file's inputs are not the model's: names and order, and shapes for a model that knows them."""
    framework = get_framework(model)
    own_shapes = framework.input_shapes(model)
    names = framework.input_names(model, template)
    if problems := unequal(names, [entry.name for entry in inputs], "inputs"):
        return problems
    for entry, own in zip(inputs, own_shapes or (), strict=False):
        free = [size if isinstance(size, int) else None for size in entry.shape[1:]]
        if len(free) != len(own) or any(b is not None and a != b for a, b in zip(free, own, strict=True)):
            problems.append(
                f"expected the input {entry.name} of shape {tuple(own)} without the batch, received {entry}"
            )
    return problems


def _output_problems(runs: Runs, batch: Batch) -> list[str]:
    """Return where the outputs the file declares are not those the model returns."""
    declared = runs.file.proto.graph.output
    names = runs.outputs if runs.ordered else in_order(runs.outputs, list(batch.outputs))
    return unequal(list(batch.outputs), names, "outputs") or [
        problem for value in declared for problem in _unfit(value, batch.outputs[value.name], "output")
    ]


def _unfit(value: onnx.ValueInfoProto, array: Array, what: str) -> list[str]:
    """Return a problem if what a graph declares of a value does not allow an array."""
    tensor = value.type.tensor_type
    if not tensor.elem_type:
        return [f"expected the {what} {value.name} to be a tensor, received {value.type.WhichOneof('value')}"]
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    sizes = [size.dim_value if size.HasField("dim_value") else None for size in tensor.shape.dim]
    rounded = dtype == np.float16 and array.dtype == np.float32
    fits = len(sizes) == array.ndim and all(a in (None, b) for a, b in zip(sizes, array.shape, strict=True))
    if (dtype == array.dtype or rounded) and (fits or not tensor.HasField("shape")):
        return []
    shape = ", ".join("?" if size is None else str(size) for size in sizes)
    return [f"expected the {what} {value.name} of {array.dtype} {array.shape}, received {dtype} ({shape})"]
