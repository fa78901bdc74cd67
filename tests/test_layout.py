"""The house: what lies at the root, what is installed, and what an import costs."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "keras", "tensorflow", "onnx", "onnxruntime", "numpy", "rich")


def declared():
    """Return the packages the build configuration names."""
    return set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])


def test_every_subpackage_is_declared():
    """A folder with an __init__.py that is not declared would be left out of the wheel without a word."""
    skipped = {"tests", "build", "dist"}
    found = {
        ".".join(("normswap", *file.relative_to(ROOT).parent.parts))
        for file in ROOT.rglob("__init__.py")
        if not set(file.relative_to(ROOT).parts) & skipped and ".venv" not in file.parts
    }

    assert found == declared()


def test_the_root_holds_only_what_ships():
    """Every Python file at the root is part of the wheel, so only the package's own may lie there."""
    assert {file.name for file in ROOT.glob("*.py")} == {
        "__init__.py",
        "__main__.py",
        "cli.py",
        "console.py",
        "errors.py",
    }


def test_data_flows_in_one_direction():
    """A folder uses those before it in the flow, never a later one; layers and convert use none."""
    flow = [
        *("errors", "layers", "convert", "frameworks", "sources", "data", "patchers", "bundles", "finetune"),
        *("verification", "export", "interop", "demo", "console", "commands"),
    ]
    backwards = []
    for folder in flow[1:]:
        for file in (ROOT / folder).rglob("*.py"):
            depth = len(file.relative_to(ROOT).parts) - 1
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.ImportFrom) and node.level == depth + 1 and node.module:
                    used = node.module.partition(".")[0]
                    allowed = flow[: flow.index(folder) + 1] if folder not in ("layers", "convert") else ["errors"]
                    if used not in allowed:
                        backwards.append(f"{file.relative_to(ROOT)} uses {used}")

    assert backwards == []


@pytest.mark.parametrize("statement", ["import normswap", "import normswap.cli", "from normswap import GroupNorm"])
def test_importing_loads_no_framework(statement):
    """The package and its command line answer without a framework; configurations need none either."""
    heavy = [name for name in HEAVY if not (name == "numpy" and "GroupNorm" in statement)]
    code = f"import sys; {statement}; print([name for name in {heavy} if name in sys.modules])"

    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert result.stdout.strip() == "[]"


def test_public_names_resolve():
    """Each name in __all__ is there, and a function never hides a subpackage of its name."""
    import normswap

    assert sorted(normswap.__all__) == normswap.__all__
    assert all(getattr(normswap, name) is not None for name in ("GroupNorm", "Recipe", "patch", "plan"))
    assert not {"convert", "export", "finetune", "layers", "patchers", "sources"} & set(normswap.__all__)


def test_an_unknown_name_says_so():
    """A misspelt public name is an AttributeError like any module's."""
    import normswap

    with pytest.raises(AttributeError, match="^module 'normswap' has no attribute 'pacth'$"):
        _ = normswap.pacth
