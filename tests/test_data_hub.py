"""Data sets the `datasets` library loads, here from files: which columns are taken, and what is refused."""

import io
import pickle
import sys

import datasets
import numpy as np
import pytest
from PIL import Image

from normswap.data.dataset import open_data
from normswap.data.preprocessing import Preprocessing
from normswap.errors import InputError, MissingDependencyError

from .helpers import exactly

PREPROCESSING = Preprocessing((3, 4, 6), "channels_first")
COLUMNS = "img (Image), fine (ClassLabel), coarse (ClassLabel), number (int32), text (string)"


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path_factory):
    """Nothing is fetched, and what is prepared is forgotten."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture
def folder(tmp_path):
    """A folder with two splits of two classes of images."""
    for split in ("train", "test"):
        for name, colour in {"a": 0, "b": 255}.items():
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for index in range(2):
                Image.new("RGB", (12, 8), (colour,) * 3).save(tmp_path / "images" / split / name / f"{index}.png")
    return tmp_path / "images"


@pytest.fixture
def table(tmp_path):
    """A function that writes a parquet file of images inside and several other columns, and returns its folder."""

    def write(images=(0, 255), numbers=(3, 4)):
        contents = [image if isinstance(image, bytes) else encoded(image) for image in images]
        columns = {
            "img": ([{"bytes": content, "path": None} for content in contents], datasets.Image()),
            "fine": ([0, 1], datasets.ClassLabel(names=["x", "y"])),
            "coarse": ([0, 0], datasets.ClassLabel(names=["z"])),
            "number": (list(numbers), datasets.Value("int32")),
            "text": (["a", "b"], datasets.Value("string")),
        }
        rows = {name: values for name, (values, _) in columns.items()}
        features = datasets.Features({name: feature for name, (_, feature) in columns.items()})
        (tmp_path / "table").mkdir()
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "table" / "train.parquet")
        return tmp_path / "table"

    return write


def encoded(colour):
    """A PNG file's content."""
    file = io.BytesIO()
    Image.new("L", (6, 4), colour).save(file, "PNG")
    return file.getvalue()


def test_a_split(folder):
    """Images, labels and the names of the classes, as from the folder itself; also of part of a split."""
    data, same = open_data(f"hf:{folder}[train]", PREPROCESSING), open_data(str(folder / "train"), PREPROCESSING)
    data.check()

    assert data.classes == same.classes == ["a", "b"]
    assert data.labels.tolist() == same.labels.tolist() == [0, 0, 1, 1]
    assert np.array_equal(data.batch(range(4))[0], same.batch(range(4))[0])
    assert len(open_data(f"hf:{folder}[train[:75%]]", PREPROCESSING)) == 3


def test_images_inside_a_file(table):
    """Columns that are named come first; integers are labels without names."""
    folder = table()
    data = open_data(f"hf:{folder}[train]:fine", PREPROCESSING)
    x, y = data.batch([1, 0])
    numbered = open_data(f"hf:{folder}[train]:number,img", PREPROCESSING)

    assert (data.classes, y.tolist(), x[0].min(), x[1].max()) == (["x", "y"], [1, 0], 1, 0)
    assert (numbered.classes, numbered.labels.tolist()) == (None, [3, 4])


def test_the_only_split(table):
    """A split that is the only one need not be named, nor a label column that is."""
    folder = table()
    data = datasets.load_dataset(str(folder), split="train").select_columns(["img", "coarse", "number"])
    data.to_parquet(folder / "train.parquet")
    found = open_data(f"hf:{folder}", PREPROCESSING)

    assert (len(found), found.classes) == (2, ["z"])


def test_a_copy_in_another_process(folder):
    """Pickled, the data set gives the same images."""
    data = open_data(f"hf:{folder}[test]", PREPROCESSING)

    assert np.array_equal(pickle.loads(pickle.dumps(data)).batch(range(4))[0], data.batch(range(4))[0])


def test_nothing_is_drawn_beside_the_answer(folder, capfd):
    """Progress bars are for terminals, and what a program has set for its own use of the library stays."""
    open_data(f"hf:{folder}[train]", PREPROCESSING)

    assert capfd.readouterr() == ("", "")
    assert not datasets.are_progress_bars_disabled()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("hf:{}", "expected one of the splits train, test, received data={}; add [SPLIT]"),
        ("hf:{}[val]",
         "expected a data set to load, received data={}: Unknown split \"val\". Should be one of ['train', 'test']."),
        ("hf:{}:large[train]",
         "expected a data set to load, received data={}: BuilderConfig 'large' not found. Available: ['default']"),
        ("hf:{}/gone[train]",
         "expected a data set to load, received data={}: Couldn't find any data file at {0}/gone."),
        ("hf:no/such[train]",
         "expected a data set to load, received data={}: Couldn't reach 'no/such' on the Hub (OfflineModeIsEnabled)"),
        ("hf:[train]",
         "expected a data set as hf:NAME, hf:NAME[SPLIT], hf:NAME:CONFIG[SPLIT] or hf:NAME[SPLIT]:COLUMN,COLUMN, "
         "received data={}"),
        ("hf:{}[train]:text",
         "expected one column of images and one of labels, received data={} with image (Image), label (ClassLabel); "
         "name them as in hf:NAME[SPLIT]:COLUMN,COLUMN"),
    ],
)  # fmt: skip
def test_data_sets_that_cannot_be(folder, spec, message):
    """What is missing is named with what there is."""
    spec = spec.replace("{}", str(folder))
    message = message.replace("{}", spec).replace("{0}", str(folder))
    with pytest.raises(InputError, match=exactly(message)):
        open_data(spec, PREPROCESSING)


def test_columns_that_could_each_be_meant(table):
    """Two columns of labels, or none of images, are listed with their types."""
    folder = table()
    message = (
        f"expected one column of images and one of labels, received data=hf:{folder} with {COLUMNS}; "
        "name them as in hf:NAME[SPLIT]:COLUMN,COLUMN"
    )
    with pytest.raises(InputError, match=exactly(message)):
        open_data(f"hf:{folder}", PREPROCESSING)
    datasets.load_dataset(str(folder), split="train").remove_columns(["img", "coarse"]).to_parquet(
        folder / "train.parquet"
    )
    message = message.replace("img (Image), ", "").replace("coarse (ClassLabel), ", "")
    with pytest.raises(InputError, match=exactly(message)):
        open_data(f"hf:{folder}", PREPROCESSING)


@pytest.mark.parametrize(
    ("numbers", "received"), [((-1, 2), "2 of dtype=int64 from -1 on"), ((1, None), "2 of dtype=float32 from nan on")]
)
def test_labels_that_are_none(table, numbers, received):
    """Rows without a label, which the library gives as -1 or null, are refused."""
    spec = f"hf:{table(numbers=numbers)}[train]:number"
    message = f"expected non-negative labels in column number of data={spec}, received {received}"
    with pytest.raises(InputError, match=exactly(message)):
        open_data(spec, PREPROCESSING)


def test_images_that_cannot_be_read(table, folder):
    """A bad image is found by its row, or by the path of its file."""
    spec = f"hf:{table(images=(0, b'no image'))}[train]:fine"
    lines = [
        "expected images that can be read, received 1 of 2 that cannot:",
        f"  {spec} row 1: no image Pillow knows",
    ]
    with pytest.raises(InputError, match=exactly("\n".join(lines))):
        open_data(spec, PREPROCESSING).check()
    data = open_data(f"hf:{folder}[train]", PREPROCESSING)
    (folder / "train" / "b" / "0.png").write_bytes(b"no image")
    with pytest.raises(
        InputError, match=exactly(f"expected an image in {folder}/train/b/0.png, received: no image Pillow knows")
    ):
        data.batch([2])


def test_no_code_is_run(tmp_path):
    """A data set that brings Python code is refused, and the code is not run."""
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "set.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    message = (
        f"expected a data set to load, received data=hf:{tmp_path}/set: "
        "Dataset scripts are no longer supported, but found set.py"
    )
    with pytest.raises(InputError, match=exactly(message)):
        open_data(f"hf:{tmp_path}/set", PREPROCESSING)

    assert not (tmp_path / "ran").exists()


def test_without_the_library(monkeypatch):
    """The extra that brings it is named."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    message = "hf: data needs datasets: pip install 'normswap[data]'"
    with pytest.raises(MissingDependencyError, match=exactly(message)):
        open_data("hf:cifar10[train]", PREPROCESSING)
