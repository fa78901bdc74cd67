"""The picture of several runs: each with its own curves and name, whatever its length and what it measured."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

from normswap.cli import main
from normswap.errors import UnsupportedError, UsageError
from normswap.finetune import History
from normswap.finetune.run import plots
from normswap.finetune.run.journal import METRICS, Journal
from normswap.finetune.run.overlay import overlay

from .helpers import exactly
from .test_history import run_of
from .test_plots import panel, texts

PANELS = ["training loss", "evaluation loss", "training accuracy, %", "evaluation top-1, %", "learning rate"]


def without_evaluation(folder, steps=6):
    """Write down a run that measured losses alone, and ended."""
    with Journal(folder / "run") as journal:
        for step in range(1, steps + 1):
            journal.row(step, stage="all", epoch=step / 2, loss=1.0, seconds=0.1)
    (folder / "normswap.json").write_text("{}")
    return folder


def picture(*folders):
    return overlay([History.of(folder) for folder in folders])


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_panels(tmp_path):
    """There is one for each figure that some run has, over epochs up to the longest run's."""
    figure = picture(run_of(tmp_path / "a", accuracy=50.0), run_of(tmp_path / "b", steps=20))

    assert [axes.get_ylabel() for axes in figure.axes] == [*PANELS, "seconds per epoch"]
    for axes in figure.axes:
        assert (axes.get_xlabel(), axes.get_xlim()) == ("epoch", (0, 5))
    one, other = panel(figure, "evaluation loss").lines
    np.testing.assert_allclose(one.get_xdata(), [0, 0.5, 1, 1.5, 2, 2.5])
    np.testing.assert_allclose(one.get_ydata(), [3, *(1 / step for step in (2, 4, 6, 8, 10))])
    assert len(other.get_xdata()) == 11
    assert [line.get_ydata().tolist() for line in panel(figure, "seconds per epoch").lines] == [3 * [2.0], 5 * [2.0]]


def test_names(tmp_path):
    """A run is called by so much of its path as tells it from others, in the colour of its curves."""
    paths = [tmp_path / name for name in ("x/sn", "y/sn", "y/bn")]
    figure = picture(*(run_of(path) for path in paths))
    handles = figure.legends[0].legend_handles

    assert legend(figure) == ["x/sn (not ended)", "y/sn (not ended)", "y/bn (not ended)"]
    colours = [line.get_color() for line in panel(figure, "learning rate").lines]
    assert [handle.get_color() for handle in handles] == colours
    assert len(set(colours)) == 3


def test_what_a_run_did_not_measure(tmp_path):
    """It has no curve there, and the legend says so; what no run measured has no panel."""
    figure = picture(run_of(tmp_path / "a"), without_evaluation(tmp_path / "b"))

    assert legend(figure) == ["a (not ended)", "b (not evaluated)"]
    assert len(panel(figure, "evaluation loss").lines) == 1
    assert len(panel(figure, "training loss").lines) == 2
    assert "training accuracy, %" not in [axes.get_ylabel() for axes in figure.axes]


def test_runs_without_epochs(tmp_path):
    """A run of an older version is drawn over steps, and all others beside it."""
    (tmp_path / "old/run").mkdir(parents=True)
    old = "step,stage,loss,accuracy,learning_rate,images_per_second,eval_top1,eval_top5,drift,clipped\n"
    (tmp_path / "old/run" / METRICS).write_text(old + "1,all,0.5,,0.1,9,,,,\n2,all,0.4,,0.1,9,,,,\n")
    figure = picture(run_of(tmp_path / "new"), tmp_path / "old")

    assert {axes.get_xlabel() for axes in figure.axes} == {"step"}
    assert [len(line.get_xdata()) for line in panel(figure, "training loss").lines] == [10, 2]
    assert "seconds per epoch" not in [axes.get_ylabel() for axes in figure.axes]


@pytest.mark.parametrize("count", [2, 9])
def test_no_label_lies_on_another(tmp_path, count):
    """All text is on the picture and none of it overlaps; no two runs look the same."""
    figure = picture(*(run_of(tmp_path / f"a-rather-long-name-{i}", steps=40 + i) for i in range(count)))
    labels = {*legend(figure), *(axes.get_ylabel() for axes in figure.axes)}
    found = [(text, box) for text, box in texts(figure) if text in labels]
    clashes = [
        (one, other)
        for index, (one, box) in enumerate(found)
        for other, second in found[:index]
        if box.shrunk(0.98, 0.8).overlaps(second)
    ]

    assert len(found) == count + len(figure.axes)
    assert clashes == []
    assert [text for text, box in found if box.x0 < 0 or box.x1 > figure.bbox.x1] == []
    looks = {(line.get_color(), line.get_linestyle()) for line in panel(figure, "learning rate").lines}
    assert len(looks) == count


def test_what_cannot_be_drawn(tmp_path):
    """A run that is given twice, or has taken no step, is named."""
    one = run_of(tmp_path / "one")
    with pytest.raises(UsageError, match=exactly(f"expected different runs, received {one} twice; leave one out")):
        picture(one, tmp_path / "one" / "run")
    none = run_of(tmp_path / "none", steps=0)
    message = f"expected runs that have taken a step, received {none} without; leave it out, or draw it alone"
    with pytest.raises(UnsupportedError, match=exactly(message)):
        picture(one, none)


class TestCommand:
    def invoke(self, *arguments):
        return CliRunner().invoke(main, ["plot", *map(str, arguments)])

    def test_several(self, tmp_path):
        """It writes the picture, and tells what each run came to by the name it was given."""
        one, other = run_of(tmp_path / "one"), without_evaluation(tmp_path / "other")
        done = self.invoke(one / "run", other, "-o", tmp_path / "o.png", "--json")
        told = json.loads(done.stdout)

        assert (done.exit_code, told["output"]) == (0, f"{tmp_path}/o.png")
        assert told["runs"] == [
            {**History.of(one).summary(), "run": f"{one}/run"}, {**History.of(other).summary(), "run": f"{other}"}
        ]  # fmt: skip
        plots.save(picture(one, other), tmp_path / "expected.png")
        assert (tmp_path / "o.png").read_bytes() == (tmp_path / "expected.png").read_bytes()

    @pytest.mark.parametrize(
        ("arguments", "code", "message"),
        [
            (["one", "nothing"], 4, "error: expected a fine-tuning run in nothing, received none; `normswap finetune` "
             "makes one"),
            (["one", "one"], 2, "error: expected different runs, received one twice; leave one out"),
            (["one", "other", "--trust"], 2,
             "Error: expected no --trust beside several runs, of which no model is read, received --trust"),
            ([], 2, "Error: Missing argument 'RUN...'."),
        ],
    )  # fmt: skip
    def test_refusals(self, tmp_path, monkeypatch, arguments, code, message):
        """They name the run or the option, and leave no picture."""
        monkeypatch.chdir(tmp_path)
        run_of(tmp_path / "one"), run_of(tmp_path / "other")
        done = self.invoke(*arguments, "-o", "o.png")

        assert (done.exit_code, done.stderr.splitlines()[-1]) == (code, message)
        assert not (tmp_path / "o.png").exists()
