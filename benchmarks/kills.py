"""Kill every command at each of its changes of the disk: the old output or the new one is whole, and a rerun is clean.

``python benchmarks/kills.py`` forks a process for each change (a file made, flushed, renamed, linked or removed), which
dies before it; with and without an output that is to be replaced. Then the output has to be what it was, or be read as
what it is to become, and the same command has to end well and leave nothing else. Takes some ten minutes on one core.
"""

import argparse
import hashlib
import io
import os
import shutil
import signal
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np

os.environ.update(OMP_NUM_THREADS="1", NUMBA_NUM_THREADS="1")

import torch

from normswap.bundles.manifest import read_manifest
from normswap.cli import main
from normswap.sources import outputs
from normswap.verification.file import read_model

torch.set_num_threads(1)

NET = """
from torch import nn


def build():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(4, 2))
"""
CALLS = ("fsync", "replace", "rename", "link", "mkdir", "unlink", "rmdir")


def commands(folder):
    """Return each command by name, its output, and what reads that as what it is to be."""
    net, data, base = folder / "net.py", folder / "data.npz", folder / "base"
    tune = ["finetune", base, "--data", data, "--eval-data", data, "--steps", "4", "--checkpoint-every", "2"]
    return {
        "patch": (["patch", f"{net}:build", "--to", "sn", "--input-shape", "3,8,8"], "out", read_manifest),
        "export": (["export", base], "out.onnx", read_model),
        "verify --save-reference": (["verify", base, folder / "base.onnx"], "out.npz", np.load),
        "plot": (["plot", folder / "tuned"], "out.png", lambda path: path.read_bytes().index(b"IEND")),
        "report": (["report", folder / "tuned"], "out.html", lambda path: path.read_bytes().index(b"</html>")),
        "finetune": ([*tune, "--batch-size", "8"], "out", read_manifest),
    }


def flag(name):
    """Return the option of a command that says where its output goes."""
    return "--save-reference" if name.startswith("verify") else "-o"


def made(folder):
    """Make what the commands read: a model's file, its data, a bundle, an ONNX file and a run."""
    (folder / "net.py").write_text(NET)
    random = np.random.default_rng(0)
    np.savez(folder / "data.npz", x=random.uniform(0, 1, (16, 8, 8, 3)).astype(np.float32), y=np.arange(16) % 2)
    patch = ["patch", f"{folder}/net.py:build", "--to", "sn", "--input-shape", "3,8,8", "-o", folder / "base"]
    tune = ["finetune", folder / "base", "--data", folder / "data.npz", "--steps", "2", "-o", folder / "tuned"]
    for arguments in (patch, ["export", folder / "base", "-o", folder / "base.onnx"], tune):
        assert forked(lambda arguments=arguments: run(arguments)) == 0


def run(arguments):
    """Run a command and return its exit code."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(out):
        try:
            main([str(each) for each in arguments], standalone_mode=True)
        except SystemExit as ended:
            return ended.code or 0, out.getvalue()
    return 0, out.getvalue()


def forked(work):
    """Run ``work`` in a process of its own and return how it ended, below 0 for a signal."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code, told = 1, ""
    try:
        code, told = work()
    finally:
        if code:
            print(told[-600:], file=sys.stderr, flush=True)
        os._exit(code)


def dying(at, arguments):
    """Return what runs a command that is killed before its ``at``-th change of the disk."""

    def work():
        left = at

        def counted(call):
            def calling(*args, **kwargs):
                nonlocal left
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
                return call(*args, **kwargs)

            return calling

        for name in CALLS:
            setattr(os, name, counted(getattr(os, name)))
        outputs._rename = counted(outputs._rename)
        return run(arguments)

    return work


def state(path):
    """Return a hash of all that is in a file or a folder, None where there is nothing."""
    if not path.exists():
        return None
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        if file.is_file():
            digest.update(str(file.relative_to(path)).encode() + file.read_bytes())
    return digest.hexdigest()


def whole(path, before, reads):
    """Whether an output is what it was, or what it is to become."""
    if state(path) == before:
        return True
    if path.is_dir() and not (path / "normswap.json").exists():
        return before is None  # a run that goes on
    try:
        reads(path)
    except Exception as error:
        print(f"  {path.name}: {error}", file=sys.stderr)
        return False
    return True


def tried(folder, name, *, overwrite, limit):
    """Kill a command at each change; return how many there were, and how many went wrong."""
    arguments, output, reads = commands(folder)[name]
    at, wrong, old = 0, 0, folder / f"old-{name.split()[0]}"
    if not old.exists():
        assert forked(lambda: run([*arguments, flag(name), old.with_name(f"old-{output}")])) == 0
        os.replace(old.with_name(f"old-{output}"), old)
    while limit is None or at < limit:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            path = Path(place) / output
            if overwrite:
                (shutil.copytree if old.is_dir() else shutil.copy2)(old, path)
            before = state(path)
            given = [*arguments, flag(name), path, *(["--overwrite"] if overwrite else [])]
            ended = forked(dying(at, given))
            if ended != -signal.SIGKILL:
                return at, wrong + (ended != 0)
            fine = whole(path, before, reads)
            again = [*given, "--overwrite"] if path.exists() and not overwrite else given
            fine &= forked(lambda again=again: run(again)) == 0 and os.listdir(place) == [output]
            if not fine:
                print(f"  {name}{' --overwrite' if overwrite else ''}: wrong after change {at}: {os.listdir(place)}")
            wrong += not fine
        at += 1
    return at, wrong


def cli():
    """Print a line for each command: its changes of the disk, and after how many of them a kill did harm."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="COMMAND")
    parser.add_argument("--limit", type=int, help="at most so many changes of each command")
    options, bad = parser.parse_args(), 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        made(folder)
        for name in options.names or commands(folder):
            for overwrite in (False, True):
                changes, wrong = tried(folder, name, overwrite=overwrite, limit=options.limit)
                print(f"{name}{' --overwrite' if overwrite else ''}: {changes} changes, {wrong} wrong", flush=True)
                bad += wrong
    return bad > 0


if __name__ == "__main__":
    sys.exit(cli())
