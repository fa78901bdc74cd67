"""The norms of a PyTorch model, each call of which stands for itself in the traced graph until a form takes its place.

Traced like any other layer, a norm would be the operators that its forward happens to call.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...frameworks.torch import watching
from ...layers.torch.batch_renorm import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d
from ...layers.torch.switch_norm import SwitchNorm1d, SwitchNorm2d, SwitchNorm3d
from ...patchers.torch.batch_norm import epsilon_of
from ..norms import BATCH, LAYER, Gates, Norm, amplification_of, three

DOMAIN = "normswap"

SWITCH = SwitchNorm1d, SwitchNorm2d, SwitchNorm3d
_RENORM = BatchRenorm1d, BatchRenorm2d, BatchRenorm3d


class StandIns:
    """The calls of a model's norms in the last trace; the n-th left a node of the domain `DOMAIN` with number n."""

    def __init__(self, model: nn.Module) -> None:
        self.calls: list[Norm] = []
        self._norms = {name: module for name, module in model.named_modules() if _has_form(module)}
        self._seen: dict[str, float] = {}

    def looking(self) -> AbstractContextManager[None]:
        """Note for each norm without running statistics how far its input's means are above its deviation."""

        def note(name: str, x: Tensor, output: Any) -> None:
            module: Any = self._norms[name]
            found = amplification_of(_double(x), _groups(module), epsilon_of(module))
            self._seen[name] = max(self._seen.get(name, 0.0), found)

        plain = {name: module for name, module in self._norms.items() if _statistics(module)[0] is None}
        return watching(plain, note)

    def put(self) -> None:
        """Let every norm leave a node that stands for it in place of its own operators."""
        for name, module in self._norms.items():
            module.forward = self._stand_in(_norm(name or type(module).__name__, module, self._seen.get(name)))

    def marks(self, graph: ir.Graph) -> list[ir.Node]:
        """Return the nodes that the calls left, by their numbers."""
        found = [node for node in graph if node.domain == DOMAIN]
        return sorted(found, key=lambda node: node.attributes["number"].as_int())

    def _stand_in(self, norm: Norm) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            self.calls.append(norm.call(x.shape, self.calls))
            mark: Tensor = torch.onnx.ops.symbolic(
                f"{DOMAIN}::Norm", (x,), {"number": len(self.calls) - 1}, dtype=x.dtype, shape=x.shape, version=1
            )
            return mark

        return forward


def _has_form(module: nn.Module) -> bool:
    """Whether a module is a norm whose forward is its class's own."""
    if "forward" in vars(module):
        return False
    return isinstance(module, (*SWITCH, *_RENORM)) or type(module).forward is nn.GroupNorm.forward


def _norm(name: str, module: Any, seen: float | None) -> Norm:
    channels = module.num_channels if isinstance(module, nn.GroupNorm) else module.num_features
    mean, var = _statistics(module)
    return Norm(
        name=name,
        spatial=(),
        gamma=np.ones(channels) if module.weight is None else _double(module.weight),
        beta=np.zeros(channels) if module.bias is None else _double(module.bias),
        eps=epsilon_of(module),
        gates=_gates(module),
        mean=mean,
        var=var,
        groups=_groups(module),
        seen=seen,
        unbiased=getattr(module, "compat", None) is not None,
    )


def _gates(module: Any) -> tuple[Gates, Gates]:
    if isinstance(module, nn.GroupNorm):
        return LAYER, LAYER
    if isinstance(module, _RENORM):
        return BATCH, BATCH
    mean, var = module.gates()
    return three(mean.detach().tolist()), three(var.detach().tolist())


def _groups(module: Any) -> int:
    return module.num_groups if isinstance(module, nn.GroupNorm) else 1


def _statistics(module: Any) -> tuple[NDArray[np.float64] | None, NDArray[np.float64] | None]:
    if getattr(module, "running_mean", None) is None:
        return None, None
    return _double(module.running_mean), _double(module.running_var)


def _double(tensor: Tensor) -> NDArray[np.float64]:
    return tensor.detach().cpu().double().numpy()
