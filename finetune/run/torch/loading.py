"""Batches read ahead for a PyTorch model."""

import signal
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ..loading import StepBatches


def reader(images: StepBatches, workers: int) -> "DataLoader[Any]":
    """Return what reads batches ahead in ``workers`` processes."""
    source: Any = images
    return DataLoader(source, batch_size=None, num_workers=workers, worker_init_fn=_stay if workers else None)


def ready(batch: Any) -> tuple[Tensor, Tensor, int]:
    """Return a batch read by a worker as tensors; its error, which a worker can only hand over, is raised here."""
    if isinstance(batch, Exception):
        raise batch
    images, labels, of = batch
    return torch.as_tensor(images), torch.as_tensor(labels), of


def _stay(worker: int) -> None:
    """Leave it to the run when a worker ends: signals that tell it to stop often reach the whole process group."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
