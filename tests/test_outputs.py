"""Writing that loses nothing."""

import os
import signal
from functools import partial
from pathlib import Path

import pytest

from normswap.errors import NormswapError, OutputExistsError
from normswap.sources import outputs
from normswap.sources.outputs import FILE, Kind, clear, is_stage, require_output, staged

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


def killed(at, work):
    """Fork, do ``work`` and die within it before its ``at``-th change of the disk; return whether it got there."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    left = at

    def dying(call):
        def counted(*args, **kwargs):
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return call(*args, **kwargs)

        return counted

    for name in ("fsync", "replace", "rename", "link", "mkdir", "unlink", "rmdir"):
        setattr(os, name, dying(getattr(os, name)))
    outputs._rename = dying(outputs._rename)
    try:
        work()
    finally:
        os._exit(0)


def contents(folder):
    """The files in a folder that are not hidden, by name."""
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }


def write_file(path):
    with staged(path, overwrite=True) as temporary:
        temporary.write_text("new")


def write_folder(path):
    with staged(path, overwrite=True, kind=FOLDER) as temporary:
        temporary.mkdir()
        (temporary / "a").write_text("new")
        (temporary / "b").write_text("new")


class TestDeath:
    @pytest.mark.parametrize("exchanges", [True, False])
    @pytest.mark.parametrize(("write", "inner"), [(write_file, [""]), (write_folder, ["/a", "/b"])])
    @pytest.mark.parametrize("before", [True, False])
    def test_at_every_change_of_the_disk(self, tmp_path, monkeypatch, write, inner, before, exchanges):
        """Old or new is there, whole, and the next writer leaves nothing else.

        Without a system call that exchanges folders, that writer finds what had lost its name.
        """
        if not exchanges:
            monkeypatch.setattr(outputs, "_system_call", lambda: None)
        old, new = ({f"out{name}": text for name in inner} for text in ("old", "new"))
        at, died = 0, True
        while died:
            folder = tmp_path / str(at)
            folder.mkdir()
            for name, text in old.items() if before else ():
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_text(text)
            died = killed(at, partial(write, folder / "out"))
            if not exchanges:
                clear(folder)
            assert contents(folder) in ([old if before else {}, new] if died else [new])

            write(folder / "out")
            assert contents(folder) == new
            assert os.listdir(folder) == ["out"]
            at += 1

        assert at > 6

    def test_what_the_dead_left_is_cleared_beside_others(self, tmp_path):
        """Whoever writes into the folder next removes it, whatever its output is called."""
        assert killed(3, partial(write_file, tmp_path / "one"))
        assert [name for name in os.listdir(tmp_path) if is_stage(name)]

        write_file(tmp_path / "other")

        assert os.listdir(tmp_path) == ["other"]


class TestOthers:
    def test_one_writer_at_a_time(self, tmp_path):
        """Who comes while another writes is told so and leaves that one its output, which is not cleared meanwhile."""
        message = (
            f"expected an output that no other process is writing, received {tmp_path}/out; "
            "wait for that one to end, or write to another output"
        )
        with staged(tmp_path / "out") as temporary:
            temporary.write_text("first")
            with pytest.raises(OutputExistsError, match=exactly(message)), staged(tmp_path / "out"):
                pytest.fail("the body must not run")
            write_file(tmp_path / "other")

        assert (tmp_path / "out").read_text() == "first"

    def test_of_two_one_wins(self, tmp_path):
        """Fifty times two processes write the same new output at once: one does, and the other says why not."""
        for number in range(50):
            path, results = tmp_path / str(number), []
            children = [_writer(path, text) for text in ("a", "b")]
            for child in children:
                results.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            assert sorted(results) == [0, 2]
            assert path.read_text() == "ab"[results.index(0)]
        assert not [name for name in os.listdir(tmp_path) if is_stage(name)]

    @pytest.mark.parametrize("exchanges", [True, False])
    def test_what_comes_at_the_last_moment_stays(self, tmp_path, monkeypatch, exchanges):
        """Where nothing was to be replaced, what comes after the last look is not."""
        if not exchanges:
            monkeypatch.setattr(outputs, "_system_call", lambda: None)
        asked = outputs.require_output

        def and_then(path, **options):
            asked(path, **options)
            if not path.exists():
                path.write_text("theirs")

        with pytest.raises((OutputExistsError, FileExistsError)), staged(tmp_path / "out") as temporary:
            temporary.write_text("ours")
            monkeypatch.setattr(outputs, "require_output", and_then)

        assert (tmp_path / "out").read_text() == "theirs"
        assert os.listdir(tmp_path) == ["out"]


def _writer(path, text):
    """Fork a process that writes ``text`` once; it ends with its error's exit code."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with staged(path) as temporary:
            temporary.write_text(text)
        code = 0
    except NormswapError as error:
        code = error.exit_code
    finally:
        os._exit(code)


class TestNames:
    def test_as_long_as_a_name_can_be(self, tmp_path):
        """No suffix of ours makes a name too long."""
        for name in ("x" * 255, "\u00e9" * 127):
            write_folder(tmp_path / name)
            write_file(tmp_path / name / "a")
            assert (tmp_path / name / "a").read_text() == "new"

    @pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
    def test_modes_are_those_of_new_files(self, tmp_path, umask, mode):
        """Whatever a library makes a file with, others can read it as they can any file."""
        before = os.umask(umask)
        try:
            with staged(tmp_path / "out", kind=FOLDER) as temporary:
                temporary.mkdir()
                os.close(os.open(temporary / "weights", os.O_CREAT | os.O_WRONLY, 0o600))
        finally:
            os.umask(before)

        assert (tmp_path / "out" / "weights").stat().st_mode & 0o777 == mode
