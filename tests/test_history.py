"""What a run wrote down, read back by step and by epoch."""

import csv

import pytest

from normswap.bundles.manifest import SETTINGS
from normswap.errors import UnsupportedError
from normswap.finetune import History
from normswap.finetune.run.history import COLUMNS
from normswap.finetune.run.journal import METRICS, ORIGINAL, Journal

from .helpers import exactly


def run_of(folder, steps=10, per_epoch=4, **figures):
    """Write down a run that evaluates at every second step and whose first step takes long."""
    with Journal(folder / "run") as journal:
        journal.row(0, stage=ORIGINAL, epoch=0.0, eval_top1=90.0)
        journal.row(0, stage="start", epoch=0.0, eval_top1=10.0, eval_loss=3.0)
        for step in range(1, steps + 1):
            told = {"eval_top1": 50.0 + step, "eval_loss": 1 / step} if step % 2 == 0 else {}
            journal.row(
                step,
                stage="norm" if step < 4 else "all",
                epoch=step / per_epoch,
                loss=10.0 - step,
                learning_rate=0.1 / step,
                seconds=9.0 if step == 1 else 0.5,
                **told,
                **figures,
            )
    (folder / "run" / SETTINGS).touch()
    return folder


def test_epochs(tmp_path):
    """Losses are means, rates and evaluations those of the end, seconds those of a whole pass, of the last too."""
    first, second, third = History.of(run_of(tmp_path)).epochs()

    assert first == {
        "epoch": 1.0, "step": 4, "stage": "all", "loss": 7.5, "accuracy": None, "learning_rate": 0.025,
        "eval_loss": 0.25, "eval_top1": 54.0, "eval_top5": None, "seconds": 2.0,
    }  # fmt: skip
    assert (second["epoch"], second["loss"], second["eval_top1"]) == (2.0, 3.5, 58.0)
    assert (third["epoch"], third["step"], third["loss"], third["seconds"]) == (2.5, 10, 0.5, 2.0)


def test_steps_that_do_not_divide_an_epoch(tmp_path):
    """A step belongs to the pass that it ends in; rounding makes no other of it."""
    found = History.of(run_of(tmp_path, steps=30, per_epoch=3.0000000001)).epochs()
    other = History.of(run_of(tmp_path / "other", steps=5, per_epoch=2.5)).epochs()

    assert [row["step"] for row in found] == list(range(3, 31, 3))
    assert [row["step"] for row in other] == [2, 5]


def test_a_pass_without_an_evaluation(tmp_path):
    """It has none, and not the one of another pass."""
    assert [row["eval_top1"] for row in History.of(run_of(tmp_path, steps=3, per_epoch=1)).epochs()] == [
        None,
        52.0,
        None,
    ]


def test_summary(tmp_path):
    """It tells how far the run came, the best of its evaluations, and whether there is a bundle."""
    assert History.of(run_of(tmp_path)).summary() == {
        "run": str(tmp_path), "finished": False, "steps": 10, "epochs": 2.5, "loss": 0.5, "eval_loss": 0.1,
        "eval_top1": 60.0, "best_top1": 60.0, "best_step": 10, "seconds_per_epoch": 2.0,
    }  # fmt: skip
    (tmp_path / "normswap.json").write_text("{}")
    assert History.of(tmp_path / "run").finished


def test_the_table(tmp_path):
    """It has a line for each pass, as any reader of CSV sees it."""
    history = History.of(run_of(tmp_path))
    history.write(tmp_path / "epochs.csv")
    with (tmp_path / "epochs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))

    assert tuple(rows[0]) == COLUMNS
    assert [(row["epoch"], row["loss"], row["eval_loss"]) for row in rows] == [
        ("1.0", "7.5", "0.25"), ("2.0", "3.5", "0.125"), ("2.5", "0.5", "0.1")
    ]  # fmt: skip


def test_a_run_of_an_older_version(tmp_path):
    """One without the columns of today has its steps, and no epochs."""
    (tmp_path / "run").mkdir()
    old = "step,stage,loss,accuracy,learning_rate,images_per_second,eval_top1,eval_top5,drift,clipped\n"
    (tmp_path / "run" / METRICS).write_text(old + "1,all,0.5,,0.1,100.0,80.0,,,\n")
    history = History.of(tmp_path)

    assert [(row["step"], row["loss"], row["eval_top1"], row["epoch"]) for row in history.steps] == [(1, 0.5, 80, None)]
    assert history.epochs() == []
    assert history.summary()["steps"] == 1


def test_no_run(tmp_path):
    """Where there is none the error says what makes one."""
    message = f"expected a fine-tuning run in {tmp_path}, received none; `finetune` makes one"
    with pytest.raises(UnsupportedError, match=exactly(message)):
        History.of(tmp_path)
