"""What PyTorch draws the weights of new layers from."""

import torch

from ..training import SEEDS


def seed(number: int) -> None:
    """Let the weights of a model that is built next depend on ``number`` alone."""
    torch.manual_seed(number % SEEDS)
