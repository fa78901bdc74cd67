"""Training in two processes that meet over gloo is training in one."""

import json
import runpy
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import normswap
from normswap.bundles import bundle
from normswap.finetune.run.batches import batch_indices
from normswap.finetune.run.journal import read
from normswap.finetune.run.settings import Settings
from normswap.finetune.run.torch import processes
from normswap.finetune.run.torch.train import predict

from .models import trained_
from .runs import bundled, coloured, quick

pytestmark = pytest.mark.torch

SETTINGS = {
    "steps": 8, "batch_size": 11, "accumulate": 2, "lr": 0.05, "checkpoint_every": 3, "stages": "norm=2,all",
    "teacher": "original", "early_stop": False, "ema": 0.5,
}  # fmt: skip
SCRIPT = """
import contextlib, io, json, os, signal, sys
from dataclasses import replace
from pathlib import Path

import numpy as np

import heads
from normswap.cli import main
from normswap.errors import NormswapError
from normswap.finetune.run.run import finetune
from normswap.finetune.run.settings import Settings
from normswap.data.dataset import Preprocessing, from_arrays

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
found = np.load(folder / "data.npz")
data = from_arrays(found["x"], found["y"], Preprocessing((3, 12, 12), "channels_first", mean=(0.5,), std=(0.3,)))
(folder / f"heads-{rank}.json").write_text(json.dumps(heads.losses(data)))
settings = Settings(**json.loads(sys.argv[2]))


def shoot(step, figures):
    if step == 3:
        os.kill(os.getpid(), signal.SIGTERM)


said = []
for target in ("sn", "brn", "gn"):
    finetune(folder / f"in-{target}", folder / f"two-{target}", data, settings, eval_data=data, draw=False)
own = replace(settings, **json.loads(sys.argv[3]))
found = finetune(folder / "in-sn", folder / "own", data, own, eval_data=data, draw=False)
(folder / "own.json").write_text(json.dumps(found.kept))
for output, changes, on_step in (
    ("disagree", {"seed": rank}, None), ("stopped", {}, shoot), ("small", {"batch_size": 1}, None)
):
    try:
        finetune(folder / "in-gn", folder / output, data, replace(settings, **changes), on_step=on_step, draw=False)
    except NormswapError as error:
        said.append([str(error), error.exit_code])
os.environ["FORCE_COLOR"] = "1"  # as on a terminal
command = ["finetune", f"{folder}/in-gn", "--data", f"{folder}/data.npz", "-o", f"{folder}/command"]
with contextlib.redirect_stderr(io.StringIO()) as shown:
    main([*command, "--train", "norm", "--steps", "2"], standalone_mode=False)
(folder / f"{rank}.json").write_text(json.dumps([said, shown.getvalue()]))
"""

OWN = {
    "teacher": "none", "stages": "all", "batch_size": 10, "accumulate": 1, "ema": 0.0, "lr": 0.05,
    "sync_statistics": False, "steady_statistics": False,
}  # fmt: skip

HEADS = """
import torch
from torch import nn

from normswap.finetune.run.torch.train import train
from normswap.finetune.run.training import Training


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.first, self.second, self.spare = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        x = self.body(x)
        return (self.first(x), self.second(x)) if self.training else self.first(x)


def losses(data):
    found = []
    training = Training(steps=3, batch_size=11, accumulate=2, weight_decay=0.1)
    train(Heads(), data, training, on_step=lambda taken: found.append(taken.loss))
    return found
"""


def test_two_processes(tmp_path):
    """Losses and accuracies are those of one process with the same batches; all agree or all refuse, and one talks."""
    data = coloured()
    np.savez(tmp_path / "data.npz", x=data._images.images, y=data.labels)
    for target in ("sn", "brn", "gn"):
        path = bundled(tmp_path, target, dropout=0.0)
        quick(path, tmp_path / f"one-{target}", data, Settings(**SETTINGS), eval_data=data)
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "heads.py").write_text(HEADS)
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", str(tmp_path / "script.py"), str(tmp_path)]
    subprocess.run([sys.executable, *command, json.dumps(SETTINGS), json.dumps(OWN)], check=True, timeout=300)

    expected = runpy.run_path(str(tmp_path / "heads.py"))["losses"](data)
    for rank in (0, 1):  # heads that take no part in the scores wait for no gradient
        assert json.loads((tmp_path / f"heads-{rank}.json").read_text()) == pytest.approx(expected, abs=1e-5)
    for target in ("sn", "brn", "gn"):
        one, two = (read(tmp_path / f"{name}-{target}/run/metrics.csv") for name in ("one", "two"))
        for figure in ("loss", "eval_top1", "drift", "clipped"):
            ours, theirs = ([row[figure] or 0.0 for row in rows] for rows in (two, one))
            assert ours == pytest.approx(theirs, abs=1e-5), (target, figure)
    statistics_of_each_process(tmp_path, data)
    said, shown = zip(*(json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)), strict=True)
    assert f"bundle written to {tmp_path}/command\n" in shown[0]
    assert shown[1] == ""
    assert said[0] == said[1]
    assert said[0] == [
        [
            "expected the same model, settings and data in all 2 processes, received 2 different ones; "
            "start all with one command",
            3,
        ],
        ["stopped by SIGTERM after step 4, which is saved; go on with resume=True", 143],
        ["expected a batch of at least 2 images, one for each process, received batch_size=1", 3],
    ]
    assert not (tmp_path / "disagree").exists()
    assert not (tmp_path / "small").exists()


def statistics_of_each_process(folder, data):
    """A step's loss is the mean of what each has by its own images, and what was evaluated is what was saved."""
    rows, (x, labels) = read(folder / "own/run/metrics.csv"), data.batch(batch_indices(len(data), 10, 0, seed=0))
    model = bundle.read(folder / "in-sn", trust=True).model.train()
    parts = [
        functional.cross_entropy(model(torch.as_tensor(x[rank::2])), torch.as_tensor(labels[rank::2])).item()
        for rank in (0, 1)
    ]
    first, kept = next(row for row in rows if row["step"] == 1), json.loads((folder / "own.json").read_text())
    (evaluated,) = (row["eval_loss"] for row in rows if row["step"] == kept)
    scores = predict(bundle.read(folder / "own", trust=True).model, data.batch(range(len(data)))[0])

    assert first["loss"] == pytest.approx(np.mean(parts), abs=1e-6)
    assert kept > 0
    assert functional.cross_entropy(torch.as_tensor(scores), torch.as_tensor(data.labels)).item() == pytest.approx(
        evaluated, abs=1e-6
    )


@pytest.mark.parametrize("target", ["sn", "brn"])
@pytest.mark.parametrize(("world", "during"), [(1, (False, None)), (2, (True, None))])
def test_whose_statistics_a_layer_takes(monkeypatch, target, world, during):
    """While processes train together those of all, and those of its own group where a SyncBatchNorm had one."""
    group = object()
    model = trained_(nn.Sequential(nn.BatchNorm2d(3), nn.SyncBatchNorm(3, process_group=group), nn.SyncBatchNorm(3)))
    normswap.patch(model.eval(), target, example=torch.randn(2, 3, 4, 4))
    monkeypatch.setattr(processes, "processes", lambda: (0, world))
    told = lambda: [(layer.sync, layer.process_group) for layer in model]  # noqa: E731

    assert told() == [(False, None), (True, group), (True, None)]
    with pytest.raises(KeyboardInterrupt), processes.synchronized(model):
        assert told() == [during, (True, group), (True, None)]
        raise KeyboardInterrupt
    assert told() == [(False, None), (True, group), (True, None)]
