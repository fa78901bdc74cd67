"""Switchable Normalization and Batch Renormalization in Opacus: which are private, and their per-sample gradients."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.torch import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d, SwitchNorm1d, SwitchNorm2d, SwitchNorm3d

_SWITCH_NORMS = (SwitchNorm1d, SwitchNorm2d, SwitchNorm3d)
_BATCH_RENORMS = (BatchRenorm1d, BatchRenorm2d, BatchRenorm3d)


def register_opacus() -> None:
    """Make Opacus know these layers; call it before ``PrivacyEngine`` or ``ModuleValidator``, once or again.

    ``ModuleValidator`` then refuses the layers in which samples of a batch see each other, BatchRenorm and SwitchNorm
    with ``batch_statistics="moving"``, and takes SwitchNorm with ``"frozen"`` or ``"none"``. ``ModuleValidator.fix``
    turns ``"moving"`` into ``"frozen"``, which is the same function at inference. The per-sample gradients of
    SwitchNorm are those of each sample alone.
    """
    from opacus.grad_sample import GradSampleModule, register_grad_sampler
    from opacus.validators import register_module_fixer, register_module_validator

    if SwitchNorm2d in GradSampleModule.GRAD_SAMPLERS:
        return
    register_module_validator(_BATCH_RENORMS)(_refuse)
    register_module_validator(_SWITCH_NORMS)(lambda norm: _refuse(norm) if norm.batch_statistics == "moving" else [])
    register_module_fixer(_SWITCH_NORMS)(_anchor)
    register_grad_sampler(_SWITCH_NORMS)(per_sample_gradients)
    _let_constants_pass(next(cls for cls in GradSampleModule.__mro__ if "validate" in vars(cls)))


def per_sample_gradients(norm: Any, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """Return the gradients (N, ...) of a SwitchNorm's parameters for each sample alone.

    ``activations`` holds the input (N, C, ...), ``backprops`` is the gradient of the output.
    """
    bare = copy.copy(norm)  # without Opacus's hooks, which would take the calls below for the model's own
    bare.__dict__ |= {"_parameters": dict(norm._parameters), "_forward_hooks": {}, "_backward_hooks": {}}

    def output(parameters: dict[str, Tensor], x: Tensor, dy: Tensor) -> Tensor:
        """Return the sum of dy·y for one sample."""
        total: Tensor = (torch.func.functional_call(bare, parameters, (x[None],)) * dy[None]).sum()
        return total

    parameters = {name: parameter.detach() for name, parameter in norm.named_parameters()}
    gradients = torch.func.vmap(torch.func.grad(output), (None, 0, 0))(parameters, activations[0], backprops)
    return {getattr(norm, name): gradient for name, gradient in gradients.items()}


def _refuse(norm: Any) -> list[Exception]:
    from opacus.validators.errors import ShouldReplaceModuleError

    if isinstance(norm, _SWITCH_NORMS):
        received = f"{type(norm).__name__}(batch_statistics='moving')"
        way_out = (
            "set batch_statistics='frozen', which ModuleValidator.fix does and which is the same at inference, "
            "or patch to batch_statistics='none' or GroupNorm"
        )
    else:
        received = type(norm).__name__
        way_out = "patch to SwitchNorm with batch_statistics='frozen' or 'none', or to GroupNorm"
    return [
        ShouldReplaceModuleError(
            f"expected layers in which no sample sees another, received {received}, which in training normalizes each "
            f"sample by its whole batch; {way_out}"
        )
    ]


def _anchor(norm: Any, **options: Any) -> Any:
    if norm.batch_statistics == "moving":
        norm = copy.deepcopy(norm)
        norm.batch_statistics = "frozen"
    return norm


def _let_constants_pass(hooks: Any) -> None:
    """Let Opacus's check for buffers overlook anchored statistics and the temperature.

    It refuses every trainable layer with buffers, as these usually follow the data; these are constants.
    """
    check = hooks.validate.__func__

    def validate(cls: Any, module: nn.Module, *, strict: bool = False) -> Any:
        with _without_constants(module):
            return check(cls, module, strict=strict)

    hooks.validate = classmethod(validate)


@contextmanager
def _without_constants(model: nn.Module) -> Iterator[None]:
    anchored = [m for m in model.modules() if getattr(m, "batch_statistics", None) in ("frozen", "none")]
    held = [norm._buffers for norm in anchored]
    for norm in anchored:
        norm._buffers = {}
    try:
        yield
    finally:
        for norm, buffers in zip(anchored, held, strict=True):
            norm._buffers = buffers
