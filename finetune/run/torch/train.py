"""Fine-tune a PyTorch model, in one process or under ``accelerate launch`` and ``torchrun``."""

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import accelerate
import numpy as np
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ....data.dataset import Data
from ....errors import InputError, MissingDependencyError, UnsupportedError, VerificationError, option
from ....frameworks.torch import call, float_type, inference
from ....layers.torch.group_norm import guard
from ....layers.torch.passes import exact
from ...hooks.distillation import Distillation
from ...hooks.hook import Hook
from ...hooks.schedules import learning_rate
from ...hooks.scores import class_count, logits, scores
from ...hooks.torch.learning import Learning
from ...hooks.torch.statistics import convert_sync, param_groups
from ..loading import StepBatches
from ..training import MAX_GRADIENT_NORM, MOMENTUM, SEEDS, Array, OnStep, State, Taken, Training, not_finite

_CPU = not torch.accelerator.is_available()  # Accelerate does not see for itself that processes are to meet on CPUs
Criterion = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]


def train(
    model: nn.Module,
    data: Data,
    training: Training,
    *,
    teacher: nn.Module | None = None,
    hooks: Sequence[Hook] = (),
    first: int = 0,
    start: int = 0,
    state: State | None = None,
    on_step: OnStep | None = None,
) -> None:
    """Train ``model`` in place from step ``start`` to the last of ``training``.

    Without ``teacher`` the loss is the cross-entropy with the labels; with one it is the divergence from it (see
    `Distillation`) and no label is used. ``hooks`` are told each step. ``first`` is the step of a longer run that
    this training's step 0 is, for hooks, the order of the data and random numbers. After each step ``on_step`` is
    told what was `Taken`; with its state as ``state`` and its step as ``start``, a run goes on as if it had not
    stopped.

    In several processes each takes its share of every batch, SN and BRN take their batch statistics over all of
    them, and gradients are those of the whole batch.

    Raises `VerificationError` if the loss is not finite; the model is then as it was before that step.
    Raises `InputError` for batches smaller than the number of processes, `UnsupportedError` if nothing in the model
    can be trained or what can is in half precision, and for labels without scores (N, classes),
    `MissingDependencyError` if the device cannot compute in the precision asked for.
    """
    accelerator = _accelerator(training, min(training.batch_size, len(data)))
    if teacher is None:
        class_count(predict(model, data.batch([0])[0]))
    share = slice(accelerator.process_index, None, accelerator.num_processes)
    images = StepBatches(data, training, first=first + start, steps=training.steps - start, share=share)
    with (
        _train_mode(model),
        Learning(model, training.train),
        _guarded(model),
        _synchronized(model, accelerator),
    ):
        groups = param_groups(model, training.weight_decay, gate_lr=training.lr * training.gate_lr)
        parameters = [parameter for group in groups for parameter in group["params"]]
        if not parameters:
            raise UnsupportedError(
                f"expected a model with parameters to train, received none with train={training.train!r}"
            )
        _require_wide(parameters)
        optimizer = torch.optim.SGD(groups, lr=training.lr, momentum=MOMENTUM)
        peaks = [group["lr"] for group in optimizer.param_groups]
        if accelerator.num_processes > 1 and not _all_used(model, parameters, data.batch([0])[0]):
            # Only then, since it costs a look at the whole graph each step.
            accelerator.ddp_handler = accelerate.DistributedDataParallelKwargs(find_unused_parameters=True)
        prepared, optimizer = accelerator.prepare(_Scored(model), optimizer)
        average = _Average(parameters, training.ema)
        if state is not None:
            _load_state(optimizer, average, accelerator.scaler, state)
        with _criterion(model, teacher, training, accelerator.device) as criterion:
            batches = iter(reader(images, training.workers))
            for step in range(start, training.steps):
                seed = (training.seed * 1_000_003 + first + step) * 1_009 + accelerator.process_index
                torch.manual_seed(seed % SEEDS)
                for hook in hooks:
                    hook.on_step(first + step)
                for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                    group["lr"] = learning_rate(step, training.steps, peak, training.warmup, training.decay)
                optimizer.zero_grad()
                loss, right = _gradients(accelerator, prepared, criterion, batches, training)
                if not np.isfinite(loss):
                    raise VerificationError(not_finite(loss, first + step))
                accelerator.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)
                optimizer.step()
                average.update()
                if on_step is not None:
                    taken = Taken(
                        step + 1,
                        loss,
                        right,
                        optimizer.param_groups[0]["lr"],
                        partial(_save_state, optimizer, average, accelerator.scaler),
                        average.in_place,
                    )
                    if on_step(taken):
                        break


def reader(images: StepBatches, workers: int) -> "DataLoader[Any]":
    """Return what reads batches ahead in ``workers`` processes."""
    source: Any = images
    return DataLoader(source, batch_size=None, num_workers=workers, worker_init_fn=_stay if workers else None)


def _stay(worker: int) -> None:
    """Leave it to the run when a worker ends: signals that tell it to stop often reach the whole process group."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def predict(model: nn.Module, x: Array, batch_size: int = 256) -> Array:
    """Return the model's scores in eval mode for inputs (N, ...), computed ``batch_size`` at a time."""
    with inference(model):
        parts = [
            scores(call(model, x[begin : begin + batch_size])).float().cpu().numpy()
            for begin in range(0, len(x), batch_size)
        ]
    return np.concatenate(parts)


def place(model: nn.Module) -> None:
    """Put ``model`` on the device where it will be trained."""
    model.to(_state().device)


def processes() -> tuple[int, int]:
    """Return this process's rank and how many train together."""
    state = _state()
    return state.process_index, state.num_processes


def gathered(value: Any) -> list[Any]:
    """Return the value of every process, in the order of their ranks."""
    return gather_object([value]) if processes()[1] > 1 else [value]


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of every entry of the model's state, by name."""
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def snapshot(model: nn.Module) -> Callable[[], None]:
    """Return what gives the model back the weights and statistics it has now."""
    kept = {name: value.clone() for name, value in model.state_dict().items()}

    def restore() -> None:
        model.load_state_dict(kept)

    return restore


def _state() -> accelerate.PartialState:
    return accelerate.PartialState(cpu=_CPU)


def _accelerator(training: Training, batch_size: int) -> accelerate.Accelerator:
    AcceleratorState._reset_state()  # else the first training of a process would choose the precision of all
    precision = None if training.precision == "no" else training.precision  # None leaves it to `accelerate launch`
    try:
        accelerator = accelerate.Accelerator(mixed_precision=precision, cpu=_CPU)
    except (ValueError, ImportError) as error:
        raise MissingDependencyError(
            f"expected a device that computes in precision={training.precision}, received: {error}"
        ) from None
    if batch_size < accelerator.num_processes:
        raise InputError(
            f"expected a batch of at least {accelerator.num_processes} images, one for each process, "
            f"received batch_size={batch_size}"
        )
    return accelerator


def _gradients(
    accelerator: accelerate.Accelerator,
    prepared: nn.Module,
    criterion: Criterion,
    batches: Iterator[Any],
    training: Training,
) -> tuple[float, float | None]:
    """Accumulate a step's gradients; return its mean loss and the percentage of labels that were right."""
    sums, seen = exact(torch.zeros(2, device=accelerator.device)), 0  # of losses and of right labels
    world, count, dtype = accelerator.num_processes, training.accumulate, float_type(prepared)
    for part in range(count):
        images, labels, of = _ready(next(batches))
        x, y = images.to(accelerator.device, dtype), labels.to(accelerator.device)
        waits = part + 1 < count and world > 1  # gradients are exchanged with the last part
        with accelerator.no_sync(prepared) if waits else nullcontext():
            with accelerator.autocast():
                loss, right = criterion(x, prepared(x), y)
            accelerator.backward(loss * (len(x) * world / of / count))
        sums += torch.stack([exact(loss.detach()) * len(x), torch.zeros_like(sums[0]) if right is None else right])
        seen += of
    if world > 1:
        sums = accelerator.reduce(sums)
    loss_sum, right_sum = sums.tolist()
    return loss_sum / seen, None if right is None else 100 * right_sum / seen


def _ready(batch: Any) -> tuple[Tensor, Tensor, int]:
    """Return a batch read by a worker as tensors; its error, which a worker can only hand over, is raised here."""
    if isinstance(batch, Exception):
        raise batch
    images, labels, of = batch
    return torch.as_tensor(images), torch.as_tensor(labels), of


@contextmanager
def _criterion(
    model: nn.Module, teacher: nn.Module | None, training: Training, device: torch.device
) -> Iterator[Criterion]:
    """Yield the loss, and how many labels were right where they count, as a function of inputs, scores and labels."""
    if teacher is None:
        yield lambda x, output, labels: (
            F.cross_entropy(logits(output, torch), labels),
            (output.detach().argmax(1) == labels).sum(),
        )
        return
    with Distillation(model, teacher.to(device), training.temperature, training.features) as distillation:
        yield lambda x, output, labels: (distillation(x, output), None)


class _Scored(nn.Module):
    """The model as it is trained: of several outputs only the scores, which the loss is of.

    What Accelerate wraps is this, so that the model itself stays as it is.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        """Return the scores."""
        return scores(self.model(x))


def _all_used(model: nn.Module, parameters: Sequence[nn.Parameter], x: Array) -> bool:
    """Whether the scores depend on every one of the parameters."""
    with inference(model), torch.enable_grad():
        gradients = torch.autograd.grad(scores(call(model, x)).sum(), parameters, allow_unused=True)
    return all(gradient is not None for gradient in gradients)


def _require_wide(parameters: Sequence[nn.Parameter]) -> None:
    """Raise `UnsupportedError` for parameters too coarse for a step's changes to add up in."""
    for dtype in {parameter.dtype for parameter in parameters} - {torch.float32, torch.float64}:
        raise UnsupportedError(
            f"expected parameters to train in torch.float32 or torch.float64, received some in {dtype}, in which most "
            f"steps change nothing; load the model in float32, and let {option('precision', 'bf16')} compute in less"
        )


@contextmanager
def _train_mode(model: nn.Module) -> Iterator[None]:
    """Put the model in train mode for a while."""
    flags = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def _guarded(model: nn.Module) -> Iterator[None]:
    """Guard the model's own GroupNorms as `patch` does those it puts in."""
    handles = [guard(module) for module in model.modules() if isinstance(module, nn.GroupNorm)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _synchronized(model: nn.Module, accelerator: accelerate.Accelerator) -> Iterator[None]:
    """Take the batch statistics of SN and BRN over all processes."""
    if accelerator.num_processes > 1:
        convert_sync(model)
    try:
        yield
    finally:
        if accelerator.num_processes > 1:
            convert_sync(model, sync=False)


class _Average:
    """An exponential moving average of parameters; none with a decay of 0."""

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = parameters, decay
        self.values = [parameter.detach().clone() for parameter in parameters] if decay else []

    def update(self) -> None:
        if self.values:
            with torch.no_grad():
                torch._foreach_lerp_(self.values, list(self.parameters), 1 - self.decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the parameters the average's values for a while."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.parameters, self.values, strict=False):
                kept = parameter.detach().clone()
                parameter.copy_(value)
                value.copy_(kept)


def _save_state(optimizer: Any, average: _Average, scaler: Any) -> dict[str, Array]:
    found = {
        f"optimizer.{index}.{name}": value
        for index, entry in optimizer.state_dict()["state"].items()
        for name, value in entry.items()
        if isinstance(value, Tensor)
    }
    found |= {f"average.{index}": value for index, value in enumerate(average.values)}
    arrays = {name: value.detach().cpu().numpy().copy() for name, value in found.items()}
    if scaler is not None:
        arrays |= {f"scaler.{name}": np.asarray(value) for name, value in scaler.state_dict().items()}
    return arrays


def _load_state(optimizer: torch.optim.Optimizer, average: _Average, scaler: Any, state: State) -> None:
    loaded: dict[int, dict[str, Tensor]] = {}
    scale: dict[str, Any] = {}
    for key, value in state.items():
        kind, _, name = key.partition(".")
        if kind == "scaler":
            scale[name] = value.item()
        elif kind == "average":
            average.values[int(name)].copy_(torch.from_numpy(value))
        else:
            index, _, name = name.partition(".")
            loaded.setdefault(int(index), {})[name] = torch.from_numpy(np.array(value))
    optimizer.load_state_dict({**optimizer.state_dict(), "state": loaded})
    if scaler is not None and scale:
        scaler.load_state_dict(scale)
