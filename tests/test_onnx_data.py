"""Tensors of ONNX files from anywhere: located, contained and measured before a byte of them is used.

Numbers in the names are the rows of the table of bad inputs that the test settles.
"""

import os

import numpy as np
import pytest
from onnx import TensorProto, helper

from normswap.verification.file import read_model
from normswap.verification.runtime import session

from .onnx_models import WEIGHT, external, refused, scores


class TestExternalData:
    def test_beside_the_file(self, folder):
        """Data in a plain file beside the model, or in a folder below, is read."""
        for location in ("m.onnx.data", "parts/0.bin"):
            (folder / location).parent.mkdir(exist_ok=True)
            (folder / location).write_bytes(b"\0" * 16 + WEIGHT.tobytes())
            path = external(folder, location=location, offset=16, length=48)
            runner = session(read_model(path).content, folder=folder)

            np.testing.assert_array_equal(runner.run(None, {"x": np.eye(3, dtype=np.float32)})[0], WEIGHT)

    @pytest.mark.parametrize(
        ("location", "reason"),
        [
            ("../secret.bin", "it leaves the folder; export the model again"),
            ("parts/../../secret.bin", "it leaves the folder; export the model again"),
            ("..\\secret.bin", "it leaves the folder; export the model again"),
            ("/etc/hostname", "an absolute path; export the model again"),
            ("C:\\secret.bin", "an absolute path; export the model again"),
            ("", "no file's name; export the model again"),
            ("m\0.data", "no file's name; export the model again"),
            ("gone.bin", "there is no such file; get both files once more"),
            ("parts", "it is not a file; export the model again"),
        ],
    )
    def test_locations_outside_the_folder(self, folder, location, reason):
        """A location outside the model's folder, or of no file, is refused by its name alone."""
        (folder / "parts").mkdir()
        path = external(folder, location=location, length=48)

        assert refused(path) == (
            f"expected external data in plain files beside {path}, received location={location!r} for tensor 'w': "
            f"{reason}"
        )

    def test_a_symbolic_link(self, folder):
        """A link to a file elsewhere is refused, as is a linked folder on the way."""
        (folder / "link.bin").symlink_to(folder.parent / "secret.bin")
        (folder / "linked").symlink_to(folder.parent)
        for location, link in (("link.bin", "link.bin"), ("linked/secret.bin", "linked")):
            path = external(folder, location=location, length=48)

            assert refused(path) == (
                f"expected external data in plain files beside {path}, received location={location!r} for tensor "
                f"'w': {folder / link} is a symbolic link; copy it"
            )

    def test_a_hard_link(self, folder):
        """A second name of a file elsewhere is refused."""
        os.link(folder.parent / "secret.bin", folder / "m.onnx.data")
        path = external(folder, location="m.onnx.data", length=48)

        assert refused(path) == (
            f"expected external data in plain files beside {path}, received location='m.onnx.data' for tensor 'w': "
            "the file has 2 names (hard links); copy it"
        )

    @pytest.mark.parametrize(
        ("offset", "length"), [(0, 44), (16, 48), (-1, 48), (0, 10**15), (2**63, 48), (0, -1), (10**15, 48)]
    )
    def test_a_place_beyond_the_file(self, folder, offset, length):
        """A place that is not wholly within the file, or not as long as the tensor, is refused."""
        (folder / "m.onnx.data").write_bytes(WEIGHT.tobytes())
        path = external(folder, location="m.onnx.data", offset=offset, length=length)

        assert refused(path) == (
            f"expected 48 bytes within the 48 of m.onnx.data for tensor 'w' of {path}, "
            f"received offset={offset} and length={length}; get both files once more"
        )

    def test_a_short_file(self, folder):
        """A file shorter than the tensor is refused where no length is stated either."""
        (folder / "m.onnx.data").write_bytes(WEIGHT.tobytes()[:20])
        path = external(folder, location="m.onnx.data")

        assert refused(path) == (
            f"expected 48 bytes within the 20 of m.onnx.data for tensor 'w' of {path}, received offset=0 and "
            "length=48; get both files once more"
        )

    def test_an_offset_that_is_no_number(self, folder):
        """An offset that is no number is refused."""
        (folder / "m.onnx.data").write_bytes(WEIGHT.tobytes())
        path = external(folder, location="m.onnx.data", offset="here")

        assert refused(path) == (
            f"expected an offset and a length in numbers for tensor 'w' of {path}, received "
            "{'location': 'm.onnx.data', 'offset': 'here'}; export the model again"
        )

    def test_wherever_a_tensor_is(self, folder):
        """A tensor in the attribute of a node in a branch is held to the same."""
        proto = scores()
        inner = helper.make_tensor("c", TensorProto.FLOAT, [2], [0.0, 0.0])
        inner.ClearField("float_data")
        inner.data_location = TensorProto.EXTERNAL
        inner.external_data.add(key="location", value="../secret.bin")
        out = helper.make_tensor_value_info("o", TensorProto.FLOAT, [2])
        branch = helper.make_graph([helper.make_node("Constant", [], ["o"], value=inner)], "b", [], [out])
        proto.graph.node.append(helper.make_node("If", ["c"], ["z"], then_branch=branch, else_branch=branch))
        (folder / "m.onnx").write_bytes(proto.SerializeToString())

        assert refused(folder / "m.onnx").endswith(
            "location='../secret.bin' for tensor 'c': it leaves the folder; export the model again"
        )


class TestTensors:
    def test_sizes_that_overflow(self, folder):
        """A shape of terabytes over 16 bytes is refused before anything is allocated."""
        proto = scores()
        proto.graph.initializer[0].dims[:] = [2**40]
        proto.graph.initializer[0].raw_data = b"\0" * 16
        (folder / "m.onnx").write_bytes(proto.SerializeToString())

        assert refused(folder / "m.onnx") == (
            f"expected 4398046511104 bytes in {folder / 'm.onnx'} for tensor 'w' of shape (1099511627776,), received "
            "16; get the file once more"
        )

    def test_a_product_that_overflows(self, folder):
        """Sizes whose product is a multiple of 2^64 are not taken for nothing."""
        proto = scores()
        proto.graph.initializer[0].dims[:] = [2**32, 2**32]
        proto.graph.initializer[0].raw_data = b""
        (folder / "m.onnx").write_bytes(proto.SerializeToString())

        assert f"expected {2**66} bytes" in refused(folder / "m.onnx")

    def test_a_negative_size(self, folder):
        """A negative size is refused."""
        proto = scores()
        proto.graph.initializer[0].dims[:] = [-3, -4]
        (folder / "m.onnx").write_bytes(proto.SerializeToString())

        assert refused(folder / "m.onnx") == (
            f"expected sizes of 0 and more in {folder / 'm.onnx'}, received tensor 'w' of shape (-3, -4); get "
            "the file once more"
        )

    def test_an_unknown_type(self, folder):
        """A tensor of a data type there is not is refused."""
        proto = scores()
        proto.graph.initializer[0].data_type = 77
        (folder / "m.onnx").write_bytes(proto.SerializeToString())

        assert refused(folder / "m.onnx") == (
            f"expected a data type ONNX has in {folder / 'm.onnx'}, received tensor 'w' of shape (3, 4) and "
            "data_type=77; get the file once more"
        )

    @pytest.mark.parametrize(
        "tensor",
        [
            helper.make_tensor("w", TensorProto.FLOAT, [3, 4], WEIGHT.ravel()),
            helper.make_tensor("w", TensorProto.FLOAT16, [3], [1.0, 2.0, 3.0]),
            helper.make_tensor("w", TensorProto.BFLOAT16, [3], [1.0, 2.0, 3.0]),
            helper.make_tensor("w", TensorProto.INT4, [3], [1, 2, 3]),
            helper.make_tensor("w", TensorProto.COMPLEX64, [2], [1j, 2j]),
            helper.make_tensor("w", TensorProto.STRING, [2], ["a", "b"]),
            helper.make_tensor("w", TensorProto.BOOL, [], [True]),
            helper.make_tensor("w", TensorProto.INT64, [0], []),
        ],
    )
    def test_every_way_to_store_one(self, folder, tensor):
        """Tensors of all types, in bytes or in lists of numbers, pass."""
        proto = scores()
        proto.graph.initializer.add().CopyFrom(tensor)
        proto.graph.initializer[1].name = "unused"
        (folder / "m.onnx").write_bytes(proto.SerializeToString())

        assert read_model(folder / "m.onnx").proto.graph.initializer[1].name == "unused"
