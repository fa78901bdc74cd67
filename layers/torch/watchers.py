"""Who watches what a layer computes, and so has to see torch's own operations.

Numba's kernels, NumPy and a `torch.autograd.Function` run unseen: a tracer would write down memory without what filled
it, a tensor without data has nothing to pass on, and a transform of the code could not transform them. Every layer asks
here before it takes such a way. What only looks at the ends, as autograd, its saved-tensor hooks, checkpointing,
`torch.nn.Module` hooks and CUDA graphs do, is none: those see what they came for.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_DISABLED = torch._C._disabled_torch_dispatch_impl


def watched(*tensors: Tensor | None) -> bool:
    """Return whether anybody is to see the operations on ``tensors``.

    These are `torch.compile` and `torch.export`; ``torch.jit.trace`` and the exporter built on it; ``torch.func`` and
    its vmap, which `torch.autograd.functional` uses too; forward-mode derivatives; modes of the dispatcher, as
    ``make_fx``, ``FakeTensorMode``, ``FlopCounterMode`` and anybody's own are; and tensors whose class does the
    dispatching, fake, distributed or anybody's own.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.maybe_current_level() is not None
        or forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
        or any(map(_dispatches, tensors))
    )


def _dispatches(tensor: Any) -> bool:
    cls = type(tensor)
    return isinstance(tensor, Tensor) and cls is not Tensor and cls.__torch_dispatch__ is not _DISABLED
