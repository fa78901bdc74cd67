"""The scorecard: nineteen models that are hard to convert, put before every converter there is.

A case builds a model with BatchNorms, has it converted and says whether what its name promises holds. The test is the
same for all converters, whatever they convert to.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import peers
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import normswap

Convert = Callable[[nn.Module, Tensor], nn.Module]
"""Takes a model and an input that it accepts, returns the converted model."""


def converters() -> dict[str, Convert]:
    """Return the converters by name."""
    peers.make_importable()
    from opacus.validators import ModuleValidator
    from timm.layers import convert_splitbn_model, convert_sync_batchnorm
    from timm.utils.model import freeze_batch_norm_2d

    def alone(convert: Callable[[nn.Module], nn.Module]) -> Convert:
        return lambda model, x: convert(model)

    def ours(target: str) -> Convert:
        return lambda model, x: normswap.patch(model, target, example=x).model

    return {
        "Opacus fix": alone(ModuleValidator.fix),
        "torch SyncBN": alone(nn.SyncBatchNorm.convert_sync_batchnorm),
        "timm SyncBN": alone(convert_sync_batchnorm),
        "timm freeze": alone(freeze_batch_norm_2d),
        "timm SplitBN": alone(partial(convert_splitbn_model, num_splits=2)),
        **{f"normswap {target}": ours(target) for target in ("sn", "brn", "gn")},
    }


def verdicts(convert: Convert) -> dict[str, str]:
    """Return what becomes of each case: ``ok``, ``wrong``, or the name of the exception it raises."""
    found = {}
    for name, case in CASES.items():
        torch.manual_seed(0)
        try:
            found[name] = "ok" if case(convert) else "wrong"
        except Exception as error:
            found[name] = type(error).__name__
    return found


def _gamma_and_beta(convert: Convert) -> bool:
    return _function_kept(convert, nn.BatchNorm2d(8))


def _eps(convert: Convert) -> bool:
    model = convert(nn.Sequential(nn.BatchNorm2d(8, eps=1e-3)), _images())
    return _converted(model[0]) and model[0].eps == 1e-3


def _twice_in_one_parent(convert: Convert) -> bool:
    norm = nn.BatchNorm2d(8)
    model = convert(nn.Sequential(norm, nn.ReLU(), norm), _images())
    return _converted(model[0]) and model[0] is model[2]


def _in_two_parents(convert: Convert) -> bool:
    norm = nn.BatchNorm2d(8)
    model = convert(nn.Sequential(nn.Sequential(norm), nn.Sequential(norm)), _images())
    return _converted(model[0][0]) and model[0][0] is model[1][0]


def _activation(convert: Convert) -> bool:
    from timm.layers import BatchNormAct2d

    x = _images()
    model = convert(nn.Sequential(BatchNormAct2d(8)), x).eval()
    return type(model[0]) is not BatchNormAct2d and bool(model(x).min() == 0)


def _without_affine(convert: Convert) -> bool:
    return _function_kept(convert, nn.BatchNorm2d(8, affine=False))


def _that_does_not_learn(convert: Convert) -> bool:
    model = convert(nn.Sequential(nn.BatchNorm2d(8).requires_grad_(False)), _images())
    return _converted(model[0]) and not any(p.requires_grad for p in model.parameters())


def _lazy(convert: Convert) -> bool:
    x = _images()
    model = nn.Sequential(nn.LazyBatchNorm2d())
    try:
        model = convert(model, x)
    except Exception:
        return True  # refused, which is well
    return _converted(model[0]) and model(x).shape == x.shape


def _mode(convert: Convert) -> bool:
    model = nn.Sequential(nn.BatchNorm2d(8), nn.BatchNorm2d(8).eval())
    model = convert(model, _images())
    return all(map(_converted, model)) and [norm.training for norm in model] == [True, False]


def _half(convert: Convert) -> bool:
    model = nn.Sequential(nn.BatchNorm2d(8)).half()
    had = [name for name, tensor in model.state_dict().items() if tensor.is_floating_point()]
    model = convert(model, _images().half())
    kept = [tensor for name, tensor in model.state_dict().items() if name in had]
    return _converted(model[0]) and all(tensor.dtype == torch.float16 for tensor in kept)


_heard: list[str] = []


def _hear(module: nn.Module, inputs: Any, output: Any) -> None:
    _heard.append("a call")


def _hook(convert: Convert) -> bool:
    x = _images()
    model = nn.Sequential(nn.BatchNorm2d(8))
    model[0].register_forward_hook(_hear)
    model = convert(model, x).eval()
    _heard.clear()
    model(x)
    return _converted(model[0]) and len(_heard) == 1


def _without_bias(convert: Convert) -> bool:
    return _function_kept(convert, nn.BatchNorm2d(8, bias=False))


class _Listing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(8)
        self.layers = [self.norm]

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x)


def _in_a_list(convert: Convert) -> bool:
    model: Any = convert(_Listing(), _images())
    return _converted(model.norm) and model.layers[0] is model.norm


def _parametrized(convert: Convert) -> bool:
    norm = nn.BatchNorm2d(8)
    parametrize.register_parametrization(norm, "weight", nn.Identity())
    return _function_kept(convert, norm)


def _vectors(convert: Convert) -> bool:
    x = torch.randn(64, 4)
    model = nn.Sequential(_trained(nn.BatchNorm1d(4))).eval()
    signal = model(x).std(0)
    model = convert(model, x)
    return _converted(model[0]) and bool((model(x).std(0) > 0.1 * signal).all())


def _root(convert: Convert) -> bool:
    return _converted(convert(nn.BatchNorm2d(8), _images()))


def _instance_norm(convert: Convert) -> bool:
    model = convert(nn.Sequential(nn.BatchNorm2d(8), nn.InstanceNorm2d(8, affine=True)), _images())
    return _converted(model[0]) and type(model[1]) is nn.InstanceNorm2d


def _optimizer(convert: Convert) -> bool:
    model = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
    held = torch.optim.SGD(model.parameters(), lr=0.1).param_groups[0]["params"]
    model = convert(model, _images())
    return _converted(model[1]) and {id(p) for p in held} <= {id(p) for p in model.parameters()}


def _meta(convert: Convert) -> bool:
    model = convert(nn.Sequential(nn.BatchNorm2d(8)).to("meta"), _images().to("meta"))
    return _converted(model[0]) and all(tensor.is_meta for tensor in model.state_dict().values())


CASES: Mapping[str, Callable[[Convert], bool]] = {
    "γ, β kept": _gamma_and_beta,
    "ε kept": _eps,
    "same BatchNorm twice in one parent: one object": _twice_in_one_parent,
    "same BatchNorm in two parents: one object": _in_two_parents,
    "BatchNormAct2d keeps its activation": _activation,
    "affine=False": _without_affine,
    "requires_grad=False stays": _that_does_not_learn,
    "LazyBatchNorm handled or refused": _lazy,
    "training mode of each layer kept": _mode,
    "float16 kept": _half,
    "forward hook kept": _hook,
    "bias=False": _without_bias,
    "BatchNorm also held in a plain list": _in_a_list,
    "parametrized weight": _parametrized,
    "BatchNorm1d on (N, C) keeps the signal": _vectors,
    "the model is a BatchNorm": _root,
    "InstanceNorm untouched": _instance_norm,
    "optimizer still owns its parameters": _optimizer,
    "meta device": _meta,
}


def _images() -> Tensor:
    return torch.randn(4, 8, 6, 6)


def _trained(norm: Any) -> Any:
    """Give a BatchNorm running statistics, a scale and a shift, as far as it has them."""
    with torch.no_grad():
        for tensor, low, high in (
            (norm.weight, 0.5, 2.0),
            (norm.bias, -1.0, 1.0),
            (norm.running_mean, -1.0, 1.0),
            (norm.running_var, 0.2, 3.0),
        ):
            if tensor is not None:
                tensor.uniform_(low, high)
    return norm


def _function_kept(convert: Convert, norm: nn.Module) -> bool:
    """Tell whether a converted BatchNorm computes what it did, to a tenth, at inference.

    On samples each of which has the running statistics, so that it does not matter whose statistics are taken.
    """
    model = nn.Sequential(_trained(norm)).eval()
    x = _images()
    x = (x - x.mean((2, 3), keepdim=True)) / x.std((2, 3), keepdim=True, correction=0)
    x = x * norm.running_var.sqrt().view(1, -1, 1, 1) + norm.running_mean.view(1, -1, 1, 1)  # type: ignore[operator, union-attr]
    before, cls = model(x), type(norm)
    model = convert(model, x).eval()
    return _converted(model[0], cls) and bool((model(x) - before).norm() < 0.1 * before.norm())


def _converted(module: nn.Module, before: type | None = None) -> bool:
    """Tell whether a module is no longer a BatchNorm as torch has it, or of the class ``before``."""
    return type(module) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LazyBatchNorm2d, before)
