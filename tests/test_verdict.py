"""The bounds an output is held to, and what a verdict says of the misses."""

import json

import numpy as np
import pytest

from normswap.verification.verdict import Check, Verdict, compare


def check(**figures):
    """A check of an output, exact unless told otherwise."""
    kept = {"output": "y", "batch": 2, "inputs": "x1", "provider": "cpu", "optimisation": "on", "tolerance": 1e-5}
    return Check(**{**kept, "max_abs": 0.0, "max_rel": 0.0, "finite": True, **figures})


@pytest.mark.parametrize(
    ("figures", "passed"),
    [
        ({"max_rel": 1e-5}, True),
        ({"max_rel": 1.1e-5}, False),
        ({"max_rel": 0.0, "finite": False}, False),
        ({"max_rel": 2e-5, "own": 1e-6, "ratio": 9.0}, False),  # well-conditioned: ten times nothing is no excuse
        ({"max_rel": 2e-5, "own": 1e-5, "ratio": 2.0}, True),
        ({"max_rel": 2e-4, "own": 1e-5, "ratio": 20.0}, False),
        ({"max_rel": 9e-4, "own": 9e-5, "ratio": 10.0}, True),
        ({"max_rel": 2e-3, "own": 1e-3, "ratio": 2.0}, False),  # so inexact that nothing is proved
        ({"max_rel": float("nan"), "own": float("nan"), "ratio": float("nan")}, False),
    ],
)
def test_the_bounds(figures, passed):
    """1e-5 of scale, or ten times the framework's own error where that is large, but never a thousandth."""
    assert check(**figures).passed is passed


def test_no_checks_no_pass():
    """A verdict of nothing is a failure."""
    assert not Verdict(())
    assert Verdict((check(),))
    assert not Verdict((check(),), problems=("something",))
    assert not Verdict((check(),), first_diverging="conv")


def test_the_message_names_the_worst_of_each_output():
    """One line for each output that misses, with its worst run; then counts, layer, value and tolerance."""
    checks = (
        check(max_rel=0.001),
        check(max_rel=0.2, ratio=5.0, own=0.04, inputs="data", provider="cuda", optimisation="off"),
        check(output="z", max_rel=0.003, tolerance=1e-2),
        check(output="v", max_rel=0.03, tolerance=1e-2, batch=1, inputs="x0.1"),
    )
    verdict = Verdict(checks, ("a problem",), "conv", ("a note",), "conv of Conv")

    assert verdict.explain("m.onnx") == (
        "expected m.onnx to compute what the model computes, received a file that does not:\n"
        "  a problem\n"
        "  y differs by 0.2 of its scale, 5 times the framework's own error (batch 2, inputs data, cuda, "
        "optimisation off)\n"
        "  v differs by 0.03 of its scale (batch 1, inputs x0.1, optimisation on)\n"
        "  3 of 4 checks failed\n"
        "  first diverging layer: conv\n"
        "  first value that is not finite: conv of Conv\n"
        "  the model itself is off by 0.04 in float32: its outputs are not determined there\n"
        "  a tolerance of 0.2 would pass; 1e-05 is allowed\n"
        "  note: a note"
    )
    assert json.loads(json.dumps(verdict.to_dict()))["checks"][1]["passed"] is False


def test_figures():
    """Differences are relative to the largest value; errors are against float64, with rounding as their floor."""
    expected = np.array([4.0, -8.0], np.float32)
    found = expected + np.array([0.5, 0.25], np.float32)

    assert compare(found, expected) == {"max_abs": 0.5, "max_rel": 0.0625, "finite": True}
    assert compare(found, expected, expected.astype(np.float64))["ratio"] == pytest.approx(0.0625 / 1e-6)
    assert compare(found, expected, expected + 0.125) == {
        "max_abs": 0.5,
        "max_rel": 0.0625,
        "finite": True,
        "own": 0.125 / 8,
        "ratio": 3.0,
    }
    assert compare(found[:1], expected) == {"max_abs": float("inf"), "max_rel": float("inf"), "finite": False}
    assert compare(np.array([np.nan, 1.0]), expected)["finite"] is False
    assert compare(np.zeros((0, 3)), np.zeros((0, 3)))["max_rel"] == 0
