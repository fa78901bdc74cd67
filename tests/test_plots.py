"""Pictures of a fine-tuning: what is on them, that all of it can be read, and that they come out the same again."""

import json
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner

from normswap.bundles.manifest import SETTINGS
from normswap.cli import main
from normswap.errors import UnsupportedError
from normswap.finetune.run import plots
from normswap.finetune.run.journal import ORIGINAL, Journal

from .helpers import exactly

NAMES = [f"layer{1 + i // 16}.{i % 16 // 3}.bn{1 + i % 3}" for i in range(53)]


def gates_of(names, count=3):
    """Return gates that sum to 1 for layers of these names."""
    rng = np.random.default_rng(0)
    return {name: (rng.dirichlet(np.ones(count)), rng.dirichlet(np.ones(count))) for name in names}


def run_in(folder, steps=120, original=81.35, **figures):
    """Write down a run of two stages that evaluates every 20 steps, and return the folder."""
    with Journal(folder / "run") as journal:
        if original is not None:
            journal.row(0, stage=ORIGINAL, eval_top1=original)
        journal.row(0, eval_top1=70.0)
        for step in range(1, steps + 1):
            journal.row(
                step,
                stage="norm" if step <= 40 else "all",
                loss=2 / step,
                learning_rate=0.05 * (1 - step / steps),
                eval_top1=70 + step / 10 if step % 20 == 0 else None,
                **{name: value / step for name, value in figures.items()},
            )
    (folder / "run" / SETTINGS).touch()
    return folder


def texts(figure):
    """Return every text with its box, as it is drawn."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    shown = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]
    boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in shown]
    return [(text, box) for text, box in boxes if box.width and inside(figure, box)]


def inside(figure, box):
    """Ticks beyond the limits of their axis are there but not drawn; they lie far off or are told by their axes."""
    return box.x1 > 0 and box.y1 > 0 and box.x0 < figure.bbox.x1 and box.y0 < figure.bbox.y1


def panel(figure, label):
    """Return the axes with this label."""
    (axes,) = [axes for axes in figure.axes if axes.get_ylabel() == label]
    return axes


class TestCurves:
    def test_panels(self, tmp_path):
        """There is a panel for each thing that was written down, and no other."""
        run = run_in(tmp_path)
        figure = plots.picture(run, {})

        assert [axes.get_ylabel() for axes in figure.axes] == ["loss", "top-1 accuracy, %", "learning rate"]

    def test_clipping_and_drift(self, tmp_path):
        """Clipped channels are told in percent."""
        run = run_in(tmp_path, steps=10, clipped=0.5, drift=0.25)
        figure = plots.picture(run, {})
        (line,) = panel(figure, "clipped channels, %").lines

        assert line.get_ydata()[0] == 50
        assert panel(figure, "drift from the original").lines[0].get_ydata()[0] == 0.25
        assert len(figure.axes) == 5

    def test_the_original(self, tmp_path):
        """Its accuracy is a dashed line over the whole width, and no point of the curve."""
        run = run_in(tmp_path)
        lines = {line.get_label(): line for line in panel(plots.picture(run, {}), "top-1 accuracy, %").lines}

        assert list(lines["evaluation"].get_ydata()) == [70, 72, 74, 76, 78, 80, 82]
        assert list(lines["original 81.35"].get_ydata()) == [81.35, 81.35]
        assert lines["original 81.35"].get_linestyle() == "--"

    def test_without_the_original(self, tmp_path):
        """A run that did not measure it has no such line."""
        run = run_in(tmp_path, original=None)
        labels = [line.get_label() for line in panel(plots.picture(run, {}), "top-1 accuracy, %").lines]

        assert "evaluation" in labels
        assert not any("original" in label for label in labels)

    @pytest.mark.parametrize(("top1", "best"), [([80, 90, 85], 20), ([90, 80, 90], 0), ([70, None, 80], 40)])
    def test_the_best(self, tmp_path, top1, best):
        """The model that is kept, the first of the most accurate ones, is marked, one of step 0 too."""
        with Journal(tmp_path / "run") as journal:
            for index, value in enumerate(top1):
                journal.row(20 * index, stage="all", eval_top1=value)
        *_, star = panel(plots.picture(tmp_path, {}), "top-1 accuracy, %").lines
        value = top1[best // 20]

        assert star.get_marker() == "*"
        assert (star.get_xdata(), star.get_ydata()) == ([best], [value])
        assert star.get_label() == f"best {value:.2f}, step {best}"

    def test_no_more_than_all(self, tmp_path):
        """An axis of shares ends just above 100 %, and just below 0 %, where a curve is flat too."""
        with Journal(tmp_path / "run") as journal:
            for step in (1, 2, 3):
                journal.row(step, stage="all", loss=1.0, accuracy=99.0, clipped=0.0)
        figure = plots.picture(tmp_path, {})
        (low, high), (bottom, top) = (
            panel(figure, label).get_ylim() for label in ("top-1 accuracy, %", "clipped channels, %")
        )

        assert 90 < low < 99 < 100 < high < 100.2
        assert -0.01 < bottom < 0 < top

    @pytest.mark.parametrize("original", [99.0, None])
    def test_a_run_without_steps(self, tmp_path, original):
        """What was measured is told in words, in place of panels of one point."""
        with Journal(tmp_path / "run") as journal:
            if original:
                journal.row(0, stage=ORIGINAL, eval_top1=original)
            journal.row(0, stage="start", eval_top1=98.5, drift=0.0141 if original else None)
        figure = plots.picture(tmp_path, gates_of(["a"]))
        (said,) = figure.subfigs[0].texts[1:]

        assert said.get_text() == f"no steps, top-1 98.50 %{', original 99.00 %, drift 0.0141' if original else ''}"
        assert figure.subfigs[0].axes == []

    def test_a_running_mean(self, tmp_path):
        """A long curve of single steps has its running mean on top, at the middle of what it is the mean of."""
        run = run_in(tmp_path, steps=100)
        single, mean = panel(plots.picture(run, {}), "loss").lines[:2]

        assert len(single.get_xdata()) == 100
        assert mean.get_label() == "mean of 6 steps"
        assert mean.get_ydata()[0] == pytest.approx(np.mean([2 / step for step in range(1, 7)]))
        assert mean.get_xdata()[0] == 3

    def test_stages(self, tmp_path):
        """A change of stage is a line at its step, with the names on either side."""
        axes = panel(plots.picture(run_in(tmp_path), {}), "learning rate")

        assert [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == ":"] == [40]
        assert [text.get_text() for text in axes.texts] == ["norm", "all"]

    def test_a_run_of_one_step(self, tmp_path):
        """A single point is drawn as a point."""
        run = run_in(tmp_path, steps=1)
        assert panel(plots.picture(run, {}), "loss").lines[0].get_marker() == "o"


class TestGates:
    def test_bars(self, tmp_path):
        """Each layer is a bar from 0 to 1 made of its gates, the first layer on top, mean and variance side by side."""
        gates = gates_of(["a", "b"])
        _, bars = plots.picture(tmp_path, gates).subfigs

        assert [axes.get_title(loc="left") for axes in bars.axes] == ["gates of the mean", "gates of the variance"]
        for axes, which in zip(bars.axes, (0, 1), strict=True):
            assert axes.get_xlim() == (0, 1)
            assert axes.yaxis_inverted()
            widths = np.array([[bar.get_width() for bar in kind] for kind in axes.containers])
            np.testing.assert_allclose(widths, np.array([pair[which] for pair in gates.values()]).T)
            ends = [bar.get_x() + bar.get_width() for bar in axes.containers[-1]]
            np.testing.assert_allclose(ends, 1)
        assert [text.get_text() for text in bars.legends[0].get_texts()] == ["instance", "layer", "batch"]

    def test_map(self, tmp_path):
        """The map has a row for each gate and a column for each layer, on a scale from 0 to 1."""
        gates = gates_of(NAMES)
        axes = plots.picture(tmp_path, gates).axes[0]
        (image,) = axes.images

        assert image.get_clim() == (0, 1)
        np.testing.assert_allclose(image.get_array()[:3], np.array([mean for mean, _ in gates.values()]).T)
        assert [t.get_text() for t in axes.get_yticklabels()][3:] == ["variance, instance", "variance, layer",
                                                                      "variance, batch"]  # fmt: skip

    def test_layers_without_a_batch_gate(self, tmp_path):
        """A gate that is not there is not a gate of 0."""
        (image,) = plots.picture(tmp_path, {**gates_of(["a"], 2), **gates_of(["b"])}).axes[0].images

        assert image.get_array().mask[[2, 5]].tolist() == [[True, False], [True, False]]

    def test_names_as_they_are(self, tmp_path):
        """A name is no formula, a long one keeps its end, and a number is told from the layer's place."""
        figure = plots.picture(tmp_path, gates_of(["$x_1$", f"{'deep/' * 20}bn", "7"]))
        first, second, third = (label.get_text() for label in figure.subfigs[1].axes[0].get_yticklabels())

        assert (first, third) == ("$x_1$ (#1)", "7 (#3)")
        assert second.startswith("…")
        assert second.endswith("deep/bn (#2)")
        assert len(second) < 50
        assert "$x_1$ (#1)" in [text for text, _ in texts(figure)]


class TestPicture:
    @pytest.mark.parametrize("layers", [0, 1, 53])
    def test_no_label_lies_on_another(self, tmp_path, layers):
        """All text is on the picture and none of it overlaps, with 53 layers too."""
        figure = plots.picture(run_in(tmp_path, clipped=0.5, accuracy=60.0), gates_of(NAMES[:layers]))
        found = texts(figure)
        clashes = [
            (one, other)
            for index, (one, box) in enumerate(found)
            for other, second in found[:index]
            if box.shrunk(0.98, 0.8).overlaps(second)
        ]
        outside = [text for text, box in found if box.x0 < 0 or box.y0 < 0 or box.x1 > figure.bbox.x1]

        assert set(NAMES[:layers]) <= {text.split()[0] for text, _ in found}
        assert clashes == []
        assert outside == []

    def test_gates_alone(self, tmp_path):
        """A bundle that was not fine-tuned shows its gates."""
        figure = plots.picture(tmp_path, gates_of(["a"]))

        assert [part.get_suptitle() for part in figure.subfigs] == ["Gates by depth", "Gates by layer"]

    def test_curves_alone(self, tmp_path):
        """A bundle without gates shows its curves."""
        figure = plots.picture(run_in(tmp_path), {})

        assert [part.get_suptitle() for part in figure.subfigs] == ["Fine-tuning"]

    def test_a_run_that_has_not_ended(self, tmp_path):
        """The command draws the curves as far as they go, where there is no model yet."""
        run_in(tmp_path / "out", steps=30)
        done = CliRunner().invoke(main, ["plot", f"{tmp_path}/out", "-o", f"{tmp_path}/o.png", "--json"])

        assert done.exit_code == 0, done.stderr
        told = {"schema_version": 1, "bundle": f"{tmp_path}/out", "output": f"{tmp_path}/o.png", "gates": {}}
        assert json.loads(done.stdout) == told
        plots.save(plots.picture(tmp_path / "out", {}), tmp_path / "expected.png")
        assert (tmp_path / "o.png").read_bytes() == (tmp_path / "expected.png").read_bytes()

    def test_neither(self, tmp_path):
        """Where there is nothing to see, in a run without figures too, the error says what would give it."""
        with Journal(tmp_path / "run") as journal:
            journal.row(1, stage="all")
        message = (
            f"expected a bundle with curves or gates, received {tmp_path} without; `finetune` writes curves, "
            "and patching to SwitchNorm makes layers with gates"
        )
        with pytest.raises(UnsupportedError, match=exactly(message)):
            plots.picture(tmp_path, {})


def test_the_same_picture_is_the_same_file(tmp_path):
    """Another process, at another time, writes the same bytes, and has no use for matplotlib's global state."""
    code = """
import sys
from pathlib import Path
from normswap.finetune.run import plots

for suffix in plots.FORMATS:
    plots.save(plots.picture(Path("nothing"), {"bn": ([0.2, 0.3, 0.5], [0, 0, 1])}), Path(sys.argv[1] + suffix))
print("matplotlib.pyplot" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "other"], capture_output=True, text=True, check=True)
    for suffix in plots.FORMATS:
        plots.save(plots.picture(tmp_path, {"bn": ([0.2, 0.3, 0.5], [0, 0, 1])}), tmp_path / f"one{suffix}")
        written = (tmp_path / f"one{suffix}").read_bytes()

        assert written == (tmp_path / f"other{suffix}").read_bytes()
        assert b"atplotlib v" not in written
    assert done.stdout == "False\n"
