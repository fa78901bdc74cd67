"""ONNX files from anywhere: what is malformed, unsafe or unsupported is refused before anything in it is used.

Numbers in the names are the rows of the table of bad inputs that the test settles.
"""

import json
import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import helper

from normswap.data.preprocessing import Preprocessing
from normswap.errors import InputError, MissingDependencyError, UnsupportedError
from normswap.verification.file import newest_versions, read_model
from normswap.verification.inference import open_onnx
from normswap.verification.reference import Batch, Reference
from normswap.verification.runtime import chosen_providers, session
from normswap.verification.sizes import changed
from normswap.verification.stored import save_reference
from normswap.verification.verify import verify_against

from .helpers import exactly
from .onnx_models import WEIGHT, endless, external, refused, scores

NEWER = "update onnxruntime, or export the model again"


class TestWholeFiles:
    def test_an_empty_file(self, folder):
        """An empty file is told as such: as a message it would be a valid model."""
        (folder / "m.onnx").write_bytes(b"")

        assert refused(folder / "m.onnx") == (
            f"expected a model or weights in {folder / 'm.onnx'}, received an empty file"
        )

    @pytest.mark.parametrize("share", [0.3, 0.9])
    def test_a_truncated_file(self, folder, share):
        """A file cut short is refused."""
        content = scores().SerializeToString()
        (folder / "m.onnx").write_bytes(content[: int(len(content) * share)])

        assert refused(folder / "m.onnx") == (
            f"expected an ONNX model in {folder / 'm.onnx'}, received a file that is not valid: it is damaged or "
            "cut short; get the file once more"
        )

    def test_no_graph(self, folder):
        """A message without a graph is no model, whatever the parser says."""
        (folder / "m.onnx").write_bytes(onnx.ModelProto(ir_version=9).SerializeToString())

        assert refused(folder / "m.onnx") == (
            f"expected an ONNX model in {folder / 'm.onnx'}, received a file that is not valid: it holds no graph with "
            "outputs; export the model again"
        )

    def test_what_the_checker_refuses(self, folder):
        """A graph whose shapes contradict each other is refused, with the checker's reason."""
        (folder / "m.onnx").write_bytes(scores(weight=WEIGHT.T.copy()).SerializeToString())

        said = refused(folder / "m.onnx")
        assert said.startswith(f"expected an ONNX model in {folder / 'm.onnx'}, received a file that is not valid: ")
        assert said.endswith("; export the model again")

    @pytest.mark.parametrize("name", [b"head", b"batch", b"MatMul", b"normswap.sites"])
    def test_names_that_are_no_text(self, folder, name):
        """They are told, wherever they are; what a doc string is in nobody needs to read."""
        proto = scores()
        proto.metadata_props.add(key="normswap.sites", value="{}")
        proto.doc_string = proto.graph.node[0].doc_string = "note"
        content = proto.SerializeToString().replace(b"note", b"n\xfcte")
        (folder / "m.onnx").write_bytes(content)
        assert read_model(folder / "m.onnx").sites == {}
        (folder / "m.onnx").write_bytes(content.replace(name, b"\xff" + name[1:]))

        assert refused(folder / "m.onnx") == (
            f"expected an ONNX model in {folder / 'm.onnx'}, received a file that is not valid: it holds a name that "
            "is no UTF-8; get the file once more"
        )

    @pytest.mark.parametrize("opset", [0, 999])
    def test_operator_sets_out_of_range(self, folder, opset):
        """An operator set onnxruntime does not load is unsupported; the range it does is listed."""
        (folder / "m.onnx").write_bytes(scores(opset=opset).SerializeToString())
        newest = newest_versions()[1]

        assert refused(folder / "m.onnx", UnsupportedError) == (
            f"expected an opset from 1 to {newest} in {folder / 'm.onnx'}, received opset={opset}; {NEWER}"
        )
        assert newest >= 20

    def test_ir_versions_out_of_range(self, folder):
        """So is an IR version."""
        (folder / "m.onnx").write_bytes(scores(ir_version=99).SerializeToString())
        newest = newest_versions()[0]

        assert refused(folder / "m.onnx", UnsupportedError) == (
            f"expected an IR version from 1 to {newest} in {folder / 'm.onnx'}, received ir_version=99; {NEWER}"
        )
        assert newest >= 9

    def test_the_newest_versions_load(self, folder):
        """What is listed as the newest is loaded."""
        ir_version, opset = newest_versions()
        (folder / "m.onnx").write_bytes(scores(opset, ir_version).SerializeToString())

        assert session(read_model(folder / "m.onnx").content).get_outputs()[0].name == "y"

    @pytest.mark.parametrize(
        ("op", "domain", "told"),
        [("FooBar", "", "ai.onnx"), ("FooBar", "com.example", "com.example"), ("MatMul", "com.example", "com.example")],
    )
    def test_operators_onnxruntime_has_not(self, folder, op, domain, told):
        """An operator onnxruntime does not have is named with its domain."""
        (folder / "m.onnx").write_bytes(scores(op=op, domain=domain).SerializeToString())

        assert refused(folder / "m.onnx", UnsupportedError) == (
            f"expected operators that onnxruntime has in {folder / 'm.onnx'}, received {op} of domain {told} "
            f"(node head); {NEWER}"
        )

    def test_functions_of_the_file_itself_are_known(self, folder):
        """A function that the file itself defines is an operator like any other."""
        proto = scores(op="FooBar", domain="com.example")
        node = helper.make_node("MatMul", ["a", "b"], ["c"])
        function = helper.make_function(
            "com.example", "FooBar", ["a", "b"], ["c"], [node], [helper.make_opsetid("", 20)]
        )
        proto.functions.append(function)
        (folder / "m.onnx").write_bytes(proto.SerializeToString())

        assert session(read_model(folder / "m.onnx").content).get_outputs()[0].name == "y"

    def test_metadata_that_is_no_json(self, folder):
        """What stands under our name in the metadata is not believed either."""
        proto = scores()
        proto.metadata_props.add(key="normswap.sites", value="{")
        (folder / "m.onnx").write_bytes(proto.SerializeToString())
        message = (
            f"expected JSON at sites in the metadata of {folder / 'm.onnx'}, received text that is not: Expecting "
            "property name enclosed in double quotes: line 1 column 2 (char 1); export the model again"
        )
        with pytest.raises(InputError, match=exactly(message)):
            _ = read_model(folder / "m.onnx").metadata

    def test_metadata_of_another_kind(self, folder):
        """Layers that are no names, and preprocessing that is none, are refused in words."""
        proto = scores()
        proto.metadata_props.add(key="normswap.sites", value="3")
        proto.metadata_props.add(key="normswap.preprocessing", value='{"shape": [3]}')
        path = folder / "m.onnx"
        path.write_bytes(proto.SerializeToString())
        with pytest.raises(InputError) as caught:
            _ = read_model(path).sites
        assert (
            str(caught.value)
            == f"expected an object at sites in the metadata of {path}, received 3; export the model again"
        )
        proto.metadata_props.add(key="normswap.inputs", value='{"x": 3}')
        path.write_bytes(proto.SerializeToString())
        with pytest.raises(InputError) as caught:
            changed(read_model(path))
        assert (
            str(caught.value)
            == f"expected a list at inputs.x in the metadata of {path}, received 3; export the model again"
        )
        with pytest.raises(InputError) as caught:
            open_onnx(path)
        assert str(caught.value) == (
            f"expected a value at preprocessing.layout in the metadata of {path}, received none; export the model again"
        )


class TestProviders:
    def test_a_missing_one(self):
        """A provider that is not installed is refused by name, with the package that brings it."""
        import onnxruntime

        installed = ", ".join(onnxruntime.get_available_providers())
        for name, full, package in (
            ("cuda", "CUDAExecutionProvider", "onnxruntime-gpu"),
            ("openvino", "OpenVINOExecutionProvider", "onnxruntime-openvino"),
        ):
            if full in installed:  # a machine that has one proves the other
                continue
            with pytest.raises(MissingDependencyError) as caught:
                chosen_providers([name])

            assert str(caught.value) == (
                f"expected an onnxruntime with {full} for provider={name!r}, received an onnxruntime that has "
                f"{installed}: pip install {package}"
            )
            assert caught.value.exit_code == 6

    def test_no_silent_fall_back(self, monkeypatch):
        """Where a provider is listed but does not start, running on the CPU in its place is an error."""
        import onnxruntime

        listed = ["CUDAExecutionProvider", "CPUExecutionProvider"]
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: listed)
        assert chosen_providers(["cuda", "cpu", "cuda"]) == ["cuda", "cpu"]
        assert chosen_providers(["auto"]) == ["cpu", "cuda"]

        class OnTheCpu:
            def __init__(self, *args, **options):
                assert options["enable_fallback"] == 0

            def get_providers(self):
                return ["CPUExecutionProvider"]

        monkeypatch.setattr(onnxruntime, "InferenceSession", OnTheCpu)
        with pytest.raises(MissingDependencyError) as caught:
            session(scores().SerializeToString(), provider="cuda")

        assert str(caught.value) == (
            "expected an onnxruntime with CUDAExecutionProvider for provider='cuda', received one that runs on "
            "CPUExecutionProvider in its place: pip install onnxruntime-gpu"
        )

    def test_an_unknown_one(self):
        """A misspelt provider is told the names there are."""
        with pytest.raises(InputError) as caught:
            chosen_providers(["gpu"])

        assert str(caught.value) == (
            "expected a provider of cpu, cuda, tensorrt, openvino, coreml, dml or auto, received provider='gpu'"
        )

    def test_none(self):
        """Nothing can be run nowhere."""
        message = "expected a provider of cpu, cuda, tensorrt, openvino, coreml, dml or auto, received none"
        with pytest.raises(InputError, match=exactly(message)):
            chosen_providers([])


class TestTime:
    def test_a_loop_without_end(self, folder):
        """The file is given up after the time it was allowed, by `verify` and by `evaluate`."""
        file = endless()
        told = Preprocessing((1, 1, 3), "channels_last").to_dict()
        file.metadata_props.add(key="normswap.preprocessing", value=json.dumps(told))
        (folder / "m.onnx").write_bytes(file.SerializeToString())
        message = (
            "expected the file's outputs for inputs of shape (2, 3) within 0.2 s, received none; allow more by timeout"
        )
        predict, _ = open_onnx(folder / "m.onnx", timeout=0.2)
        with pytest.raises(InputError, match=exactly(message)):
            predict(np.zeros((2, 3), np.float32))
        x = np.zeros((2, 3), np.float32)
        save_reference(Reference([Batch(1.0, {"x": x}, {"y": x}, {})]), folder / "m.npz", overwrite=False)
        with pytest.raises(InputError, match=exactly(message)):
            verify_against(folder / "m.npz", folder / "m.onnx", timeout=0.2)


class TestEvaluate:
    def test_hostile_files_are_refused(self, folder):
        """`evaluate` reads a file through the same checks."""
        path = external(folder, location="../secret.bin", length=48)
        with pytest.raises(InputError, match="it leaves the folder; export the model again$"):
            open_onnx(path)

    def test_a_file_of_two_inputs(self, folder):
        """It is held against its model, not run on images."""
        proto = scores()
        proto.graph.input.append(helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, [1]))
        (folder / "m.onnx").write_bytes(proto.SerializeToString())
        message = "expected a file with one input to evaluate, received 2; hold it against its model by normswap.verify"
        with pytest.raises(InputError, match=exactly(message)):
            open_onnx(folder / "m.onnx")

    def test_images_that_a_file_does_not_take(self, folder):
        """What onnxruntime says of them is told."""
        proto = scores()
        known = Preprocessing((2, 2, 3), "channels_last").to_dict()
        proto.metadata_props.add(key="normswap.preprocessing", value=json.dumps(known))
        (folder / "m.onnx").write_bytes(proto.SerializeToString())
        predict, _ = open_onnx(folder / "m.onnx")
        with pytest.raises(InputError) as caught:
            predict(np.zeros((2, 2, 2, 3), np.float32))

        said = str(caught.value)
        assert said.startswith("expected images the file takes, received some on which it fails: ")
        assert said.endswith("; give images of the size that it was exported for")

    def test_a_model_that_onnxruntime_refuses(self):
        """So is what it says of a model."""
        with pytest.raises(InputError) as caught:
            session(b"none")

        said = str(caught.value)
        assert said.startswith("expected a model onnxruntime can load, received one it refuses: ")
        assert said.endswith(f"; {NEWER}")

    @pytest.mark.parametrize(
        ("make", "code"),
        [
            (lambda folder: external(folder, location="../secret.bin", length=48), 3),
            (lambda folder: (folder / "m.onnx").write_bytes(scores(opset=999).SerializeToString()), 4),
            (lambda folder: (folder / "m.onnx").write_bytes(scores(op="FooBar").SerializeToString()), 4),
            (lambda folder: (folder / "m.onnx").write_bytes(scores().SerializeToString()[:99]), 3),
        ],
    )
    def test_exit_codes_of_refused_files(self, folder, make, code):
        """Both commands exit with the row's code, without a traceback and without a framework."""
        make(folder)
        np.savez(folder / "d.npz", x=np.zeros((1, 2, 2, 3), np.uint8), y=np.zeros(1, np.int64))
        script = (
            "import sys; from normswap.cli import main\n"
            "try: main(sys.argv[1:])\n"
            "finally: assert not {'torch', 'keras', 'tensorflow'} & set(sys.modules)"
        )
        for arguments in (["evaluate", "m.onnx", "--data", "d.npz"], ["verify", "m.onnx", "--against", "d.npz"]):
            done = subprocess.run(
                [sys.executable, "-c", script, *arguments, "--json"], cwd=folder, capture_output=True, text=True
            )

            assert done.returncode == code, done.stderr
            assert json.loads(done.stdout)["exit_code"] == code
            assert "Traceback" not in done.stderr
