"""What becomes of a command whose streams nobody reads, and of one that is told to end."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

COMMANDS = """
import sys, time
import click
from normswap.commands.options import json_option
from normswap.console import Group, show
from normswap.sources.outputs import staged
from pathlib import Path

main = Group("main")


@main.command()
@click.argument("path", type=Path)
@click.option("--wait", type=float, default=0.0)
@json_option
def work(path, wait, as_json):
    "Write a file, and tell of it before and after."
    with staged(path) as temporary:
        temporary.write_text("whole")
        for number in range(100):
            click.echo(f"begun {number}", err=True)
        time.sleep(wait)
    show(as_json, {"path": str(path)}, "done")


main()
"""


def start(folder, *arguments, **streams):
    """Start the command on a file in ``folder``."""
    command = [sys.executable, "-c", COMMANDS, "work", str(folder / "out"), *arguments]
    return subprocess.Popen(command, text=True, **streams)


def test_people_who_do_not_listen(tmp_path):
    """The work is done all the same."""
    reads, writes = os.pipe()
    os.close(reads)
    process = start(tmp_path, stdout=subprocess.PIPE, stderr=writes)
    os.close(writes)

    assert (process.communicate()[0], process.returncode) == ("", 0)
    assert (tmp_path / "out").read_text() == "whole"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux alone has a disk that is always full")
@pytest.mark.parametrize("arguments", [["--json"], ["--help"]])
def test_a_result_that_cannot_be_printed(tmp_path, arguments):
    """It is an error of the file system's, told in one line."""
    with Path("/dev/full").open("w") as full:
        process = start(tmp_path, *arguments, stdout=full, stderr=subprocess.PIPE)
        told = process.communicate()[1].splitlines()

    assert process.returncode == 7
    assert [line for line in told if not line.startswith("begun")] == ["error: [Errno 28] No space left on device"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing(tmp_path, number):
    """What is half done is gone, and the exit code is the shell's for the signal."""
    process = start(
        tmp_path, "--wait", "60", stderr=subprocess.PIPE, preexec_fn=lambda: signal.signal(number, signal.SIG_DFL)
    )  # which it may be ignored by the tests' own process
    process.stderr.readline()
    process.send_signal(number)

    assert process.communicate(timeout=30)[1].splitlines()[-1] == "stopped"
    assert process.returncode == 128 + number
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("spec", ["hanging.py:build", "waiting:build"])
def test_code_of_the_users_that_hangs(tmp_path, number, spec):
    """A MODEL that never comes is left as it is anywhere else; what the code raises then is not told as its fault."""
    (tmp_path / "hanging.py").write_text("print('begun', flush=True)\nwhile True:\n    pass\n")
    (tmp_path / "waiting.py").write_text(
        "import signal\n\ndef build():\n    print('begun', flush=True)\n    while True:\n        signal.pause()\n"
    )
    before = sorted(os.listdir(tmp_path))
    process = subprocess.Popen(
        [sys.executable, "-B", "-m", "normswap", "patch", spec, "--to", "gn", "-o", "out"],
        cwd=tmp_path,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(number, signal.default_int_handler if number == 2 else signal.SIG_DFL),
    )
    process.stdout.readline()
    process.send_signal(number)

    assert process.communicate(timeout=30)[1] == "stopped\n"
    assert process.returncode == 128 + number
    assert sorted(os.listdir(tmp_path)) == before


def test_a_signal_that_is_ignored_stays_so(tmp_path):
    """As under ``nohup``."""
    process = start(
        tmp_path,
        "--wait",
        "0.5",
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    process.stderr.readline()
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=30)

    assert process.returncode == 0
