"""What a run writes down: rows that survive a kill, TensorBoard events, and forgetting what is run again."""

import csv
import struct
import sys

import pytest

from normswap.errors import MissingDependencyError
from normswap.finetune.run.journal import COLUMNS, METRICS, ORIGINAL, Journal, read

from .helpers import exactly


def written(folder):
    """Return the table as any reader of CSV sees it."""
    with (folder / METRICS).open(newline="") as file:
        return list(csv.reader(file))


def events(folder):
    """Return every event of every file, in order, read by the format's own definition."""
    from tensorboardX.crc32c import crc32c
    from tensorboardX.proto.event_pb2 import Event

    def sum_of(data):
        crc = crc32c(data)
        return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF

    found = []
    for file in sorted((folder / "tensorboard").iterdir()):
        assert "tfevents" in file.name
        data = file.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            record = data[12 : 12 + size]
            assert struct.unpack("<I", data[8:12]) == (sum_of(data[:8]),)
            assert struct.unpack("<I", data[12 + size : 16 + size]) == (sum_of(record),)
            found.append(Event.FromString(record))
            data = data[16 + size :]
    return found


def scalars(folder):
    return {(v.tag, event.step): v.simple_value for event in events(folder) for v in event.summary.value}


class TestTable:
    def test_a_row_is_in_the_file_at_once(self, tmp_path):
        """A row can be read when `row` returns, with what is not known left empty, and the numbers to the last bit."""
        with Journal(tmp_path) as journal:
            journal.row(1, stage="norm", loss=0.1 + 0.2, learning_rate=1e-5, accuracy=None)

            assert written(tmp_path) == [
                list(COLUMNS),
                ["1", "norm", "", "0.30000000000000004", "", "1e-05", *7 * [""]],
            ]

    def test_reading_gives_back_what_was_written(self, tmp_path):
        """Steps are integers, figures floats or None, whatever the stage is called."""
        with Journal(tmp_path) as journal:
            journal.row(0, stage=ORIGINAL, eval_top1=81.35)
            journal.row(1, stage='last:2, "all"', loss=float("nan"), clipped=0.25)
        first, second = read(tmp_path / METRICS)
        loss = second.pop("loss")

        assert first == dict.fromkeys(COLUMNS) | {"step": 0, "stage": "original", "eval_top1": 81.35}
        assert second["stage"] == 'last:2, "all"'
        assert (second["step"], second["clipped"], second["drift"]) == (1, 0.25, None)
        assert loss != loss

    def test_a_figure_of_another_name(self, tmp_path):
        """A misspelt figure is refused, and nothing of the row is written."""
        message = (
            "expected figures out of epoch, loss, accuracy, learning_rate, images_per_second, seconds, eval_loss, "
            "eval_top1, eval_top5, drift, clipped, received lr"
        )
        with Journal(tmp_path) as journal, pytest.raises(TypeError, match=exactly(message)):
            journal.row(1, loss=1.0, lr=0.1)

        assert read(tmp_path / METRICS) == []

    def test_going_on(self, tmp_path):
        """A journal opened again goes on after its rows."""
        for step in (1, 2):
            with Journal(tmp_path) as journal:
                journal.row(step, loss=float(step))

        assert [row["loss"] for row in read(tmp_path / METRICS)] == [1, 2]


class TestRewind:
    @pytest.mark.parametrize("cut", [1, 2, 5, 20])
    def test_a_killed_run(self, tmp_path, cut):
        """Going on from step 2 forgets step 3 and the row that was cut off, wherever it was."""
        with Journal(tmp_path) as journal:
            for step in (1, 2, 3, 4):
                journal.row(step, stage="all", loss=step / 3, eval_top1=80.0)
        path = tmp_path / METRICS
        path.write_bytes(path.read_bytes()[:-cut])
        with Journal(tmp_path) as journal:
            journal.rewind(2)
            journal.row(3, stage="all", loss=7.0)

        assert [(row["step"], row["loss"]) for row in read(path)] == [(1, 1 / 3), (2, 2 / 3), (3, 7.0)]
        assert [file.name for file in tmp_path.iterdir()] == [METRICS]

    def test_to_the_start(self, tmp_path):
        """Going on from step 0 keeps what was measured before the first step."""
        with Journal(tmp_path) as journal:
            journal.row(0, stage=ORIGINAL, eval_top1=90.0)
            journal.row(1, loss=1.0)
            journal.rewind(0)

        assert [row["stage"] for row in read(tmp_path / METRICS)] == [ORIGINAL]

    @pytest.mark.parametrize("damage", ["2,all,x,,,,,,,\n", "2,all\n", "2,all,,,,,,,,,\n", "\0\0\0\0\n"])
    def test_a_damaged_row(self, tmp_path, damage):
        """Rows are taken up to the first that is not whole; the run goes on after them."""
        with Journal(tmp_path) as journal:
            journal.row(1, loss=1.0)
        with (tmp_path / METRICS).open("a") as file:
            file.write(f"{damage}3,all,1.0,,,,,,,\n")
        with Journal(tmp_path) as journal:
            journal.rewind(9)

        assert [row["step"] for row in read(tmp_path / METRICS)] == [1]


class TestTensorBoard:
    def test_scalars(self, tmp_path):
        """Every figure is a scalar of its group; the original's accuracy is no point of the run's curve."""
        with Journal(tmp_path, tensorboard=True) as journal:
            journal.row(0, stage=ORIGINAL, eval_top1=90.0)
            journal.row(1, loss=0.5, learning_rate=0.25, eval_top1=75.0)

        assert events(tmp_path)[0].file_version == "brain.Event:2"
        assert scalars(tmp_path) == {
            ("train/loss", 1): 0.5,
            ("train/learning_rate", 1): 0.25,
            ("eval/top1", 1): 75.0,
        }

    def test_gates(self, tmp_path):
        """Each layer's gates are scalars by name, two where there are two."""
        with Journal(tmp_path, tensorboard=True) as journal:
            journal.gates(7, {"stem.1": ((0.25, 0.25, 0.5), (0.0, 0.0, 1.0)), "bn": ((0.5, 0.5), (0.75, 0.25))})

        found = scalars(tmp_path)
        assert found[("gates/stem.1/mean/batch", 7)] == 0.5
        assert found[("gates/bn/var/instance", 7)] == 0.75
        assert len(found) == 10

    def test_rewind(self, tmp_path):
        """A run that goes on tells TensorBoard from which step on earlier files do not count."""
        for first, last in ((1, 4), (3, 5)):
            with Journal(tmp_path, tensorboard=True) as journal:
                if first > 1:
                    journal.rewind(first - 1)
                for step in range(first, last):
                    journal.row(step, loss=float(step))

        (purge,) = [event for event in events(tmp_path) if event.HasField("session_log")]
        assert (purge.step, purge.session_log.status) == (3, purge.session_log.START)
        assert len(list((tmp_path / "tensorboard").iterdir())) == 2

    def test_flush(self, tmp_path):
        """After `flush`, which a checkpoint calls, a kill loses no event before it."""
        with Journal(tmp_path, tensorboard=True) as journal:
            journal.row(1, loss=0.5)
            journal.flush()

            assert scalars(tmp_path) == {("train/loss", 1): 0.5}

    def test_not_installed(self, tmp_path, monkeypatch):
        """Without tensorboardX the error names the extra, and nothing is written."""
        monkeypatch.setitem(sys.modules, "tensorboardX", None)
        message = "TensorBoard events need tensorboardX: pip install 'normswap[plot]'"
        with pytest.raises(MissingDependencyError, match=exactly(message)):
            Journal(tmp_path / "run", tensorboard=True)

        assert not (tmp_path / "run").exists()

    def test_gates_without_tensorboard(self, tmp_path):
        """Without events the gates go nowhere, and the table has no column for them."""
        with Journal(tmp_path) as journal:
            journal.gates(1, {"bn": ((1.0, 0.0), (0.0, 1.0))})

        assert [file.name for file in tmp_path.iterdir()] == [METRICS]
        assert written(tmp_path) == [list(COLUMNS)]
