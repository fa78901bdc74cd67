"""Fine-tune a PyTorch model, in one process or under ``accelerate launch`` and ``torchrun``."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import accelerate
import numpy as np
import torch
from torch import Tensor, nn

from ....data.dataset import Data
from ....errors import InputError, VerificationError
from ....frameworks.torch import call, float_type, inference
from ....layers.torch.group_norm import guard
from ....layers.torch.passes import exact
from ...hooks.hook import Hook
from ...hooks.scores import scores
from ...hooks.torch.learning import Learning
from ..loading import StepBatches
from ..rate import Rate
from ..training import DECIDING, SEEDS, Array, OnStep, State, Taken, Training, not_finite, taking
from .accelerator import accelerator_in
from .average import Average
from .loading import reader, ready
from .loss import Criterion, criterion
from .optimizer import optimizer_of
from .processes import synchronized
from .state import load_state, save_state


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
    reductions: Callable[[], int] = int,
    on_step: OnStep | None = None,
) -> None:
    """Train ``model`` in place from step ``start`` to the last of ``training``.

    Without ``teacher`` the loss is the cross-entropy with the labels; with one it is the divergence from it (see
    `Distillation`), no label is used, and the model computes as at inference. ``hooks`` are told each step; whoever
    gives them opens and closes them.
    ``first`` is the step of a longer run that this training's step 0 is, for hooks, the order of the data and random
    numbers. ``reductions`` tells how often the schedule ``"plateau"`` has lowered the rate. After each step ``on_step``
    is told what was `Taken`; with its state as ``state`` and its step as ``start``, a run goes on as if it had not
    stopped.

    In several processes each takes its share of every batch, SN and BRN take their batch statistics over all of
    them (see `Training`), and gradients are those of the whole batch.

    Raises `VerificationError` if the loss is not finite; the model is then as it was before that step.
    Raises `InputError` for batches smaller than the number of processes, `UnsupportedError` if nothing in the model
    can be trained or what can is in half precision, and for labels without scores (N, classes),
    `MissingDependencyError` if the device cannot compute in the precision asked for.
    """
    accelerator, deciding = _accelerator(training, data), data.batch(range(min(len(data), DECIDING)))[0]
    share = slice(accelerator.process_index, None, accelerator.num_processes)
    images = StepBatches(data, training, first=first + start, steps=training.steps - start, share=share)
    teacher = None if teacher is None else teacher.to(accelerator.device)
    with (
        _in_mode(model, training=teacher is None),
        Learning(model, training.train),
        _guarded(model),
        synchronized(model) if training.sync_statistics else nullcontext(),
        criterion(model, teacher, training, deciding) as loss_of,
    ):
        optimizer: Any = optimizer_of(model, training)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        peaks, rate = [group["lr"] for group in optimizer.param_groups], Rate(training, len(data))
        if accelerator.num_processes > 1 and not _all_used(model, parameters, deciding[:1]):
            # Only then, since it costs a look at the whole graph each step.
            accelerator.ddp_handler = accelerate.DistributedDataParallelKwargs(find_unused_parameters=True)
        prepared, optimizer = accelerator.prepare(_Scored(model), optimizer)
        average = Average(parameters, training.ema)
        if state is not None:
            load_state(optimizer, average, state)
        batches = iter(reader(images, training.workers))
        for step in range(start, training.steps):
            seed = (training.seed * 1_000_003 + first + step) * 1_009 + accelerator.process_index
            torch.manual_seed(seed % SEEDS)
            for hook in hooks:
                hook.on_step(first + step)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = rate.at(step, peak, reductions())
            optimizer.zero_grad()
            loss, right = _gradients(accelerator, prepared, loss_of, batches, training)
            if not np.isfinite(loss):
                raise VerificationError(not_finite(loss, first + step))
            if training.max_grad_norm:
                accelerator.clip_grad_norm_(parameters, training.max_grad_norm)
            optimizer.step()
            average.update()
            if on_step is not None:
                taken = Taken(
                    step + 1,
                    loss,
                    right,
                    optimizer.param_groups[0]["lr"],
                    partial(save_state, optimizer, average),
                    average.in_place,
                )
                if on_step(taken):
                    break


def predict(model: nn.Module, x: Array, batch_size: int = 256) -> Array:
    """Return the model's scores in eval mode for inputs (N, ...), computed ``batch_size`` at a time."""
    with inference(model):
        parts = [
            scores(call(model, x[begin : begin + batch_size])).float().cpu().numpy()
            for begin in range(0, len(x), batch_size)
        ]
    return np.concatenate(parts)


def _accelerator(training: Training, data: Data) -> accelerate.Accelerator:
    accelerator, batch_size = accelerator_in(training.precision), min(training.batch_size, len(data))
    if batch_size < accelerator.num_processes:
        raise InputError(
            f"expected a batch of at least {accelerator.num_processes} images, one for each process, "
            f"received batch_size={batch_size}"
        )
    return accelerator


def _gradients(
    accelerator: accelerate.Accelerator,
    prepared: nn.Module,
    loss_of: Criterion,
    batches: Iterator[Any],
    training: Training,
) -> tuple[float, float | None]:
    """Accumulate a step's gradients; return its mean loss and the percentage of labels that were right."""
    sums, seen = exact(torch.zeros(2, device=accelerator.device)), 0  # of losses and of right labels
    world, count, dtype = accelerator.num_processes, training.accumulate, float_type(prepared)
    for part in range(count):
        images, labels, of = ready(next(batches))
        x, y = images.to(accelerator.device, dtype), labels.to(accelerator.device)
        waits = part + 1 < count and world > 1  # gradients are exchanged with the last part
        with accelerator.no_sync(prepared) if waits else nullcontext():
            with accelerator.autocast():
                with taking(x.shape, partial(_failing, prepared)):
                    output = prepared(x)
                loss, right = loss_of(x, output, y)
            accelerator.backward(loss * (len(x) * world / of / count))
        sums += torch.stack([exact(loss.detach()) * len(x), torch.zeros_like(sums[0]) if right is None else right])
        seen += of
    if world > 1:
        sums = accelerator.reduce(sums)
    loss_sum, right_sum = sums.tolist()
    return loss_sum / seen, None if right is None else 100 * right_sum / seen


def _failing(model: nn.Module, error: BaseException) -> str:
    """Return the layer that an error comes from: the last module that Python was in."""
    inside, frame = [model], error.__traceback__
    while frame is not None:
        inside += [each for each in [frame.tb_frame.f_locals.get("self")] if isinstance(each, nn.Module)]
        frame = frame.tb_next
    names = {module: name for name, module in model.named_modules()}
    name = names.get(inside[-1], "").removeprefix("module.").removeprefix("model").removeprefix(".")
    return f"{name} ({type(inside[-1]).__name__})" if name else "the model"


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


@contextmanager
def _in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Put the model in train or eval mode for a while.

    One that is taught is in eval mode, as its teacher is and as it is used later: a model that drops units, or sees
    batches where the other sees running statistics, learns to make up for what it alone is lacking.
    """
    flags = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextmanager
def _guarded(model: nn.Module) -> Iterator[None]:
    """Guard the model's own GroupNorms as `patch` does those it puts in."""
    handles = [guard(module) for module in model.modules() if isinstance(module, nn.GroupNorm)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
