"""Labelled images: folders and arrays as a model takes them, and what is refused before any is used."""

import io
import os
import pickle

import numpy as np
import pytest
from PIL import Image

from normswap.data.dataset import from_arrays, open_data
from normswap.data.preprocessing import Preprocessing
from normswap.errors import InputError, NormswapWarning, UsageError

from .helpers import exactly

PREPROCESSING = Preprocessing((3, 4, 6), "channels_first", (0.5,), (0.25,))


def photo(width, height, seed=0):
    """A picture with detail at every scale."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


@pytest.fixture
def folder(tmp_path):
    """Two classes of images, of several sizes and colour modes."""
    for label, (name, colour) in enumerate({"a": 0, "b": 255}.items()):
        (tmp_path / name / "more").mkdir(parents=True)
        Image.new("RGB", (6, 4), (colour,) * 3).save(tmp_path / name / "0.png")
        Image.new("L", (30, 20 + label), colour).save(tmp_path / name / "more" / "1.JPG", "JPEG")
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    return tmp_path


class TestFolders:
    def test_a_folder(self, folder):
        """Classes are numbered by name; images at any depth are resized, converted and scaled."""
        data = open_data(str(folder), PREPROCESSING)
        x, y = data.batch(range(4))

        assert (data.classes, y.tolist(), x.shape, x.dtype) == (["a", "b"], [0, 0, 1, 1], (4, 3, 4, 6), np.float32)
        assert x[:2].max() == x[:2].min() == -2
        assert x[2:].max() == x[2:].min() == 2

    def test_images_are_decoded_once(self, folder):
        """What fits into the cache is not read again; what does not is; a copy in another process begins anew."""
        kept, unkept = open_data(str(folder), PREPROCESSING), open_data(str(folder), PREPROCESSING, cache_bytes=0)
        expected = kept.batch(range(4))[0]
        assert np.array_equal(unkept.batch(range(4))[0], expected)
        for file in folder.rglob("*.png"):
            file.unlink()

        assert np.array_equal(kept.batch(range(4))[0], expected)
        for data in (unkept, pickle.loads(pickle.dumps(kept))):
            with pytest.raises(InputError, match=r"^expected an image in .*0.png, received: .*No such file"):
                data.batch([0])

    @pytest.mark.parametrize(("memory", "fits"), [(1152, True), (1151, False)])
    def test_a_batch_that_no_machine_holds(self, folder, monkeypatch, memory, fits):
        """Memory for the batch in float32 is estimated before an image is read."""
        monkeypatch.setattr("normswap.sources.memory._total", lambda: memory)
        data = open_data(str(folder), PREPROCESSING)
        if fits:
            assert data.batch(range(4))[0].nbytes == memory
            return
        monkeypatch.setattr(data._images, "read", lambda index: pytest.fail("was read"))
        message = (
            "expected a batch of 4 images of shape 3,4,6 to fit into memory, 1.15 kB here, received 1.15 kB; give a "
            "smaller size"
        )
        with pytest.raises(UsageError, match=exactly(message)):
            data.batch(range(4))

    def test_an_unreadable_image(self, folder):
        """The file and what is wrong with it are named."""
        (folder / "b" / "0.png").write_bytes(b"no image")
        data = open_data(str(folder), PREPROCESSING)

        message = f"expected an image in {folder}/b/0.png, received: no image Pillow knows"
        with pytest.raises(InputError, match=exactly(message)):
            data.batch([2])

    @pytest.mark.parametrize("cache_bytes", [0, 1000])
    def test_more_than_eight_bits(self, folder, cache_bytes):
        """Wider pixels, which Pillow would cut off without a word, are refused."""
        Image.fromarray(np.full((4, 6), 4096, np.uint16)).save(folder / "b" / "0.png")
        data = open_data(str(folder), PREPROCESSING, cache_bytes=cache_bytes)
        message = (
            "expected images that can be read, received 1 of 4 that cannot:\n"
            f"  {folder}/b/0.png: pixels of mode=I;16, which would be cut off at 255; convert them to 8 bits"
        )
        with pytest.raises(InputError, match=exactly(message)):
            data.check()

    def test_no_files_at_all(self, folder):
        """A pipe or a device under an image's name is told, and not waited for."""
        os.mkfifo(folder / "a" / "pipe.png")
        data = open_data(str(folder), PREPROCESSING)
        with pytest.raises(InputError, match=r"/a/pipe.png: no regular file$"):
            data.check()

    def test_all_unreadable_images(self, folder):
        """All files are opened beforehand, and those that cannot be read are named together."""
        whole = io.BytesIO()
        photo(40, 40).save(whole, "JPEG")
        (folder / "a" / "2.jpg").write_bytes(whole.getvalue()[:-900])
        (folder / "b" / "2.png").write_bytes(b"")
        lines = [
            "expected images that can be read, received 2 of 6 that cannot:",
            f"  {folder}/a/2.jpg: image file is truncated .*",
            f"  {folder}/b/2.png: no image Pillow knows",
        ]

        with pytest.raises(InputError, match="^{}$".format("\n".join(lines))):
            open_data(str(folder), PREPROCESSING).check()
        (folder / "a" / "2.jpg").write_bytes(whole.getvalue())
        (folder / "b" / "2.png").unlink()
        open_data(str(folder), PREPROCESSING).check()

    def test_more_images_than_are_kept(self, folder):
        """Truncated images are found of those as well that there is no room for, in formats with an end or without."""
        for name, form, cut in (
            ("1.jpg", "JPEG", 2),
            ("2.jpg", "JPEG", 900),
            ("3.png", "PNG", 900),
            ("4.bmp", "BMP", 9),
        ):
            whole = io.BytesIO()
            photo(40, 40).save(whole, form)
            (folder / "a" / name).write_bytes(whole.getvalue()[:-cut])
            (folder / "b" / name).write_bytes(whole.getvalue())
            (folder / "b" / f"longer{name}").write_bytes(whole.getvalue() + b"what a camera adds")
        lines = [
            "expected images that can be read, received 4 of 16 that cannot:",
            f"  {folder}/a/1.jpg: image file is truncated .*",
            f"  {folder}/a/2.jpg: image file is truncated .*",
            f"  {folder}/a/3.png: image file is truncated",
            f"  {folder}/a/4.bmp: image file is truncated .*",
        ]

        for cache_bytes in (0, 1000, 1_000_000):
            with pytest.raises(InputError, match="^{}$".format("\n".join(lines))):
                open_data(str(folder), PREPROCESSING, cache_bytes=cache_bytes).check()

    def test_many_images_that_cannot_be_read(self, folder):
        """A long list of them is cut."""
        for index in range(300):
            (folder / "b" / f"bad{index:03}.png").write_bytes(b"bad")
        lines = [
            "expected images that can be read, received 300 of 304 that cannot:",
            *(f"  {folder}/b/bad{index:03}.png: no image Pillow knows" for index in range(10)),
            "  and 290 more",
        ]

        with pytest.raises(InputError, match=exactly("\n".join(lines))):
            open_data(str(folder), PREPROCESSING, cache_bytes=0).check()

    def test_what_is_hidden(self, folder):
        """What editors and file managers leave behind is no class and no image."""
        for name in (".ipynb_checkpoints/0.png", "a/.cache/0.png", "b/._0.png"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(b"no image")

        for labelled in (True, False):
            data = open_data(str(folder), PREPROCESSING, labelled=labelled)
            data.check()
            assert (len(data), data.classes) == (4, ["a", "b"] if labelled else None)

    @pytest.mark.parametrize(
        ("empty", "told"), [(["aa"], "1 of 3, which keep their labels: aa"),
                            ([f"a{n}" for n in range(6)], "6 of 8, which keep their labels: a0, a1, a2, a3, a4, ...")]
    )  # fmt: skip
    def test_classes_without_images(self, folder, empty, told):
        """A part of a data set has the labels of the whole, and it is said which classes have no images."""
        for name in empty:
            (folder / name).mkdir()
        message = f"expected images in every class folder of {folder}, received none in {told}"
        with pytest.warns(NormswapWarning, match=exactly(message)):
            data = open_data(str(folder), PREPROCESSING)

        last = len(empty) + 1
        assert (data.classes, data.labels.tolist()) == (["a", *empty, "b"], [0, 0, last, last])
        assert len(open_data(str(folder), PREPROCESSING, labelled=False)) == 4

    def test_folders_that_do_not_fit(self, folder):
        """Empty classes alone, too few classes, other channels than an image has, and no folder are named."""
        for name in ("c", "empty/a", "empty/b"):
            (folder / name).mkdir(parents=True)
        for spec, preprocessing, message in (
            (folder / "empty", PREPROCESSING,
             f"expected images in the class folders of {folder}/empty, received none"),
            (folder / "c", PREPROCESSING, f"expected at least two class folders in {folder}/c, received 0"),
            ("", PREPROCESSING,
             "expected a folder of class folders, an .npz file or hf:NAME[SPLIT], received data="),
            ("gone", PREPROCESSING,
             "expected a folder of class folders, an .npz file or hf:NAME[SPLIT], received data=gone"),
            ("random", PREPROCESSING,
             "expected labelled images, received data=random, which serves `verify` alone"),
        ):  # fmt: skip
            with pytest.raises(InputError, match=exactly(message)):
                open_data(str(spec), preprocessing)
        for name in ("c", "empty/a", "empty/b", "empty"):
            (folder / name).rmdir()
        with pytest.raises(
            InputError, match=exactly("expected 1, 3 or 4 channels to read images, received channels=2")
        ):
            open_data(str(folder), Preprocessing((2, 4, 6), "channels_first"))


class TestArrays:
    @pytest.mark.parametrize("dtype", [np.uint8, np.float32])
    def test_an_npz(self, tmp_path, dtype):
        """Arrays of bytes or of shares of one give the same images."""
        images = np.full((3, 4, 6, 3), 255 if dtype == np.uint8 else 1, dtype)
        np.savez(tmp_path / "d.npz", x=images, y=np.arange(3))
        data = open_data(str(tmp_path / "d.npz"), PREPROCESSING)
        data.check()
        x, y = data.batch([2, 0])

        assert (x.shape, float(x.max()), y.tolist()) == ((2, 3, 4, 6), 2.0, [2, 0])

    def test_channels_last_and_grey(self, tmp_path):
        """Keras's layout, and images without a channel axis."""
        np.savez(tmp_path / "d.npz", x=np.zeros((3, 4, 6), np.uint8), y=np.zeros(3, int))
        data = open_data(str(tmp_path / "d.npz"), Preprocessing((4, 6, 1), "channels_last"))

        assert [x.shape for x, _ in data.batches(2)] == [(2, 4, 6, 1), (1, 4, 6, 1)]
        assert sorted(data.sample(3).tolist()) == [0, 1, 2]

    @pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
    def test_shares_of_one_but_for_rounding(self, dtype):
        """What arithmetic leaves a little outside of 0..1 is taken."""
        images = np.full((2, 4, 6, 3), [[[[-1e-4]]], [[[1 + np.finfo(dtype).eps]]]]).astype(dtype)
        x, _ = from_arrays(images, np.arange(2), PREPROCESSING).batch([0, 1])

        assert (float(x.min()), float(x.max())) == pytest.approx((-2, 2), abs=0.005)

    def test_arrays_are_not_cropped_again(self):
        """Images of the model's size are taken whole, whatever share of a photo the model is shown."""
        images = np.random.default_rng(0).random((2, 4, 6, 3))
        x, _ = from_arrays(images, np.arange(2), Preprocessing((4, 6, 3), "channels_last", crop=0.5)).batch([0, 1])

        assert np.array_equal(x, images.astype(np.float32))

    @pytest.mark.parametrize(
        ("arrays", "message"),
        [
            ({"x": np.zeros((2, 9, 9, 3)), "y": np.zeros(2, int)},
             "expected `x` of shape (N, 4, 6, 3), received (2, 9, 9, 3)"),
            ({"x": np.zeros((0, 4, 6, 3)), "y": np.zeros(0, int)},
             "expected at least one image, received `x` without any"),
            ({"x": np.zeros((2, 4, 6, 3), int), "y": np.zeros(2, int)},
             "expected `x` of uint8 or floating-point, received dtype=int64"),
            ({"x": np.full((2, 4, 6, 3), [[[[0]]], [[[np.nan]]]]), "y": np.zeros(2, int)},
             "expected finite `x`, received NaN or infinity in 1 of 2 images, first in x[1]"),
            ({"x": np.full((2, 4, 6, 3), 255.0), "y": np.zeros(2, int)},
             "expected floating-point `x` in 0..1, received 255 to 255; divide what is in 0..255 by 255 or make it "
             "uint8, and leave normalization to mean and std"),
            ({"x": np.full((2, 4, 6, 3), [[[[-2.118]]], [[[0.5]]]], np.float32), "y": np.zeros(2, int)},
             "expected floating-point `x` in 0..1, received -2.118 to 0.5; divide what is in 0..255 by 255 or make it "
             "uint8, and leave normalization to mean and std"),
            ({"x": np.zeros((2, 4, 6, 3)), "y": np.zeros(2)},
             "expected `y` of 2 non-negative integers, received shape=(2,) and dtype=float64"),
            ({"x": np.zeros((3, 4, 6, 3)), "y": np.array([0, -1, -7])},
             "expected `y` of non-negative integers, received 2 of 3 below 0, first y[1]=-1"),
            ({"x": np.zeros((2, 4, 6, 3)), "y": np.array([0, 2**63], np.uint64)},
             "expected `y` below 2**63, received 1 of 2 that are not, first y[1]=9223372036854775808"),
            ({"x": np.zeros((2, 4, 6, 3)), "y": np.zeros(2, "timedelta64[s]")},
             "expected `y` of 2 non-negative integers, received shape=(2,) and dtype=timedelta64[s]"),
        ],
    )  # fmt: skip
    def test_arrays_that_do_not_fit(self, tmp_path, arrays, message):
        """Shape, dtype, values and labels are checked before anything is computed."""
        np.savez(tmp_path / "d.npz", **arrays)
        with pytest.raises(InputError, match=exactly(f"{tmp_path}/d.npz: {message}")):
            open_data(str(tmp_path / "d.npz"), PREPROCESSING)

    @pytest.mark.parametrize(
        ("content", "received"),
        [
            (b"", "an empty file"),
            (b"x,y\n0,1\n", "a file of another kind or a truncated one"),
            (b"\x93NUMPY" + bytes(200), "a file of another kind or a truncated one"),
        ],
    )
    def test_files_that_are_no_archive(self, tmp_path, content, received):
        """They are told as such, without a word on how to load them nevertheless."""
        (tmp_path / "d.npz").write_bytes(content)
        with pytest.raises(InputError, match=exactly(f"expected an .npz in {tmp_path}/d.npz, received {received}")):
            open_data(f"{tmp_path}/d.npz", PREPROCESSING)

    def test_files_that_are_not_two_arrays(self, tmp_path):
        """A missing array is named, and objects, which would be unpickled, are not read."""
        path = tmp_path / "d.npz"
        np.savez(path, x=np.zeros((2, 4, 6, 3)))
        with pytest.raises(InputError, match=f"^expected arrays `x` and `y` in {path}, received: 'y is not a file"):
            open_data(str(path), PREPROCESSING)
        np.savez(path, x=np.array([{}, {}]), y=np.zeros(2, int))
        message = f"{path}: expected arrays of numbers, received 'x' of Python objects"
        with pytest.raises(InputError, match=exactly(message)):
            open_data(str(path), PREPROCESSING)


class TestPreprocessing:
    @pytest.mark.parametrize(
        ("shape", "mode", "crop", "whole", "corner"),
        [
            ((3, 8, 8), "center", 0.8, (15, 10), (4, 1)),  # the shorter side becomes 8 / 0.8
            ((3, 8, 8), "center", 1.0, (12, 8), (2, 0)),
            ((3, 12, 6), "center", 1.0, (18, 12), (6, 0)),
            ((3, 4, 9), "center", 1.0, (9, 6), (0, 1)),
            ((3, 4, 8), "center", 0.875, (9, 6), (0, 1)),
            ((3, 8, 8), "squash", 0.8, (10, 10), (1, 1)),
        ],
    )
    @pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
    def test_resizing(self, shape, mode, crop, whole, corner, interpolation):
        """An image is resized until it covers the input over ``crop``, then cropped, as Pillow does these two."""
        image, (_, height, width) = photo(30, 20), shape
        known = Preprocessing(shape, "channels_first", interpolation=interpolation, crop=crop, crop_mode=mode)
        expected = image.resize(whole, Image.Resampling[interpolation.upper()])
        expected = expected.crop((*corner, corner[0] + width, corner[1] + height))

        assert np.array_equal(known.fit(np.asarray(image)), np.asarray(expected))

    @pytest.mark.parametrize("channels", [1, 2, 3, 4])
    def test_any_type_and_number_of_channels(self, channels):
        """Floating-point images and bytes are resized alike, each channel for itself."""
        image = np.random.default_rng(0).integers(0, 256, (20, 30, channels), np.uint8)
        known = Preprocessing((8, 8, channels), "channels_last")
        narrow, wide = known.fit(image), known.fit(image / 255)

        assert (narrow.shape, narrow.dtype, wide.dtype) == ((8, 8, channels), np.uint8, np.float32)
        assert np.abs(narrow / 255 - wide).max() < 1.1 / 255

    def test_round_trip(self):
        """Plain data and back; what was written before there was a crop reads as the whole image, bilinear."""
        known = Preprocessing((3, 4, 6), "channels_first", (0.5,), (0.25,), "bicubic", 0.9, "squash")
        old = {"shape": [3, 4, 6], "layout": "channels_first", "mean": [0.5], "std": [0.25]}

        assert Preprocessing.from_dict(known.to_dict()) == known
        assert Preprocessing.from_dict(old) == PREPROCESSING
        assert (PREPROCESSING.interpolation, PREPROCESSING.crop, PREPROCESSING.crop_mode) == ("bilinear", 1.0, "center")

    @pytest.mark.parametrize(
        ("arguments", "options", "message"),
        [
            (((3, 4), "channels_first"), {},
             "expected an input shape of three sizes for images, received shape=(3, 4)"),
            (((3, 4, 4), "channels_first", (0.1, 0.2)), {}, "expected 1 or 3 values, received mean=(0.1, 0.2)"),
            (((1, 4, 4), "channels_first", (0.1, 0.2, 0.3)), {}, "expected 1 value, received mean=(0.1, 0.2, 0.3)"),
            (((3, 4, 4), "channels_first", (float("nan"),)), {}, "expected finite values, received mean=(nan,)"),
            (((3, 4, 4), "channels_first", (0.0,), (0.0,)), {}, "expected positive values, received std=(0.0,)"),
            (((3, 4, 4), "channels_first"), {"interpolation": "random"},
             "expected one of nearest, box, bilinear, hamming, bicubic, lanczos, received interpolation=random"),
            (((3, 4, 4), "channels_first"), {"crop": 1.5},
             "expected a share above 0 and up to 1, received crop=1.5"),
            (((3, 4, 4), "channels_first"), {"crop_mode": "border"},
             "expected center or squash, received crop_mode=border"),
        ],
    )  # fmt: skip
    def test_preprocessing_that_cannot_be(self, arguments, options, message):
        """Wrong shapes, scales and ways to resize are refused by name."""
        with pytest.raises(InputError, match=exactly(message)):
            Preprocessing(*arguments, **options)


class TestWithoutLabels:
    def test_a_folder_of_images(self, tmp_path):
        """Images need no class folders where no label is asked for."""
        for name in ("a.png", "deep/b.png"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            Image.new("RGB", (4, 4)).save(tmp_path / name)
        data = open_data(str(tmp_path), PREPROCESSING, labelled=False)

        assert (len(data), data.labels.tolist(), data.classes) == (2, [0, 0], None)
        with pytest.raises(InputError, match="^expected at least two class folders in .*, received 1$"):
            open_data(str(tmp_path), PREPROCESSING)
        (tmp_path / "empty").mkdir()
        assert len(open_data(str(tmp_path), PREPROCESSING, labelled=False)) == 2
        with pytest.raises(InputError, match=f"^expected images in {tmp_path}/empty, received none$"):
            open_data(f"{tmp_path}/empty", PREPROCESSING, labelled=False)

    def test_an_npz_without_y(self, tmp_path):
        """Neither does an .npz; labels that are there are kept."""
        height, width = PREPROCESSING.size
        x = np.zeros((3, height, width, PREPROCESSING.channels), np.uint8)
        np.savez(tmp_path / "x.npz", x=x)
        np.savez(tmp_path / "xy.npz", x=x, y=np.arange(3))

        assert open_data(f"{tmp_path}/x.npz", PREPROCESSING, labelled=False).labels.tolist() == [0, 0, 0]
        assert open_data(f"{tmp_path}/xy.npz", PREPROCESSING, labelled=False).labels.tolist() == [0, 1, 2]
        with pytest.raises(InputError, match="^expected arrays `x` and `y` in .*"):
            open_data(f"{tmp_path}/x.npz", PREPROCESSING)
