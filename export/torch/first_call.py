"""The call of a watched PyTorch model before it is traced, which tells its outputs' names and what cannot be traced."""

from collections.abc import Iterable

from torch import Tensor

from ...errors import NormswapError, UnsupportedError
from ...frameworks.example import Inputs, not_taken
from ...frameworks.torch import Probe, call, taken_by
from ..failures import reason_of


def called(probe: Probe, example: Inputs, inputs: list[str], *, kind: str = "ONNX") -> list[Tensor]:
    """Return the arrays of ``example``, which are called ``inputs``, as tensors that the model was called with.

    Raises `UnsupportedError` for a model that cannot be watched, or whose numbers a file of this ``kind`` lacks, and
    `InputError` for an example that it does not take.
    """
    tensors = [taken_by(probe.model, array) for array in example.arrays.values()]
    _require_real("inputs", zip(inputs, tensors, strict=False), kind)
    try:
        outputs = probe(*tensors)  # what a module notes while it is traced is put back
    except NormswapError:
        raise
    except Exception as error:
        raise _refusal(probe, example, error) from error
    _require_real("outputs", zip(probe.output_names, outputs, strict=False), kind)
    return tensors


def _require_real(what: str, tensors: Iterable[tuple[str, Tensor]], kind: str) -> None:
    """Raise `UnsupportedError` for a tensor of complex numbers."""
    for name, tensor in tensors:
        if tensor.is_complex():
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise UnsupportedError(
                f"expected {what} of real numbers, which {kind} has alone, received {name} of {dtype}; "
                "let the model take or return torch.view_as_real of it"
            )


def _refusal(probe: Probe, example: Inputs, error: Exception) -> NormswapError:
    """Return what is to be said of a model that failed while its layers were watched."""
    try:
        call(probe.model, example)
    except Exception:
        return not_taken(reason_of(error))
    return UnsupportedError(
        f"expected a model whose layers can be watched while it runs, received {type(probe.model).__name__}, on which "
        f"that fails: {reason_of(error)}; call its layers outside of control flow and transforms"
    )
