"""Augmentation, and the batches of a training's steps: functions of seed, step and image alone."""

import pickle
import re

import numpy as np
import pytest
from PIL import Image

from normswap.data.augment import RATIOS, SHARES, random_box
from normswap.data.dataset import from_arrays, open_data
from normswap.data.preprocessing import Preprocessing
from normswap.errors import InputError
from normswap.finetune.run.batches import batch_indices
from normswap.finetune.run.loading import StepBatches
from normswap.finetune.run.training import Training

from .helpers import exactly

SIZE = (16, 24)
PREPROCESSING = Preprocessing((*SIZE, 3), "channels_last")


def photos(count):
    """Pictures without two equal pixels nearby, none of them black."""
    return np.random.default_rng(0).integers(1, 256, (count, *SIZE, 3), np.uint8)


@pytest.fixture(params=["folder", "bytes", "floats"])
def data(request, tmp_path):
    """Forty images of two classes, out of files, bytes or floating-point numbers."""
    images = photos(40)
    if request.param == "folder":
        for index, image in enumerate(images):
            path = tmp_path / "ab"[index // 20]
            path.mkdir(exist_ok=True)
            Image.fromarray(image).save(path / f"{index:02}.png")
        return open_data(str(tmp_path), PREPROCESSING)
    labels = np.repeat([0, 1], 20)
    return from_arrays(images if request.param == "bytes" else images / 255, labels, PREPROCESSING)


class TestPolicies:
    def test_none(self, data):
        """Without a policy, or without a step, the images are what they are."""
        plain = data.batch(range(40))[0]

        assert np.array_equal(data.batch(range(40), (0, 1))[0], plain)
        assert np.array_equal(data.batch(range(40), (0, 1), "none")[0], plain)
        assert np.array_equal(data.batch(range(40), None, "crop,flip")[0], plain)

    def test_flip(self, data):
        """Each image is mirrored or not, either way about half the time."""
        plain, flipped = data.batch(range(40))[0], data.batch(range(40), (0, 1), "flip")[0]
        mirrored = [np.array_equal(new, old[:, ::-1]) for new, old in zip(flipped, plain, strict=True)]

        assert all(m or np.array_equal(new, old) for m, new, old in zip(mirrored, flipped, plain, strict=True))
        assert 10 < sum(mirrored) < 30

    def test_crop(self, data):
        """Each image is shifted by up to an eighth either way, and what is uncovered is black."""
        plain, cropped = data.batch(range(40))[0], data.batch(range(40), (0, 1), "crop")[0]
        padded = np.pad(plain, ((0, 0), (2, 2), (3, 3), (0, 0)))
        shifts = []
        for index, image in enumerate(cropped):
            places = [
                (top - 2, left - 3)
                for top in range(5)
                for left in range(7)
                if np.array_equal(image, padded[index, top : top + SIZE[0], left : left + SIZE[1]])
            ]
            assert len(places) == 1
            shifts += places
        down, right = zip(*shifts, strict=True)

        assert set(down) == {-2, -1, 0, 1, 2}
        assert set(right) == {-3, -2, -1, 0, 1, 2, 3}

    def test_resized_crop(self):
        """A part of the image fills the input: on a ramp, values span what the box does, and rise as before."""
        ramp = np.broadcast_to(np.linspace(0, 1, SIZE[1])[:, None], (200, *SIZE, 3))
        data = from_arrays(ramp, np.arange(200), PREPROCESSING)
        found = data.batch(range(200), (0, 1), "resized-crop")[0]
        spans = found[:, 0, -1, 0] - found[:, 0, 0, 0]

        assert found.shape == (200, *SIZE, 3)
        assert (np.diff(found, axis=2) >= -1e-6).all()
        assert spans.min() < 0.3
        assert spans.max() > 0.8

    def test_random_boxes(self):
        """Boxes lie inside the image, with area and shape inside their bounds but for rounding to whole pixels."""
        random = np.random.default_rng(0)
        boxes = np.array([random_box(np.zeros((300, 400, 3)), random) for _ in range(300)])
        widths, heights = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
        shares, ratios = widths * heights / (300 * 400), widths / heights

        assert boxes.min() >= 0
        assert (boxes.max(axis=0) <= [400, 300, 400, 300]).all()
        assert SHARES[0] - 0.01 < shares.min() < 0.15
        assert 0.7 < shares.max() < SHARES[1] + 0.01
        assert RATIOS[0] - 0.01 < ratios.min() < 0.8
        assert 1.25 < ratios.max() < RATIOS[1] + 0.02

    def test_no_box_fits(self):
        """A strip too thin for any crop of a usual shape is taken as it is without augmentation."""
        strip = np.random.default_rng(0).random((1, 2, 400, 3))
        data = from_arrays(strip, np.zeros(1, int), Preprocessing((2, 400, 3), "channels_last"))
        random = np.random.default_rng(0)
        missed = next(
            step for step in range(100) if random_box(strip[0], np.random.default_rng([0, step, 0, 1])) is None
        )

        assert any(random_box(strip[0], random) is None for _ in range(10))
        assert np.array_equal(data.batch([0], (0, missed), "resized-crop")[0], data.batch([0])[0])

    @pytest.mark.parametrize("augment", ["flip", "crop", "resized-crop", "crop,flip", "resized-crop,flip"])
    def test_the_draw_decides(self, data, augment):
        """The same seed, step and image give the same bits in any batch; another seed or step gives others."""
        whole = data.batch(range(40), (3, 7), augment)[0]

        assert np.array_equal(data.batch([30, 2], (3, 7), augment)[0], whole[[30, 2]])
        assert not np.array_equal(data.batch(range(40), (3, 8), augment)[0], whole)
        assert not np.array_equal(data.batch(range(40), (4, 7), augment)[0], whole)

    @pytest.mark.parametrize("augment", ["flop", "flip,flip", "crop,resized-crop", "none,flip", ""])
    def test_policies_that_cannot_be(self, augment):
        """Unknown, repeated and conflicting names are refused."""
        data = from_arrays(photos(2), np.arange(2), PREPROCESSING)
        message = (
            "expected `none`, or `flip` and one of `crop` and `resized-crop` joined by commas, "
            f"received augment={augment}"
        )
        with pytest.raises(InputError, match=exactly(message)):
            data.batch([0], (0, 0), augment)


class TestStepBatches:
    TRAINING = Training(steps=20, batch_size=8, augment="crop,flip", seed=5)

    def test_a_batch_depends_on_its_step_alone(self, data):
        """Item by item what the step's indices, seed and step give, wherever the training starts."""
        batches = StepBatches(data, self.TRAINING, first=0, steps=20)
        later = StepBatches(data, self.TRAINING, first=13, steps=7)

        assert (len(batches), len(later)) == (20, 7)
        for step in (13, 19):
            images, labels, count = batches[step]
            expected = data.batch(batch_indices(40, 8, step, 5), (5, step), "crop,flip")
            assert (np.array_equal(images, expected[0]), np.array_equal(labels, expected[1]), count) == (True, True, 8)
            assert np.array_equal(later[step - 13][0], images)
        assert len(list(later)) == 7

    def test_shares_make_a_whole(self, data):
        """The processes' parts together are the batch of one process, bit for bit."""
        whole = StepBatches(data, self.TRAINING, first=2, steps=3)[1][0]
        for rank in range(3):
            part, _, count = StepBatches(data, self.TRAINING, first=2, steps=3, share=slice(rank, None, 3))[1]
            assert np.array_equal(part, whole[rank::3])
            assert count == 8

    def test_accumulation(self, data):
        """Each step takes several batches, none of them twice."""
        training = Training(steps=20, batch_size=8, accumulate=2)
        batches = StepBatches(data, training, first=1, steps=2)

        assert len(batches) == 4
        assert np.array_equal(batches[0][0], data.batch(batch_indices(40, 8, 2, 0))[0])
        assert np.array_equal(batches[3][0], data.batch(batch_indices(40, 8, 5, 0))[0])

    def test_a_copy_in_another_process(self, data):
        """Pickled, it gives the same bits, and takes no image that is kept in memory with it."""
        batches = StepBatches(data, self.TRAINING, first=0, steps=20)
        before = len(pickle.dumps(batches))
        images = batches[0][0]
        sent = pickle.dumps(batches)

        assert len(sent) == before
        assert np.array_equal(pickle.loads(sent)[0][0], images)

    def test_an_error_is_handed_over(self, tmp_path):
        """What cannot be read comes as the error that says so, for the process that trains to raise."""
        for name in "ab":
            (tmp_path / name).mkdir()
            (tmp_path / name / "0.png").write_bytes(b"no image")
        error = StepBatches(open_data(str(tmp_path), PREPROCESSING), Training(batch_size=2), first=0, steps=1)[0]

        assert type(error) is InputError
        assert re.fullmatch(f"expected an image in {tmp_path}/[ab]/0.png, received: no image Pillow knows", str(error))
