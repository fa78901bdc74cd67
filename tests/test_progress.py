"""How a long command shows that it is alive, on a terminal and in a log."""

import io

import pytest
from rich.console import Console

from normswap import console


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on by a second each time it is looked at."""
    ticks = iter(range(1_000_000))
    monkeypatch.setattr(console, "monotonic", lambda: float(next(ticks)))


class TestInALog:
    def test_a_line_every_tenth(self, capsys, clock):
        """The first step and every tenth of the way are a line on stderr, with the figures and the time left."""
        with console.progress("fine-tuning", 1000) as advance:
            for step in range(1, 1001):
                advance(step, loss=1 / step, accuracy=81.25, images_per_second=1234.5)
        out, err = capsys.readouterr()
        lines = err.splitlines()

        assert out == ""
        assert [line.split(", ")[0] for line in lines] == [
            f"fine-tuning: {done}/1000" for done in (1, *range(100, 1001, 100))
        ]
        assert lines[0] == "fine-tuning: 1/1000, loss 1, accuracy 81.2 %, 1234 images/s"
        assert lines[5] == "fine-tuning: 500/1000, loss 0.002, accuracy 81.2 %, 1234 images/s, 0:08:20 left"
        assert lines[-1] == "fine-tuning: 1000/1000, loss 0.001, accuracy 81.2 %, 1234 images/s"

    def test_a_resumed_run(self, capsys, clock):
        """The time left is reckoned by the steps of this process, not by those it found."""
        with console.progress("fine-tuning", 100) as advance:
            for step in range(91, 96):
                advance(step, loss=None)

        assert capsys.readouterr().err == "fine-tuning: 91/100\n"

    def test_the_last_of_each_figure(self, capsys):
        """What is known now and then stays; what a log of figures holds besides is not shown."""
        with console.progress("fine-tuning", 3) as advance:
            advance(1, loss=2.0, eval_top1=81.355, learning_rate=0.1)
            advance(2, loss=1.0, eval_top1=None)

        assert [line.split(", 0:")[0] for line in capsys.readouterr().err.splitlines()] == [
            "fine-tuning: 1/3, loss 2, top-1 81.36 %",
            "fine-tuning: 2/3, loss 1, top-1 81.36 %",
        ]

    def test_a_speed_that_jumps(self, capsys, clock):
        """Images per second are the median of the last ten steps, so that one that evaluated does not show."""
        speeds = [900, 1, *range(101, 109), 2, 3]
        with console.progress("fine-tuning", 120) as advance:
            for step, speed in enumerate(speeds, 1):
                advance(step, images_per_second=speed)

        lines = [line.split(", ") for line in capsys.readouterr().err.splitlines()]
        assert [line[:2] for line in lines] == [
            ["fine-tuning: 1/120", "900 images/s"],
            ["fine-tuning: 12/120", "104 images/s"],
        ]

    def test_a_slow_training(self, capsys):
        """Less than ten images per second are told by two digits, never as none."""
        for speed, told in ((9.96, "10"), (2.345, "2.3"), (0.0312, "0.031")):
            with console.progress("fine-tuning", 1) as advance:
                advance(1, images_per_second=speed)
            assert capsys.readouterr().err == f"fine-tuning: 1/1, {told} images/s\n"

    def test_steps_longer_than_a_tenth(self, capsys):
        """Few large steps are a line each; a note comes before the figures."""
        with console.progress("evaluating", 3) as advance:
            for step in (1, 2, 3):
                advance(step, f"part {step}", loss=0.5)

        assert [line.split(", ")[:3] for line in capsys.readouterr().err.splitlines()] == [
            [f"evaluating: {step}/3", f"part {step}", "loss 0.5"] for step in (1, 2, 3)
        ]


class TestOnATerminal:
    def test_a_bar(self, monkeypatch):
        """A bar shows how far it is and the figures, names in brackets as they are."""
        screen = io.StringIO()
        monkeypatch.setattr(
            "rich.console.Console", lambda **_: Console(file=screen, force_terminal=True, width=120, color_system=None)
        )
        with console.progress("evaluating [net]", 20) as advance:
            advance(5, loss=0.25, accuracy=None)
            advance(10, "all", loss=0.125, images_per_second=99.6)

        shown = screen.getvalue().splitlines()[-2]
        assert "evaluating [net]" in shown
        assert "10/20" in shown
        assert "all, loss 0.125, 100 images/s" in shown
