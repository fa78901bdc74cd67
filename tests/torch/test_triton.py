"""The GPU's kernels without a GPU: run by Triton's interpreter, and compiled for cards of two makers.

Triton is not installed beside TensorFlow, in whose process it ends: `make test` puts it into a folder of its own, from
which these tests run in processes of theirs.
"""

import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest
import torch

from normswap.layers.torch import gpu

from ..helpers import exactly

ROOT = Path(__file__).parents[2]
TRITON = ROOT / "build" / "triton"
HAS_TRITON = (TRITON / "triton").is_dir()


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRITON, reason="`make build/triton` installs Triton")
@pytest.mark.parametrize(("file", "least", "interpreted"), [("interpreted", 200, "1"), ("ahead_of_time", 6, "0")])
def test_in_a_process(file, least, interpreted, tmp_path):
    """Every test of a file passes, and none is skipped."""
    path = os.pathsep.join([str(TRITON), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_INTERPRET": interpreted}
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--junit-xml", str(tmp_path / "tests.xml")]
    command = [sys.executable, "-m", "pytest", *options, str(Path(__file__).with_name(f"{file}.py"))]
    subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=1800)
    cases = list(ElementTree.parse(tmp_path / "tests.xml").iter("testcase"))

    assert len(cases) >= least
    assert [f"{case.get('name')}: {part.tag}\n{part.text}" for case in cases for part in case] == []


def test_beside_tensorflow(monkeypatch):
    """Triton is not loaded into a process that has TensorFlow, which it would end; what to do is said once."""
    monkeypatch.setattr(gpu, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "tensorflow", ModuleType("tensorflow"))
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    message = (
        "expected Triton to be imported before TensorFlow, received a process that has TensorFlow already, which "
        "Triton would end; normalization runs as torch's own operations, which are slower: import triton first"
    )
    gpu._ready.cache_clear()
    try:
        with pytest.warns(UserWarning, match=exactly(message)):
            assert not gpu._ready(torch.device("cpu"))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not gpu._ready(torch.device("cpu"))
    finally:
        gpu._ready.cache_clear()
