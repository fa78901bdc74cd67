"""Reading ahead in PyTorch's workers: the same batches as without any."""

import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from normswap.data.dataset import open_data
from normswap.data.preprocessing import Preprocessing
from normswap.errors import InputError
from normswap.finetune.run.loading import StepBatches
from normswap.finetune.run.torch.loading import reader
from normswap.finetune.run.training import Training

TRAINING = Training(batch_size=4, augment="resized-crop,flip", seed=3)


@pytest.fixture
def folder(tmp_path):
    """Twelve images of two classes."""
    random = np.random.default_rng(0)
    for index in range(12):
        path = tmp_path / "ab"[index % 2]
        path.mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 256, (20, 30, 3), np.uint8)).save(path / f"{index:02}.png")
    return tmp_path


@pytest.mark.parametrize(("start", "workers"), [("fork", 2), ("spawn", 1)])
def test_workers(folder, start, workers):
    """However workers begin and however many there are, every step sees the same bits in the same order."""
    data = open_data(str(folder), Preprocessing((3, 8, 8), "channels_first"))
    batches = StepBatches(data, TRAINING, first=2, steps=6)
    loader = DataLoader(batches, batch_size=None, num_workers=workers, multiprocessing_context=start)
    found = list(loader)

    assert len(found) == 6
    for step, (images, labels, count) in enumerate(found):
        expected = batches[step]
        assert torch.equal(images, torch.from_numpy(expected[0]))
        assert (labels.tolist(), count) == (expected[1].tolist(), 4)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all(folder, number):
    """Workers read on when a signal reaches the whole process group: it is the run's to end after its step."""
    data = open_data(str(folder), Preprocessing((3, 8, 8), "channels_first"))
    batches = iter(reader(StepBatches(data, TRAINING, first=0, steps=40), 2))
    found = [next(batches), next(batches)]  # by now both have begun
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, number)

    assert len(found + list(batches)) == 40


def test_an_unreadable_image(folder):
    """A worker hands the error over as it is, without the traceback a loader would write into its message."""
    (folder / "a" / "00.png").write_bytes(b"no image")
    data = open_data(str(folder), Preprocessing((3, 8, 8), "channels_first"))
    found = list(DataLoader(StepBatches(data, TRAINING, first=0, steps=3), batch_size=None, num_workers=1))
    (error,) = [batch for batch in found if isinstance(batch, Exception)]

    assert type(error) is InputError
    assert str(error) == f"expected an image in {folder}/a/00.png, received: no image Pillow knows"
