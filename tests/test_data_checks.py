"""What is asked of labels: that a model has them, and that they mean the same to it."""

import numpy as np
import pytest

from normswap.data.dataset import Data, from_arrays
from normswap.data.labels import check_labels, same_classes, several_classes
from normswap.errors import InputError, NormswapWarning

from .helpers import exactly
from .test_data import PREPROCESSING


class TestChecks:
    def labelled(self, labels, classes=None):
        """Data with these labels and names of classes."""
        arrays = from_arrays(np.zeros((len(labels), 4, 6, 3)), np.array(labels), PREPROCESSING)
        return Data(arrays._images, PREPROCESSING, classes)

    def test_labels_of_a_model(self):
        """An output for each class, of which there may be one to evaluate on and two or more to learn from."""
        check_labels(self.labelled([0, 2]), 3)
        check_labels(self.labelled([2, 2]), 3)
        check_labels(self.labelled([0, 1], ["a", "b", "c"]), 3)
        several_classes(self.labelled([0, 2]))
        message = "expected images of two classes or more to learn from, received label=3 alone"
        with pytest.raises(InputError, match=exactly(message)):
            several_classes(self.labelled([3, 3]))

    @pytest.mark.parametrize(
        ("labels", "classes", "message"),
        [
            ([0, 3], None, "expected labels for a model of 3 classes, received 4 classes"),
            ([0, 1], list("abcde"), "expected labels for a model of 3 classes, received 5 classes"),
        ],
    )
    def test_more_classes_than_outputs(self, labels, classes, message):
        """Whether a label or only its name tells."""
        with pytest.raises(InputError, match=exactly(message)):
            check_labels(self.labelled(labels, classes), 3)

    @pytest.mark.parametrize(
        ("names", "told"),
        [
            ("ab", "2: label 0 is 'a', 1 is 'b'"),
            ("abcdefgh", "8: label 0 is 'a', 1 is 'b', 2 is 'c', 3 is 'd', 4 is 'e', ..."),
        ],
    )
    def test_fewer_classes_than_outputs(self, names, told):
        """Folders numbered without the one that is missing are not the model's classes; the warning tells whose."""
        message = f"expected 9 classes, as many as the model has scores, received {told}"
        with pytest.warns(NormswapWarning, match=exactly(message)):
            check_labels(self.labelled([0, 1], list(names)), 9)

    @pytest.mark.parametrize(
        ("known", "received", "difference"),
        [
            ("ab", "abc", "with c"),
            ("abc", "ac", "without b"),
            ("abcdefgh", "aix", "without b, c, d, e, f, 2 more and with i, x"),
            ("ab", "ba", "in another order"),
        ],
    )
    def test_labels_of_another_meaning(self, known, received, difference):
        """Classes that are named otherwise would be measured as others than were learnt."""
        message = f"expected the classes trained on to evaluate on, received them {difference}"
        with pytest.raises(InputError, match=exactly(message)):
            same_classes(self.labelled([0, 1], list(known)), self.labelled([0, 1], list(received)))

    def test_labels_of_the_same_meaning(self):
        """The same names are, and numbers may be: their classes have none."""
        named = self.labelled([0, 1], ["a", "b"])
        same_classes(named, self.labelled([0, 0], ["a", "b"]))
        same_classes(named, self.labelled([0, 2]))
        same_classes(self.labelled([0, 2]), named)
