"""Start two of one command at once, into one new output: exactly one of them wins, and the other says so.

``python benchmarks/races.py`` does so 50 times for each command. Both processes are forked with everything imported and
let go by one pipe. Wrong is where both end well or neither does, where the loser ends as anything but an output that is
there (exit code 2), where the output cannot be read, or where anything else is left. About a second a race.
"""

import argparse
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

from kills import commands, flag, made, run


def raced(arguments):
    """Run a command twice at once and return both exit codes and texts."""
    gate, opened = os.pipe()
    told = [os.pipe() for _ in range(2)]
    children = []
    for _, write in told:
        child = os.fork()
        if not child:
            os.close(opened)
            os.read(gate, 1)  # until there is nobody left to write
            code, text = 1, ""
            try:
                code, text = run(arguments)
            finally:
                os.write(write, text.encode()[-4000:])
                os._exit(code)
        children.append(child)
        os.close(write)
    os.close(gate)
    os.close(opened)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    texts = []
    for read, _ in told:
        with open(read, encoding="utf-8") as pipe:
            texts.append(pipe.read())
    return codes, texts


def tried(folder, name, times):
    """Race a command; return how often it went wrong, and what the losers said."""
    arguments, output, reads = commands(folder)[name]
    wrong, said = 0, Counter()
    for _ in range(times):
        with tempfile.TemporaryDirectory(dir=folder) as place:
            path = Path(place) / output
            codes, texts = raced([*arguments, flag(name), path])
            fine = sorted(codes) == [0, 2] and os.listdir(place) == [output]
            if fine:
                reads(path)
                loser = texts[codes.index(2)].strip()
                said[loser.replace(place, "…").splitlines()[-1]] += 1
                fine = str(path) in loser
            if not fine:
                print(f"  {name}: {codes}, left {os.listdir(place)}", *texts, sep="\n", file=sys.stderr)
            wrong += not fine
    return wrong, said


def cli():
    """Print a line for each command, and what the losers said."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="COMMAND")
    parser.add_argument("--times", type=int, default=50, help="races of each command (default: 50)")
    options, bad = parser.parse_args(), 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        made(folder)
        for name in options.names or commands(folder):
            wrong, said = tried(folder, name, options.times)
            print(f"{name}: {options.times} races, {wrong} wrong", flush=True)
            for text, times in said.most_common():
                print(f"  {times} x {text}", flush=True)
            bad += wrong
    return bad > 0


if __name__ == "__main__":
    sys.exit(cli())
