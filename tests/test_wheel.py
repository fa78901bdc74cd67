"""What `pip install normswap` brings: the wheel holds the package and nothing else, and works from where it is put."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from zipfile import ZipFile

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built of a copy of the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    outside = shutil.ignore_patterns(".*", "build", "dist", "site", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, folder / "sources", ignore=outside)
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, folder / "sources")
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel):
    """The function that runs Python, or a script, where the wheel is installed, and returns what it prints."""
    site = wheel.parent / "installed"
    pip("install", "--no-deps", "--no-index", "--target", site, wheel)

    def run(*command):
        environment = {**os.environ, "PYTHONPATH": str(site)}
        done = subprocess.run(
            [sys.executable, *command], cwd=site.parent, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run.site = site
    return run


def pip(*arguments):
    """Run pip, without the network."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_holds_the_package_and_nothing_else(wheel):
    """Every Python file of every folder is in it, a page's template, what node runs, the mark of types; no tests."""
    names = ZipFile(wheel).namelist()
    folders = {name.replace(".", "/") for name in PROJECT["tool"]["setuptools"]["packages"]}
    sources = {
        f"{folder}/{file.name}"
        for folder in folders
        for file in (ROOT / folder.removeprefix("normswap").removeprefix("/")).glob("*.py")
    }
    metadata = f"normswap-{PROJECT['project']['version']}.dist-info/"

    assert {name for name in names if not name.startswith(metadata)} == sources | {
        "normswap/py.typed",
        "normswap/report/page.html",
        "normswap/verification/runtimes/web.cjs",
    }
    assert f"{metadata}licenses/LICENSE" in names


def test_is_imported_from_where_it_is_installed(installed):
    """The package that is imported is the wheel's, not the checkout's."""
    path = Path(installed("-c", "import normswap; print(normswap.__file__)").strip())

    assert path == installed.site / "normswap" / "__init__.py"


@pytest.mark.parametrize("script", [["-m", "normswap"], ["installed/bin/normswap"]], ids=["module", "script"])
def test_tells_its_commands(installed, script):
    """``python -m normswap`` and the script that is installed both show the help."""
    shown = installed(*script, "--help")

    assert shown.startswith("Usage: ")
    assert "patch" in shown
    assert "finetune" in shown


@pytest.mark.torch
def test_the_demo_keeps_its_promise(installed):
    """Installed, the demo runs to the end and keeps its promise on each target."""
    rows = {row["target"]: row for row in json.loads(installed("-m", "normswap", "demo", "--json"))["rows"]}

    assert rows["brn"]["patched"] == rows["brn"]["bn"]
    assert rows["sn"]["patched"] >= rows["sn"]["bn"] - 1
    assert rows["gn (1 group)"]["patched"] >= rows["gn (1 group)"]["copied"] + 20
    assert all(row["onnx"] == row["finetuned"] for row in rows.values())
