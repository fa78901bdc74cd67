"""Reading that trusts nothing and writing that loses nothing."""

import os
from pathlib import Path

import pytest

from normswap.errors import InputError, OutputExistsError
from normswap.sources.files import FILE, Kind, require_file, require_output, staged

from .helpers import exactly

FOLDER = Kind("a folder", Path.is_dir)


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

        kind = FOLDER if folder else FILE
        with pytest.raises(RuntimeError), staged(path, overwrite=True, kind=kind) as temporary:
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

        with staged(tmp_path / "out", overwrite=True, kind=FOLDER) as temporary:
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


class TestOverwriting:
    @pytest.mark.parametrize(
        ("make", "found"),
        [
            (lambda path: path.mkdir(), "a folder"),
            (lambda path: (path.mkdir(), (path / "photo.jpg").write_text("x")), "a folder"),
            (lambda path: path.symlink_to("old"), "a symbolic link"),
            (lambda path: path.symlink_to("nowhere"), "a symbolic link"),
            (os.mkfifo, "a device or pipe"),
        ],
        ids=["empty folder", "folder", "link", "dangling link", "pipe"],
    )
    def test_only_a_file_gives_way_to_a_file(self, tmp_path, make, found):
        """Whatever else stands there is refused and stays, what is within it and what it points to included."""
        (tmp_path / "old").write_text("old")
        make(tmp_path / "out")
        before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
        message = f"expected a regular file to overwrite, received {tmp_path}/out, {found}; write to another output"

        with (
            pytest.raises(OutputExistsError, match=exactly(message)),
            staged(tmp_path / "out", overwrite=True),
        ):
            pytest.fail("the body must not run")

        assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before
        assert (tmp_path / "old").read_text() == "old"

    def test_what_comes_meanwhile_stays(self, tmp_path):
        """A folder that is made where a file is about to go is not lost."""
        with (
            pytest.raises(OutputExistsError, match=", a folder; write to another output$"),
            staged(tmp_path / "out", overwrite=True) as temporary,
        ):
            temporary.write_text("new")
            (tmp_path / "out").mkdir()

        assert os.listdir(tmp_path) == ["out"]
        assert (tmp_path / "out").is_dir()

    @pytest.mark.parametrize("path", [".", "/", "..", "a/.."])
    def test_an_output_needs_a_name(self, path):
        """Neither the working folder nor what is above it is an output."""
        message = f"expected an output with a name of its own, received {path}; write to another output"
        with pytest.raises(OutputExistsError, match=exactly(message)):
            require_output(Path(path), overwrite=True)

    def test_what_is_read_is_not_overwritten(self, tmp_path):
        """Neither a source itself, under any name, nor a file in a folder that is one."""
        (tmp_path / "bundle").mkdir()
        (tmp_path / "bundle" / "model.keras").write_text("weights")
        os.link(tmp_path / "bundle" / "model.keras", tmp_path / "other")
        for path, source in (("bundle/model.keras", "bundle"), ("other", "bundle/model.keras")):
            message = (
                f"expected an output that is not read from, received {tmp_path}/{path}, which {tmp_path}/{source} "
                "needs; write to another output"
            )
            with pytest.raises(OutputExistsError, match=exactly(message)):
                require_output(tmp_path / path, overwrite=True, sources=["timm:resnet18", tmp_path / source])
        require_output(tmp_path / "other", overwrite=True, sources=["timm:resnet18", tmp_path / "nowhere"])


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
