"""The plan as the command line shows it: tables that fit a screen for people, everything as JSON."""

import json

import pytest
import torch
from click.testing import CliRunner

from normswap.cli import main

CODE = """
from torch import nn

def build():
    shared = nn.BatchNorm2d(8)
    model = nn.Sequential(shared, nn.BatchNorm2d(8, track_running_stats=False), shared, nn.BatchNorm2d(8),
                          nn.BatchNorm2d(8, track_running_stats=False), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                          nn.BatchNorm1d(8))
    model.pretrained_cfg = {"input_size": (8, 4, 4)}
    return model

def deep():
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.Sequential(nn.BatchNorm2d(16), nn.BatchNorm2d(8)) for _ in range(15))
    model.blocks[14][1] = nn.Identity()
    model.stem = nn.ModuleDict({"bn": nn.BatchNorm2d(8)})
    return model
"""

INSPECTED = """\
5 BatchNorms in net.py:build
name   type         C  shape  sn    gn    in
-----------------------------------------------
0 = 2  BatchNorm2d  8  4x4    0.03  0.19  0.42
1      BatchNorm2d  8  4x4
3      BatchNorm2d  8  4x4    0.03  0.19  0.42
4      BatchNorm2d  8  4x4
7      BatchNorm1d  8         0.02  0.19
expected change of the layer's output, as a share of its root mean square,
if it becomes sn, gn or in; brn changes nothing
next: normswap patch net.py:build --to sn -o build-sn
"""

PLANNED = """\
plan for net.py:build
name   type         C  shape  becomes      drift  folds  note
------------------------------------------------------------------
0 = 2  BatchNorm2d  8  4x4    gn groups=2  0.24   no
1      BatchNorm2d  8  4x4    (refused)                  [1]
3      BatchNorm2d  8  4x4    (left)                     excluded
4      BatchNorm2d  8  4x4    (refused)                  [1]
7      BatchNorm1d  8         gn groups=2  0.24   no     [2]
[1] it keeps no running statistics to carry over
[2] only 4 values per group: expect noisy statistics
drift: expected change of the layer's output, as a share of its root mean square
error: expected BatchNorms that can be replaced, received 2 that cannot:
  1 (BatchNorm2d): it keeps no running statistics to carry over
  4 (BatchNorm2d): it keeps no running statistics to carry over
leave such a layer as it is with --exclude NAME, have it keep them (track_running_stats=True) and run the model on \
images in training mode first, or copy gamma and beta by --include '*' and train the model
"""

DEEP = """\
30 BatchNorms in net.py:deep
name                      C   sn    gn    in
-----------------------------------------------
blocks.*.0 (15)           16  0.01  0.17  0.42
blocks.*.1, stem.bn (15)  8   0.01  0.19  0.42
expected change of the layer's output, as a share of its root mean square,
if it becomes sn, gn or in; brn changes nothing
largest as sn: blocks.0.1 0.01, blocks.1.1 0.01, blocks.2.1 0.01
largest as gn: blocks.0.1 0.19, blocks.1.1 0.19, blocks.2.1 0.19
largest as in: blocks.0.0 0.42, blocks.0.1 0.42, blocks.1.0 0.42
all are BatchNorm2d; --all shows every layer
next: normswap patch net.py:deep --weights 'my net.pth' --to sn -o deep-sn
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that runs a command in a folder with a network and returns exit code, stdout and stderr lines."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(CODE)

    def invoke(*arguments):
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        lines = "".join(f"{line.rstrip()}\n" for line in result.stderr.splitlines())
        return result.exit_code, result.stdout, lines

    return invoke


def test_inspect(run):
    """Every site with its other names and what it is expected to cost by target."""
    assert run("inspect", "net.py:build") == (0, "", INSPECTED)


def test_dry_run(run, tmp_path):
    """What becomes of each site, its cost, whether it folds, and why; what several notes say is a footnote.

    A plan that cannot be carried out is shown whole.
    """
    code, out, err = run("patch", "net.py:build", "--to", "gn", "--groups", 2, "--exclude", "3", "--dry-run")

    assert (code, out, err) == (4, "", PLANNED)
    code, _, err = run(
        *("patch", "net.py:build", "--to", "gn", "--groups", 2, "--exclude", "3", "--exclude", "[14]", "--dry-run")
    )
    assert (code, err.splitlines()[-1]) == (
        0,
        "next: normswap patch net.py:build --to gn --groups 2 --exclude 3 --exclude '[14]' -o build-gn",
    )
    assert [path.name for path in tmp_path.iterdir() if path.name != "__pycache__"] == ["net.py"]


def test_mixed_rules(run, tmp_path):
    """A file of rules gives each site its own target, in the table and as data."""
    rules = [
        {"match": "0", "target": "brn"},
        {"match": "[147]", "target": "leave"},
        {"target": {"kind": "sn", "start": "exact", "batch_statistics": "frozen"}},
    ]
    (tmp_path / "rules.json").write_text(json.dumps({"schema_version": 1, "rules": rules}))
    arguments = ["patch", "net.py:build", "--recipe", "rules.json", "--dry-run"]
    plan = json.loads(run(*arguments, "--json")[1])["plan"]
    code, _, err = run(*arguments)

    assert [(row["name"], row["action"], row["drift"], row["folds"], row["note"]) for row in plan] == [
        ("0", "replace", 0.0, False, ""),
        ("1", "skip", None, None, "left by rule 2"),
        ("3", "replace", 0.0, False, ""),
        ("4", "skip", None, None, "left by rule 2"),
        ("7", "skip", None, None, "left by rule 2"),
    ]
    assert code == 0
    assert "\n3      BatchNorm2d  8  4x4    sn start=exact batch_statistics=frozen  0.00   no\n" in err
    assert err.endswith("next: normswap patch net.py:build --recipe rules.json -o build-patched\n")
    assert max(map(len, err.splitlines())) <= 100


def test_a_deep_network(run, tmp_path):
    """Layers that say the same are one row, with the worst by name and the command to type next; --all shows each."""
    namespace = {}
    exec(CODE, namespace)
    torch.save(namespace["deep"]().state_dict(), tmp_path / "my net.pth")
    arguments = ["inspect", "net.py:deep", "--weights", "my net.pth"]
    code, out, err = run(*arguments)
    every = run(*arguments, "--all")[2]

    assert (code, out, err) == (0, "", DEEP)
    assert len(every.splitlines()) == 3 + 30 + 3
    assert "blocks.14.0" in every
    assert len(json.loads(run(*arguments, "--json")[1])["sites"]) == 30


def test_what_is_patched_is_told_to_be_exported(run, tmp_path):
    """After `patch` come training and export, after `inspect` of a bundle export."""
    code, _, err = run("patch", "net.py:deep", "--to", "gn", "-o", "my gn")

    assert (code, err.splitlines()[-2:]) == (
        0,
        [
            "next: normswap finetune 'my gn' --data DATA -o 'my gn-tuned'",
            "next: normswap export 'my gn' -o 'my gn.onnx'",
        ],
    )
    assert run("inspect", "my gn")[2].splitlines()[-1] == "next: normswap export 'my gn' -o 'my gn.onnx'"


@pytest.mark.parametrize("target", ["in", "sn"])
def test_a_plan_that_cannot_be_carried_out(run, target):
    """It is shown whole, and the exit code is the refusal's, in one JSON object too."""
    arguments = ["patch", "net.py:build", "--to", target, "--dry-run"]
    arguments += ["--batch-statistics", "frozen"] if target == "sn" else []
    code, out, _ = run(*arguments, "--json")
    told = json.loads(out)
    shown = run(*arguments)

    assert (code, told["exit_code"], shown[0]) == (4, 4, 4)
    refused = ["1", "4", "7"] if target == "in" else ["1", "4"]
    assert [row["name"] for row in told["plan"] if row["action"] == "refuse"] == refused
    assert shown[2].count("(refused)") == len(refused)
    assert shown[2].endswith(f"error: {told['error']}\n")
    assert told["error"].startswith(f"expected BatchNorms that can be replaced, received {len(refused)} that cannot:\n")
