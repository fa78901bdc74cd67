"""What of a network's output counts as its scores, and scores as logits."""

import numpy as np
import pytest

from normswap.errors import UnsupportedError
from normswap.finetune.hooks.scores import Logits, class_count, scores

from .helpers import exactly

SCORES = np.array([[1.0, -2.0, 0.5], [3.0, 0.0, 0.25]])


@pytest.mark.parametrize("output", [SCORES, {"aux": 0, "logits": SCORES}, (SCORES, None), [SCORES, SCORES + 1]])
def test_scores_of_an_output(output):
    """They are all of it, "logits" of a mapping, or the first of several."""
    assert scores(output) is SCORES


@pytest.mark.parametrize(
    ("output", "kind"),
    [({"out": SCORES, "aux": SCORES}, "a mapping of out, aux"), ((), "a tuple"), ([{}], "a list"), (3.0, "a float")],
)
def test_an_output_without_scores(output, kind):
    """The message says what was returned."""
    message = (
        'expected a model that returns scores, alone, as "logits" of a mapping or first of several outputs, received '
        f"one that returns {kind}"
    )
    with pytest.raises(UnsupportedError, match=exactly(message)):
        scores(output)


def test_the_number_of_classes():
    """Images that have a label each need a score for each class, not for each class at each place."""
    assert class_count(SCORES) == 3
    message = (
        "expected a model with scores of shape (N, classes) for labels of images, received one with scores of shape "
        "(2, 3, 4, 4); teacher='original' needs no labels"
    )
    with pytest.raises(UnsupportedError, match=exactly(message)):
        class_count(np.zeros((2, 3, 4, 4)))


@pytest.mark.parametrize(("given", "axis"), [(SCORES, -1), (SCORES[..., None], 1)])
def test_probabilities_become_logits(given, axis):
    """Those of a softmax come back but for a constant; scores that are none stay as they are, NaN too."""
    found = Logits()(np.exp(given) / np.exp(given).sum(axis, keepdims=True), np, axis)

    np.testing.assert_allclose(found - found[:, :1], given - given[:, :1], atol=1e-12)
    for other in (SCORES, np.abs(SCORES), SCORES * np.nan, np.array([[0.5, 0.7, -0.2]])):
        assert np.array_equal(Logits()(other, np), other, equal_nan=True)
    assert np.isfinite(Logits()(np.eye(3), np)).all()


def test_a_model_is_decided_once():
    """What the first scores are holds for all: later sums that are off do not make logits of probabilities."""
    shares, off = np.exp(SCORES) / np.exp(SCORES).sum(1, keepdims=True), np.array([[0.5, 0.25, 0.2], [1.0, 0.0, 0.1]])
    logits = Logits()
    logits.decide(shares)
    logits.decide(SCORES)
    assert np.array_equal(logits(off, np), np.log(np.clip(off, 1e-30, None)))

    others = Logits()
    others.decide(SCORES)
    assert others(shares, np) is shares


def test_probabilities_in_bfloat16():
    """Rounded to eight binary digits each, they are probabilities in every batch."""
    for seed in range(50):
        scores = np.random.default_rng(seed).normal(size=(16, 10)) * 3
        shares = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
        exponent = np.floor(np.log2(shares)) - 7
        logits = Logits()
        logits.decide(np.round(shares / 2**exponent) * 2**exponent)
        assert logits.probabilities
