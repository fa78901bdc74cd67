"""What the hooks do to a Keras model."""

from .blend import blend
from .distillation import as_logits, distance, divergence, infer, learns
from .gates import Gates
from .layers import replaced
from .learning import Learning, check_part
from .limits import renorms, set_limits
from .momentum import scale_momentum
from .statistics import moving_layers, update_statistics

__all__ = [
    "Gates",
    "Learning",
    "as_logits",
    "blend",
    "check_part",
    "distance",
    "divergence",
    "infer",
    "learns",
    "moving_layers",
    "renorms",
    "replaced",
    "scale_momentum",
    "set_limits",
    "update_statistics",
]
