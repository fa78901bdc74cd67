"""Fine-tune a PyTorch model, in one process or under ``accelerate launch``."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import accelerate
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from ..errors import VerificationError
from ..layers.torch.group_norm import guard
from ..patchers.torch import inference
from ..sources.data import Data
from .batches import batch_indices
from .hooks import RenormLimits
from .schedules import learning_rate
from .torch_helpers import norm_parameters

Array = NDArray[Any]

MAX_GRADIENT_NORM = 1.0


def train(
    model: nn.Module,
    data: Data,
    *,
    steps: int,
    batch_size: int,
    lr: float,
    teacher: nn.Module | None = None,
    train: Literal["all", "norm"] = "all",
    temperature: float = 2.0,
    schedule: RenormLimits | None = None,
    seed: int = 0,
    state: Mapping[str, Array] | None = None,
    start: int = 0,
    on_step: Callable[[int, float, Callable[[], dict[str, Array]]], None] | None = None,
) -> None:
    """Train ``model`` in place from step ``start`` to ``steps``, by SGD with momentum 0.9 and a cosine rate.

    Without ``teacher`` the loss is the cross-entropy with the labels; with one it is
    T²·KL(teacher || student) of the logits softened by ``temperature`` T (Hinton et al., "Distilling the Knowledge
    in a Neural Network", section 2), and no label is used. ``train="norm"`` leaves all but the normalization
    layers' parameters alone. After each step ``on_step`` receives the number of steps taken, the loss and a
    function that returns the optimizer's state; with that as ``state`` and the step as ``start``, a run goes on as
    if it had not stopped: order of the data, rates and random numbers depend on ``seed`` and the step alone.

    Raises `VerificationError` if the loss is not finite; the model is then as it was before that step.
    """
    accelerator = accelerate.Accelerator()
    with _trainable(model, train) as parameters, _guarded(model):
        optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9)
        if state is not None:
            _load_state(optimizer, state)
        prepared, optimizer = accelerator.prepare(model, optimizer)
        if teacher is not None:
            teacher = teacher.to(accelerator.device)
        for step in range(start, steps):
            torch.manual_seed(seed * 1_000_003 + step)
            if schedule is not None:
                schedule.on_step(step)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, lr)
            indices = batch_indices(len(data), batch_size, step, seed)
            images, labels = data.batch(indices[accelerator.process_index :: accelerator.num_processes])
            x = torch.from_numpy(images).to(accelerator.device)
            prepared.train()
            loss = _loss(prepared(x), torch.from_numpy(labels).to(x.device), x, teacher, temperature)
            if not torch.isfinite(loss):
                raise VerificationError(
                    f"expected a finite loss, received loss={loss.item()} at step={step}; lower --lr"
                )
            optimizer.zero_grad()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)
            optimizer.step()
            if on_step is not None:
                on_step(step + 1, loss.item(), lambda: _save_state(optimizer))
    model.eval()


def predict(model: nn.Module, x: Array) -> Array:
    """Return the model's output in eval mode for a batch of inputs."""
    device = next((p.device for p in model.parameters()), None)
    with inference(model):
        return model(torch.from_numpy(x).to(device)).float().cpu().numpy()  # type: ignore[no-any-return]


def layers(model: nn.Module) -> Iterator[nn.Module]:
    """Yield every module of ``model`` once."""
    return model.modules()


def _loss(output: Tensor, labels: Tensor, x: Tensor, teacher: nn.Module | None, temperature: float) -> Tensor:
    if teacher is None:
        return F.cross_entropy(output, labels)
    with inference(teacher):
        wanted = teacher(x)
    student = F.log_softmax(output / temperature, dim=1)
    return F.kl_div(student, F.softmax(wanted / temperature, dim=1), reduction="batchmean") * temperature**2


@contextmanager
def _trainable(model: nn.Module, which: Literal["all", "norm"]) -> Iterator[list[nn.Parameter]]:
    """Let only the chosen parameters learn, those that are frozen already never; restore the flags afterwards."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    if which == "norm":
        norms = norm_parameters(model)
        for parameter, _ in flags:
            if id(parameter) not in norms:
                parameter.requires_grad_(False)
    try:
        yield [parameter for parameter, _ in flags if parameter.requires_grad]
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def _guarded(model: nn.Module) -> Iterator[None]:
    """Guard the model's own GroupNorms as `patch` does those it puts in."""
    handles = [guard(module) for module in model.modules() if isinstance(module, nn.GroupNorm)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _save_state(optimizer: Any) -> dict[str, Array]:
    return {
        f"{index}.{name}": value.detach().cpu().numpy()
        for index, entry in optimizer.state_dict()["state"].items()
        for name, value in entry.items()
        if isinstance(value, Tensor)
    }


def _load_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Array]) -> None:
    loaded: dict[int, dict[str, Tensor]] = {}
    for key, value in state.items():
        index, _, name = key.partition(".")
        loaded.setdefault(int(index), {})[name] = torch.from_numpy(np.array(value))
    optimizer.load_state_dict({**optimizer.state_dict(), "state": loaded})
