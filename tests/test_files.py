"""Reading that trusts nothing and writing that loses nothing."""

import os

import pytest

from normswap.errors import InputError, OutputExistsError
from normswap.sources.files import require_file, staged


class TestStaged:
    def test_a_file_appears_when_the_body_succeeds(self, tmp_path):
        """The content is at its place and nothing else is left."""
        with staged(tmp_path / "new" / "out.bin") as temporary:
            temporary.write_bytes(b"content")

        assert (tmp_path / "new" / "out.bin").read_bytes() == b"content"
        assert os.listdir(tmp_path / "new") == ["out.bin"]

    def test_a_failure_leaves_nothing(self, tmp_path):
        """A body that fails half-way leaves no file and no temporary one."""
        with pytest.raises(RuntimeError, match="^half-way$"), staged(tmp_path / "out.bin") as temporary:
            temporary.write_bytes(b"half")
            raise RuntimeError("half-way")

        assert os.listdir(tmp_path) == []

    @pytest.mark.parametrize("folder", [False, True])
    def test_a_failure_keeps_the_old_output(self, tmp_path, folder):
        """What stood there before is whole after a failed overwrite, be it a file or a folder."""
        path = tmp_path / "out"
        content = path / "inner" if folder else path
        content.parent.mkdir(exist_ok=True)
        content.write_text("old")

        with pytest.raises(RuntimeError), staged(path, overwrite=True) as temporary:
            if folder:
                temporary.mkdir()
                (temporary / "inner").write_text("new")
            raise RuntimeError

        assert content.read_text() == "old"
        assert os.listdir(tmp_path) == ["out"]

    def test_a_folder_is_replaced_whole(self, tmp_path):
        """Files of the old folder do not linger in the new one."""
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "old").write_text("old")

        with staged(tmp_path / "out", overwrite=True) as temporary:
            temporary.mkdir()
            (temporary / "new").write_text("new")

        assert os.listdir(tmp_path / "out") == ["new"]
        assert os.listdir(tmp_path) == ["out"]

    def test_an_output_is_not_overwritten_unasked(self, tmp_path):
        """An existing output is refused before the body runs."""
        path = tmp_path / "out.bin"
        path.write_text("old")

        with (
            pytest.raises(OutputExistsError, match="^expected an output path that does not exist, received .*out.bin"),
            staged(path),
        ):
            pytest.fail("the body must not run")

        assert path.read_text() == "old"


class TestRequireFile:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "received an empty file"),
            (b"version https://git-lfs.github.com/spec/v1\n", "received a git-LFS pointer; run `git lfs pull`"),
            (b"\n<!DOCTYPE html><html>", "received a web page; download the file again"),
        ],
    )
    def test_what_is_not_a_model_is_named(self, tmp_path, content, message):
        """Things people save under a model's name by accident are recognised by content."""
        path = tmp_path / "model.pt"
        path.write_bytes(content)

        with pytest.raises(InputError) as caught:
            require_file(path)

        assert str(caught.value) == f"expected a model or weights in {path}, {message}"

    def test_a_missing_file_and_a_folder(self, tmp_path):
        """A path that is no file says what is there instead."""
        with pytest.raises(InputError, match="^expected a file at .*gone, received nothing there$"):
            require_file(tmp_path / "gone")
        with pytest.raises(InputError, match=", received a folder there$"):
            require_file(tmp_path)
