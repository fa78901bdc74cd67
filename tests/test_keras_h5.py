"""Keras checkpoints of other systems, synthesised in their published layouts: read, refused, and written back."""

import re
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from normswap.errors import InputError, OutputExistsError
from normswap.interop.keras_h5 import LayerWeights, read_keras_h5, write_keras_h5

from .helpers import bits

h5py = pytest.importorskip("h5py")


def file_of(path, layers, *, group="/", text=False, split=False):
    """Write an HDF5 file as Keras 2 does, with names as bytes or text, in one attribute or in two."""

    def name_in(member, attribute, names):
        encoded = list(names) if text else np.array([name.encode() for name in names], "S")
        if split:
            member.attrs[f"{attribute}0"], member.attrs[f"{attribute}1"] = encoded[:1], encoded[1:]
        else:
            member.attrs[attribute] = encoded

    with h5py.File(path, "w") as file:
        root = file.require_group(group)
        name_in(root, "layer_names", layers)
        for layer, weights in layers.items():
            name_in(root.require_group(layer), "weight_names", weights)
            for name, array in weights.items():
                root[f"{layer}/{name}"] = array
    return path


def in_file(path, group="/"):
    """Return everything an HDF5 file says, by layer and weight name in its order."""
    with h5py.File(path) as file:
        root = file[group]
        return {
            layer.decode(): {n.decode(): root[layer][n][()] for n in root[layer].attrs["weight_names"]}
            for layer in root.attrs["layer_names"]
        }


def vector(size=4):
    """Positive values, which a variance may have too."""
    return np.linspace(0.5, 2, size, dtype=np.float32)


def switch_norm(name="switch_normalization_1", affine=("gamma", "beta")):
    """A layer of keras-switchnorm."""
    parts = [*affine, "mean_weights", "variance_weights", "moving_mean", "moving_variance"]
    return {f"{name}/{part}:0": vector(3 if part.endswith("weights") else 4) for part in parts}


def batch_renorm(form="batch_renormalization_1/batch_renormalization_1_{}:0"):
    """A layer of BatchRenormalization."""
    return {form.format(part): vector() * i for i, part in enumerate(("gamma", "beta", "running_mean", "running_std"))}


def group_norm(shape):
    """A layer of GroupNormalization-keras."""
    return {f"group_normalization_1/{part}:0": vector().reshape(shape) for part in ("gamma", "beta")}


CONVOLUTION = {"conv2d_1/kernel:0": np.ones((3, 3, 2, 4), np.float32), "conv2d_1/bias:0": np.ones(4, np.float32)}


class TestKeras:
    @pytest.mark.parametrize("affine", [("gamma", "beta"), ("gamma",), ("beta",), ()])
    def test_switch_norm(self, tmp_path, affine):
        """A layer of keras-switchnorm is known with and without scale and center, in the file's order."""
        path = file_of(tmp_path / "w.h5", {"switch_normalization_1": switch_norm(affine=affine)})

        layer = read_keras_h5(path)["switch_normalization_1"]

        assert layer.kind == "sn"
        assert list(layer.arrays) == [*affine, "mean_weight", "var_weight", "moving_mean", "moving_variance"]
        assert layer.names["var_weight"] == "switch_normalization_1/variance_weights:0"

    @pytest.mark.parametrize(
        ("layer", "form"),
        [
            ("batch_renormalization_1", "batch_renormalization_1/batch_renormalization_1_{}:0"),
            ("batchrenormalization_1", "batchrenormalization_1_{}:0"),
            ("batchrenormalization_1", "batchrenormalization_1_{}"),
            ("brn", "brn/{}:0"),
        ],
    )
    def test_batch_renorm(self, tmp_path, layer, form):
        """A layer of BatchRenormalization is known by its names of Keras 1 and 2; running_std is a variance."""
        found = read_keras_h5(file_of(tmp_path / "w.h5", {layer: batch_renorm(form)}))[layer]

        assert found.kind == "brn"
        assert list(found.arrays) == ["gamma", "beta", "moving_mean", "moving_variance"]
        assert np.array_equal(found.arrays["moving_variance"], vector() * 3)

    @pytest.mark.parametrize(
        ("shape", "kind"),
        [
            ((1, 1, 1, 4), "gn"),
            ((1, 4, 1, 1), "gn"),
            ((1, 4), "gn"),
            ((4,), "other"),
            ((2, 2), "other"),
            ((1, 1, 4, 1), "other"),
        ],
    )
    def test_group_norm(self, tmp_path, shape, kind):
        """The three shapes of GroupNormalization-keras are known; a LayerNormalization's are not taken for it."""
        layer = read_keras_h5(file_of(tmp_path / "w.h5", {"gn": group_norm(shape)}))["gn"]

        assert layer.kind == kind
        assert {array.shape for array in layer.arrays.values()} == {(4,) if kind == "gn" else shape}

    @pytest.mark.parametrize("group", ["/", "model_weights"])
    @pytest.mark.parametrize("text", [False, True])
    @pytest.mark.parametrize("split", [False, True])
    def test_round_trip(self, tmp_path, group, text, split):
        """What is read is written back under the same names, in the same order, shapes and bits."""
        layers = {
            "conv2d_1": CONVOLUTION,
            "activation_1": {},
            "switch_normalization_1": switch_norm(),
            "block/bn": {f"block/bn/{p}:0": vector() for p in ("gamma", "beta", "moving_mean", "moving_variance")},
            "batchrenormalization_1": batch_renorm(),
            "group_normalization_1": group_norm((1, 4, 1, 1)),
            "scale": {"factor:0": np.float64(2)},
        }
        found = read_keras_h5(file_of(tmp_path / "old.h5", layers, group=group, text=text, split=split))

        write_keras_h5(tmp_path / "new.h5", found, group=group)
        back = in_file(tmp_path / "new.h5", group)

        assert [layer.kind for layer in found.values()] == ["other", "other", "sn", "other", "brn", "gn", "other"]
        assert list(back) == list(layers)
        for layer, weights in layers.items():
            assert list(back[layer]) == list(weights)
            assert bits(back[layer]) == bits(weights)

    @given(size=st.integers(1, 5), data=st.data())
    def test_any_values_survive(self, tmp_path_factory, size, data):
        """Values of any width come back to the bit, changed ones too."""
        dtype = data.draw(st.sampled_from([np.float16, np.float32, np.float64, ">f4"]))
        values = data.draw(arrays(dtype, (1, size), elements=st.floats(-1e4, 1e4, width=16)))
        folder = tmp_path_factory.mktemp("h5")
        path = file_of(folder / "old.h5", {"gn": {"gamma:0": values, "beta:0": values}})
        with mock.patch("normswap.interop.keras_h5.require_readable"):  # which starts a process for each file
            layer = read_keras_h5(path)["gn"]

        write_keras_h5(folder / "new.h5", {"gn": replace(layer, arrays={p: -a for p, a in layer.arrays.items()})})

        assert bits(in_file(folder / "new.h5")["gn"]) == bits({"gamma:0": -values, "beta:0": -values})

    def test_long_lists_of_names(self, tmp_path):
        """More names than one attribute holds are spread over several, as Keras does."""
        layers = {f"{'long' * 20}_{i}": LayerWeights("other", {}, {}, {}) for i in range(2000)}

        write_keras_h5(tmp_path / "w.h5", layers)

        assert list(read_keras_h5(tmp_path / "w.h5")) == list(layers)


class TestKerasRefusals:
    @pytest.mark.parametrize(
        ("weights", "message"),
        [
            (
                {n: a for n, a in switch_norm().items() if "variance_weights" not in n},
                "its weights are gamma, beta, mean_weights, moving_mean, moving_variance instead of mean_weights, "
                "variance_weights, moving_mean, moving_variance with or without gamma and beta; save a nested model's "
                "weights by themselves",
            ),
            (
                switch_norm() | CONVOLUTION,
                "its weights are gamma, beta, mean_weights, variance_weights, moving_mean, moving_variance, "
                "conv2d_1/kernel:0, conv2d_1/bias:0 instead of mean_weights, variance_weights, moving_mean, "
                "moving_variance with or without gamma and beta; save a nested model's weights by themselves",
            ),
            (
                {n: a for n, a in batch_renorm().items() if "running_mean" not in n},
                "its weights are gamma, beta, running_std instead of running_mean, running_std with or without gamma "
                "and beta; save a nested model's weights by themselves",
            ),
            (
                switch_norm() | {"switch_normalization_1/beta:0": vector(5)},
                "beta is of shape (5,) instead of (4,)",
            ),
            (
                switch_norm() | {"switch_normalization_1/mean_weights:0": vector(2)},
                "mean_weight is of shape (2,) instead of (3,)",
            ),
            (
                group_norm((1, 1, 1, 4)) | {"group_normalization_1/beta:0": vector()},
                "beta is of shape (4,) instead of (1, 1, 1, 4)",
            ),
            (
                switch_norm() | {"switch_normalization_1/moving_variance:0": -vector()},
                "moving_variance has 4 values below 0",
            ),
            (
                switch_norm() | {"switch_normalization_1/gamma:0": vector() * np.inf},
                "gamma has 4 values that are not finite",
            ),
        ],
    )
    def test_a_layer_that_is_not_whole(self, tmp_path, weights, message):
        """A layer known by one of its names is refused unless all of it fits."""
        path = file_of(tmp_path / "w.h5", {"norm": weights})
        whole = f"{path}: expected a whole layer in /norm, received another: {message}"
        with pytest.raises(InputError, match=f"^{re.escape(whole)}$"):
            read_keras_h5(path)

    @pytest.mark.parametrize(
        ("put", "message"),
        [
            (
                lambda group: group.create_group("w:0"),
                'expected numbers in /layer/w:0, received <HDF5 group "/layer/w:0" (0 members)>',
            ),
            (
                lambda group: group.create_dataset("w:0", data=["text"]),
                'expected numbers in /layer/w:0, received <HDF5 dataset "w:0": shape (1,), type "|O">',
            ),
            (
                lambda group: group.__setitem__("w:0", h5py.SoftLink("/layer")),
                "expected data at layer/w:0, received a link; put there what it points to",
            ),
            (
                lambda group: group.__setitem__("w:0", h5py.ExternalLink("other.h5", "/w")),
                "expected data at layer/w:0, received a link; put there what it points to",
            ),
            (lambda group: None, "expected w:0 in /layer, received a file without it"),
            (
                lambda group: group.attrs.__setitem__("weight_names", [b"w:0", b"w:0"]),
                "expected different names in weight_names of /layer, received one twice",
            ),
            (
                lambda group: group.attrs.__delitem__("weight_names"),
                "expected an attribute weight_names of /layer, as Keras 1 and 2 write, received none",
            ),
            (
                lambda group: group.file.attrs.__delitem__("layer_names"),
                "expected an attribute layer_names of /, as Keras 1 and 2 write, received none",
            ),
        ],
    )
    def test_a_file_of_another_layout(self, tmp_path, put, message):
        """Links, other content than numbers and lists of names that do not fit are refused."""
        path = file_of(tmp_path / "w.h5", {"layer": {}})
        with h5py.File(path, "a") as file:
            file["layer"].attrs["weight_names"] = [b"w:0"]
            put(file["layer"])

        with pytest.raises(InputError, match=f"^{re.escape(f'{path}: {message}')}$"):
            read_keras_h5(path)

    @pytest.mark.parametrize(
        "options",
        [
            {"external": [("other.bin", 0, 16)]},
            {"shape": (1 << 40,)},
            {"chunks": (2,)},
            {"chunks": (4,), "compression": "gzip", "data": np.zeros(4, np.float32)},
        ],
    )
    def test_data_that_is_not_in_the_file(self, tmp_path, options):
        """A small file makes nobody read another one or fill the memory."""
        path = file_of(tmp_path / "w.h5", {"layer": {}})
        with h5py.File(path, "a") as file:
            file["layer"].attrs["weight_names"] = [b"w:0"]
            file["layer"].create_dataset("w:0", **{"shape": (4,), "dtype": np.float32, **options})

        message = (
            f"{path}: expected plain data in /layer/w:0, received compressed, unwritten or external data; "
            "rewrite the file with `h5repack -f NONE`"
        )
        with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
            read_keras_h5(path)

    def test_files_that_are_not_hdf5(self, tmp_path):
        """A missing, foreign or cut file is told as such."""
        path = tmp_path / "w.h5"
        with pytest.raises(InputError, match=f"^{re.escape(f'expected a file at {path}, received none there')}$"):
            read_keras_h5(path)

        whole = file_of(path, {"layer": CONVOLUTION}).read_bytes()
        for content in (b"PK", whole[:900]):
            path.write_bytes(content)
            start = re.escape(f"{path}: expected a whole HDF5 file with weights, received another: ")
            with pytest.raises(InputError, match=rf"^{start}[^\n]+$"):
                read_keras_h5(path)

    def test_writing_arrays_that_do_not_fit(self, tmp_path):
        """Arrays that no longer fit their file are refused before there is one."""
        layer = read_keras_h5(file_of(tmp_path / "old.h5", {"gn": group_norm((1, 4))}))["gn"]
        message = (
            "expected the arrays layer gn was read with, received others: "
            "beta is missing, mean is unexpected, gamma is of shape (5,) instead of (4,)"
        )
        with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
            write_keras_h5(tmp_path / "new.h5", {"gn": replace(layer, arrays={"gamma": vector(5), "mean": vector()})})

        assert not (tmp_path / "new.h5").exists()

    def test_nothing_is_overwritten(self, tmp_path):
        """A file that is there stays as it is."""
        path = file_of(tmp_path / "w.h5", {"layer": CONVOLUTION})
        with pytest.raises(
            OutputExistsError, match=f"^{re.escape(f'expected an output path that does not exist, received {path}')}$"
        ):
            write_keras_h5(path, {})

        assert bits(in_file(path)["layer"]) == bits(CONVOLUTION)
