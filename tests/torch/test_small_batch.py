"""The experiment of several processes: who trains what, how they are started and stopped, and what is made of it."""

import signal
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn

from normswap.data.dataset import from_arrays
from normswap.data.preprocessing import Preprocessing
from normswap.errors import UnsupportedError, UsageError
from normswap.finetune.run.interruption import StoppedError
from normswap.reproduce import experiment as experiments
from normswap.reproduce import processes, small_batch
from normswap.reproduce.experiment import Curve, Experiment, Finding, Outcome, reproduce

from ..helpers import exactly

pytestmark = pytest.mark.torch

SMALL = Preprocessing((1, 4, 4), "channels_first")


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 2))


def images(spec, preprocessing, output):
    rng = np.random.default_rng(0)
    data = from_arrays(rng.uniform(0, 1, (8, 4, 4, 1)).astype(np.float32), np.arange(8) % 2, preprocessing)
    return data, data


def experiment():
    curves = [Curve("one", network, 1, 4), Curve("two", network, 1, 4, processes=2), Curve("more", network, 1, 4)]
    judged = lambda outcomes, scale: [Finding("all", str(sorted(outcomes)), None)]  # noqa: E731
    return Experiment("sizes", "Sizes", "a test", SMALL, images, lambda scale: curves, judged, {"small": ["it is"]})


def run(output, told=None):
    on_curve = lambda curve, *_: told is not None and told.append(curve.name)  # noqa: E731
    return reproduce(experiment(), output, data="there", scale="small", seed=3, on_curve=on_curve)


def test_each_trains_what_takes_as_many(tmp_path, monkeypatch):
    """Processes that were started train theirs and tell nothing; the one that started them does the rest."""
    started, told = [], []

    def launch(count, arguments, runs):
        started.append((count, arguments))
        monkeypatch.setenv("WORLD_SIZE", str(count))
        monkeypatch.setenv("RANK", "1")
        assert run(tmp_path, told) == {}
        monkeypatch.delenv("WORLD_SIZE")
        monkeypatch.delenv("RANK")

    monkeypatch.setattr(experiments, "launch", launch)
    results = run(tmp_path, told)
    given = ["reproduce", "sizes", "--scale", "small", "--seed", "3", "-o", str(tmp_path), "--data", "there"]

    assert [curve["name"] for curve in results["curves"]] == ["one", "two", "more"]
    assert started == [(2, given)]
    assert told == ["one", "more"]

    run(tmp_path)
    assert len(started) == 1


def test_processes_that_train_nothing(tmp_path, monkeypatch):
    """As many as nothing takes say so, rather than end without a word."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    message = "expected one process, which starts what it needs, received 3; give the command without torchrun"
    with pytest.raises(UsageError, match=exactly(message)):
        run(tmp_path)


def test_processes_are_started(capfd):
    """Each gets the command; one that fails is told of, and its own error is there to be read."""
    processes.launch(2, ["--version"], [])
    assert capfd.readouterr().out.count("normswap") == 2

    with pytest.raises(UnsupportedError) as raised:
        processes.launch(1, ["reproduce", "nothing"], [])
    assert str(raised.value) == (
        "expected processes that train together, received exit status 1 of torchrun; their own error is above, and "
        "the same command goes on"
    )
    assert "Invalid value for '{sn-toy|" in capfd.readouterr().err.replace("NAME", "")


def test_processes_are_stopped(tmp_path, monkeypatch):
    """A signal ends them, and the message says how far they came."""

    @contextmanager
    def at_once():
        yield lambda: signal.SIGTERM

    monkeypatch.setattr(processes, "signals", at_once)
    begun = tmp_path / "begun" / "run"
    begun.mkdir(parents=True)
    header = ",".join(experiments_columns())
    (begun / "metrics.csv").write_text(f"{header}\n7,all{',' * (header.count(',') - 1)}\n")
    message = "stopped by SIGTERM after step 7, which is saved; the same command goes on"
    with pytest.raises(StoppedError, match=exactly(message)):
        processes.launch(1, ["reproduce", "sn-toy"], [tmp_path / "begun", tmp_path / "not"])


def experiments_columns():
    from normswap.finetune.run.journal import COLUMNS

    return COLUMNS


def table(falls):
    """Outcomes of all shapes, where the norms in ``falls`` lose ten points with two images a process."""
    return {
        curve.name: Outcome(
            curve.name, [1.0], [1.0], [70.0 - 10 * (curve.name[:2] in falls and curve.name.endswith("8 x 2"))], 1.0
        )
        for curve in small_batch.curves("small")
    }


@pytest.mark.parametrize(
    ("falls", "holds"), [(["BN"], [True, True]), ([], [False, True]), (["BN", "SN"], [True, False])]
)
def test_who_falls(falls, holds):
    """BN has to, SN has not; both are compared with GN."""
    assert [finding.holds for finding in small_batch.judge(table(falls), "small")] == holds
    assert small_batch.judge(table(["BN"]), "small")[0].found == (
        "BN 70.00 % with 8 x 32 and 60.00 % with 8 x 2, GN 70.00 % with 8 x 32 and 70.00 % with 8 x 2: loses 10.00 "
        "points on GN"
    )


def test_the_table():
    """Nine shapes of three norms: processes times images a step, and a picture beside the published."""
    curves = {curve.name: curve for curve in small_batch.curves("small")}
    figure = small_batch.picture(table(["BN"]))

    assert len(curves) == len({curve.folder for curve in curves.values()}) == 27
    assert (curves["SN, 8 x 4"].processes, curves["SN, 8 x 4"].batch_size) == (8, 32)
    assert curves["SN, 1 x 16"].settings["lr"] == pytest.approx(0.00625)
    assert "batch_statistics='none'" in repr(curves["SN, 8 x 1"].build(0))
    assert "batch_statistics='moving'" in repr(curves["SN, 1 x 8"].build(0))
    assert [axes.get_title() for axes in figure.axes] == ["found", "published, ImageNet"]
    assert [len(axes.lines) for axes in figure.axes] == [3, 3]
