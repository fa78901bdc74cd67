"""Fine-tune a PyTorch model, in one process or under ``accelerate launch`` and ``torchrun``."""

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

from ...errors import InputError, MissingDependencyError, UnsupportedError, VerificationError
from ...layers.torch.group_norm import guard
from ...patchers.torch import inference
from ...sources.data import Data
from ..distillation import Distillation
from ..hooks import Hook
from ..loading import StepBatches
from ..schedules import learning_rate
from ..training import MAX_GRADIENT_NORM, MOMENTUM, Array, OnStep, State, Taken, Training, not_finite
from .helpers import convert_sync, param_groups
from .parts import Learning

_CPU = not torch.accelerator.is_available()  # Accelerate does not see for itself that processes are to meet on CPUs
Criterion = Callable[[Tensor, Tensor, Tensor], Tensor]


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
    can be trained, `MissingDependencyError` if the device cannot compute in the precision asked for.
    """
    accelerator = _accelerator(training, min(training.batch_size, len(data)))
    share = slice(accelerator.process_index, None, accelerator.num_processes)
    images = StepBatches(data, training, first=first + start, steps=training.steps - start, share=share)
    model.train()
    with Learning(model, training.train), _guarded(model), _synchronized(model, accelerator):
        groups = param_groups(model, training.weight_decay, gate_lr=training.lr * training.gate_lr)
        parameters = [parameter for group in groups for parameter in group["params"]]
        if not parameters:
            raise UnsupportedError(
                f"expected a model with parameters to train, received none with train={training.train!r}"
            )
        optimizer = torch.optim.SGD(groups, lr=training.lr, momentum=MOMENTUM)
        peaks = [group["lr"] for group in optimizer.param_groups]
        prepared, optimizer = accelerator.prepare(model, optimizer)
        accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)  # evaluations are not to be narrow
        average = _Average(parameters, training.ema)
        if state is not None:
            _load_state(optimizer, average, accelerator.scaler, state)
        with _criterion(model, teacher, training, accelerator.device) as criterion:
            loader: Any = DataLoader(images, batch_size=None, num_workers=training.workers)  # type: ignore[arg-type]
            batches = iter(loader)
            for step in range(start, training.steps):
                torch.manual_seed((training.seed * 1_000_003 + first + step) * 1_009 + accelerator.process_index)
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
                        None if teacher else right,
                        optimizer.param_groups[0]["lr"],
                        partial(_save_state, optimizer, average, accelerator.scaler),
                        average.in_place,
                    )
                    if on_step(taken):
                        break
    model.eval()


def predict(model: nn.Module, x: Array) -> Array:
    """Return the model's output in eval mode for a batch of inputs."""
    device = next((p.device for p in model.parameters()), None)
    with inference(model):
        return model(torch.from_numpy(x).to(device)).float().cpu().numpy()  # type: ignore[no-any-return]


def processes() -> tuple[int, int]:
    """Return this process's rank and how many train together."""
    state = accelerate.PartialState(cpu=_CPU)
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
) -> tuple[float, float]:
    """Accumulate a step's gradients; return its mean loss and the percentage of labels that were right."""
    sums = torch.zeros(3, dtype=torch.float64, device=accelerator.device)  # loss, right, images
    world, count = accelerator.num_processes, training.accumulate
    for part in range(count):
        images, labels, of = _ready(next(batches))
        x, y = images.to(accelerator.device), labels.to(accelerator.device)
        waits = part + 1 < count and world > 1  # gradients are exchanged with the last part
        with accelerator.no_sync(prepared) if waits else nullcontext():
            with accelerator.autocast():
                output = prepared(x)
                loss = criterion(x, output, y)
            accelerator.backward(loss * (len(x) * world / of / count))
        right = (output.detach().argmax(1) == y).sum()
        sums += torch.stack([loss.detach().double() * len(x), right.double(), torch.tensor(len(x), device=x.device)])
    if world > 1:
        sums = accelerator.reduce(sums)
    loss_sum, right_sum, images_seen = sums.tolist()
    return loss_sum / images_seen, 100 * right_sum / images_seen


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
    """Yield the loss as a function of inputs, output and labels."""
    if teacher is None:
        yield lambda x, output, labels: F.cross_entropy(output, labels)
        return
    with Distillation(model, teacher.to(device), training.temperature, training.features) as distillation:
        yield lambda x, output, labels: distillation(x, output)


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
