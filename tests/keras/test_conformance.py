"""The Keras layers compute the formulas."""

import pytest

from ..conformance import CASES, check
from .adapter import computed

# Keras converts variables to NumPy this way.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_conforms(case):
    """Output, moving statistics and every gradient are the formula's in float64, to 1e-5."""
    check(case, computed(case))


@pytest.mark.parametrize("case", [case for case in CASES if case.input in ("(N, C, L)", "2d", "3d")], ids=str)
def test_conforms_with_channels_first(case):
    """The same with ``axis=1``."""
    check(case, computed(case, axis=1))
