"""What takes several texts, or batches of inputs, takes one or none as well, and never takes one apart."""

import numpy as np
import pytest

from normswap.errors import InputError
from normswap.frameworks.example import Inputs
from normswap.frameworks.several import batches, texts

from .helpers import exactly

X = np.zeros((3, 2))


class TestTexts:
    @pytest.mark.parametrize(
        ("given", "several"),
        [
            (None, ()),
            ((), ()),
            ("layer1.*", ("layer1.*",)),
            ("", ("",)),
            (["a", "re:b"], ("a", "re:b")),
            ((each for each in "ab"), ("a", "b")),
        ],
    )
    def test_one_several_or_none(self, given, several):
        """A text is one, not its letters."""
        assert texts(given, "a pattern") == several

    @pytest.mark.parametrize(
        ("given", "received"), [([3], 3), ([("a",)], ("a",)), (["a", None], None), (b"a", b"a"), (3, 3), (True, True)]
    )
    def test_what_is_none(self, given, received):
        """Anything else is named."""
        message = f"expected a pattern or several, each a text, received {received!r}"
        with pytest.raises(InputError, match=exactly(message)):
            texts(given, "a pattern")


class Indexed:
    """Batches by their numbers, as a `keras.utils.PyDataset` has them."""

    def __getitem__(self, number):
        """Return two."""
        if number == 2:
            raise IndexError
        return X


class TestBatches:
    @pytest.mark.parametrize("given", [X, {"x": X}, Inputs(X, mask=X)])
    def test_one(self, given):
        """An array is not its samples, and a mapping not its names."""
        assert [each is given for each in batches(given)] == [True]

    @pytest.mark.parametrize("given", [[X, X], (X, X), iter([X, X]), (x for x in [X, X]), Indexed()])
    def test_several(self, given):
        """They can be had again, from an iterator too."""
        found = batches(given)
        for _ in range(2):
            assert [each is X for each in found] == [True, True]

    @pytest.mark.parametrize("given", [None, 3, "x.npz", b"x", object])
    def test_what_has_none(self, given):
        """It is named."""
        message = f"expected batches of inputs as the model takes them, received {given!r}"
        with pytest.raises(InputError, match=exactly(message)):
            batches(given)
