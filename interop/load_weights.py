"""The weights of another system's network, or of one's own, given to a patched model."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError, spoken
from ..frameworks.detect import framework_of
from .checkpoint import Checkpoint, read_checkpoint

_FILES = {"torch": "a PyTorch checkpoint", "keras": "a file of Keras"}


@dataclass(frozen=True)
class Loaded:
    """What `load_weights` found in a file: the system that wrote it, and how many layers got weights.

    ``system`` is "switchablenorms", "keras-switchnorm", "BatchRenormalization", "GroupNormalization-keras" or
    "normswap", which means the patched model's own weights. ``norms`` are the replaced layers.
    """

    system: str
    norms: int
    others: int

    def __str__(self) -> str:
        return f"{self.system} weights for {self.norms} norms and {self.others} other layers"


def load_weights(model: Any, path: str | Path, *, eps: float | None = None, batches: int | None = None) -> Loaded:
    """Give a patched model the weights in ``path``: of another system's network without BatchNorm, or its own.

    What the file is, its content tells. It is read without running anything in it, and loaded whole, the layers that
    are no norms too, or not at all.

    - A checkpoint of **switchablenorms** (PyTorch; a state dict, or one in their trainer's dictionary, with or without
      ``module.``), by names. The model's SwitchNorm layers are given ``compat="switchablenorms"`` and its momentum, by
      whose formulas the network was trained (unbiased variances, momentum as the weight of the old value), so that in
      training and at inference they compute what the published layers compute.
    - HDF5 of Keras 1 or 2, weights or a whole model, by names, or where Keras numbered them, by number
      (``switch_normalization_2`` is the second norm, ``batch_normalization_1`` in Keras 3). At inference the layers
      compute what those of **keras-switchnorm**, **BatchRenormalization** (by its running statistics, ε added again to
      a variance that includes it) and **GroupNormalization-keras** compute; in training they go on by this library's
      formulas. A file of weights does not tell GroupNormalization's number of groups: it is the patched model's.
    - The **model's own** weights: a state dict, or what Keras saves.

    Args:
        model: A patched model, of the network that the weights are of.
        path: The file with the weights, whatever it is called.
        eps: The ε the network was trained with, with which the model has to be built; by default what a whole model's
            file says, or else one of those that the system publishes: 1e-5 or, in its face networks, 2e-5 for
            switchablenorms, 1e-3 or 1e-5 for keras-switchnorm and BatchRenormalization, 1e-6 for
            GroupNormalization-keras.
        batches: Number of batches that a batch average of switchablenorms was summed over when it was saved (see
            `normswap.interop.switchablenorms.from_switchablenorms`).

    Returns:
        What the file was, and how many layers got weights.

    Raises:
        InputError: If the model is not patched, patched to something else or of the other framework, and where names,
            shapes, gates, dimensions, ε or groups do not fit. The model is unchanged then.

    Example:
        >>> import normswap, torch
        >>> build = lambda: torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> trained = normswap.patch(build(), "sn").model
        >>> torch.save(trained.state_dict(), "net.pth")
        >>> print(normswap.load_weights(normswap.patch(build(), "sn").model, "net.pth"))
        normswap weights for 1 norms and 1 other layers
    """
    framework = framework_of(model)
    checkpoint = read_checkpoint(Path(path))
    if checkpoint.framework != framework:
        found = _FILES[checkpoint.framework]
        raise InputError(f"expected {_FILES[framework]} for a {framework} model, received {path}, {found}")
    if batches is not None and checkpoint.system != "switchablenorms":
        raise InputError(
            f"expected `batches` for weights of switchablenorms alone, received batches={batches} for {path} of "
            f"{checkpoint.system}"
        )
    if framework == "torch":
        from . import into_torch

        _require_patched(into_torch.norms_of(model), checkpoint)
        return Loaded(checkpoint.system, *into_torch.load(model, checkpoint, eps, batches))
    from . import into_keras

    _require_patched(into_keras.norms_of(model), checkpoint)
    return Loaded(checkpoint.system, *into_keras.load(model, checkpoint, eps))


def _require_patched(norms: Mapping[str, str], checkpoint: Checkpoint) -> None:
    """Raise `InputError` unless the model has norms of the kind that the weights are of."""
    path, kinds = checkpoint.path, sorted(set(norms.values()))
    wanted = checkpoint.kind or "gn"
    way_out = spoken(f"--to {wanted}", f'normswap.patch(model, "{wanted}")')
    if not kinds:
        raise InputError(
            f"expected a patched model for the weights in {path}, received one without replaced layers; patch the "
            f"model first: {way_out}"
        )
    if checkpoint.kind not in (None, *kinds):
        raise InputError(
            f"expected a model patched to {wanted} for the weights in {path} of {checkpoint.system}, received one "
            f"patched to {', '.join(kinds)}; patch to {wanted} first: {way_out}"
        )
