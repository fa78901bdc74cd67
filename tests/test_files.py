"""Reading that trusts nothing."""

import pytest

from normswap.errors import InputError
from normswap.sources.files import require_file


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
