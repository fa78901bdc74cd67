"""The memory of what was written on a machine: small, whole, and that of all processes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from normswap.bundles import written

WRITER = """
import sys
from pathlib import Path
from normswap.bundles.written import remember

for number in range(10):
    folder = Path(sys.argv[1]) / f"{sys.argv[2]}-{number}"
    folder.mkdir()
    (folder / "normswap.json").write_text("{}")
    remember(folder, f"{sys.argv[1]}/net.py:build")
"""


@pytest.fixture
def state(tmp_path, monkeypatch):
    """A memory of the test's own."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "normswap" / "bundles.json"


def bundle(path):
    """Return a folder with a manifest."""
    path.mkdir()
    (path / "normswap.json").write_text("{}")
    return path


def test_several_processes(state, tmp_path):
    """None loses what another has noted."""
    command = [sys.executable, "-c", WRITER, tmp_path]
    running = [subprocess.Popen([*command, str(number)]) for number in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]

    assert len(json.loads(state.read_text())["bundles"]) == 30
    assert all(
        written.is_remembered(tmp_path / f"{process}-{number}", f"{tmp_path}/net.py:build")
        for process in range(3)
        for number in range(10)
    )


def test_the_first_are_forgotten(state, tmp_path, monkeypatch):
    """It stays small; a bundle that is written again is one of the last."""
    monkeypatch.setattr(written, "MOST", 2)
    folders = [bundle(tmp_path / name) for name in "abc"]
    for folder in (*folders[:2], folders[0], folders[2]):
        written.remember(folder, "net.py:build")

    assert [written.is_remembered(folder, "net.py:build") for folder in folders] == [True, False, True]


def test_another_source(state, tmp_path):
    """What is remembered is one source: not another callable of its file, nor another file."""
    folder = bundle(tmp_path / "a")
    written.remember(folder, "net.py:build")

    assert [written.is_remembered(folder, f"{name}") for name in ("net.py:build", "net.py:other", "x.py:build")] == [
        True,
        False,
        False,
    ]


def test_a_link_to_a_bundle(state, tmp_path):
    """It is the bundle that it leads to."""
    folder = bundle(tmp_path / "a")
    written.remember(folder, "net.py:build")
    (tmp_path / "link").symlink_to(folder)

    assert written.is_remembered(tmp_path / "link", "net.py:build")


def test_a_relative_folder_is_none(tmp_path, monkeypatch):
    """A stranger's folder in which commands run holds no memory, by the XDG rules."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", "state")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    written.remember(bundle(tmp_path / "a"), "net.py:build")

    assert not Path("state").exists()
    assert (tmp_path / "home/.local/state/normswap/bundles.json").is_file()
