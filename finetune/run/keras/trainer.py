"""All that a run asks of Keras, in one place; see `normswap.finetune.run.contract.Trainer`."""

from .processes import agree, gathered, place, processes
from .seed import seed
from .state import shapes
from .train import predict, train

__all__ = ["agree", "gathered", "place", "predict", "processes", "seed", "shapes", "train"]
