"""The house: what lies at the root, what is installed, and what an import costs."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = ("pydantic", "torch", "keras", "tensorflow", "onnx", "onnxruntime", "numpy", "rich")


def declared():
    """Return the packages the build configuration names."""
    return set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])


def test_every_subpackage_is_declared():
    """A folder with an __init__.py that is not declared would be left out of the wheel without a word."""
    skipped = {"tests", "benchmarks", "build", "dist"}
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


FLOW = [
    *(
        "errors",
        "formats",
        "layers",
        "convert",
        "models",
        "frameworks",
        "sources",
        "data",
        "patchers",
        "bundles",
        "finetune",
    ),
    *("verification", "export", "interop", "report", "demo", "reproduce", "console", "commands"),
]
"""The rooms from the first in the way of the data to the last."""


def rooms_used(code, package):
    """The rooms that a file in ``package``, such as ``("export", "torch")``, imports: however the import is written."""
    for node in ast.walk(ast.parse(code)):
        names = []
        if isinstance(node, ast.ImportFrom):
            inside = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*("normswap", *inside)[: None if node.level else 0], *filter(None, [node.module])))
            names = [f"{module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in DYNAMIC:
            told = [part for part in ast.walk(node.args[0]) if isinstance(part, ast.Constant)] if node.args else []
            text = "".join(str(part.value) for part in told)
            inside = package[: len(package) - (len(text) - len(text.lstrip("."))) + 1] if text.startswith(".") else ()
            names = [".".join(("normswap", *inside, text.lstrip("."))) if text.startswith(".") else text]
        for name in names:
            if name.startswith("normswap."):
                yield name.split(".")[1]


DYNAMIC = ("import_module", "__import__")


@pytest.mark.parametrize(
    "code",
    [
        "from ..commands import patch",
        "from ..commands.patch import patch",
        "from .. import commands",
        "import normswap.commands.patch",
        "from normswap.commands import patch",
        "def late():\n    from ..commands.patch import patch",
        'import_module("..commands.patch", __package__)',
        'importlib.import_module(f"..commands.{name}", __package__)',
        '__import__("normswap.commands.patch")',
    ],
)
def test_the_flow_sees_every_import(code):
    """An import counts however it is written, also one of a name that is made up at run time."""
    assert set(rooms_used(code, ("export",))) == {"commands"}


def test_data_flows_in_one_direction():
    """A folder uses those before it in the flow, never a later one; layers and convert use none."""
    backwards = []
    for folder in FLOW[1:]:
        for file in (path for path in [ROOT / f"{folder}.py", *(ROOT / folder).rglob("*.py")] if path.exists()):
            path = file.relative_to(ROOT)
            allowed = (
                FLOW[: FLOW.index(folder) + 1] if folder not in ("layers", "convert") else ["errors", "formats", folder]
            )
            used = set(rooms_used(file.read_text(), path.parts[:-1])) & set(FLOW)
            backwards += [f"{path} uses {room}" for room in sorted(used - set(allowed))]

    assert backwards == []


@pytest.mark.parametrize(
    "statement",
    [
        "import normswap",
        "import normswap.cli",
        "import normswap.models",
        "from normswap import GroupNorm",
        "import normswap.finetune; dir(normswap.finetune)",
        "from normswap.finetune import Freeze, GateSchedule, Hooks, Settings, Statistics",
    ],
)
def test_importing_loads_no_framework(statement):
    """The package and its command line answer without a framework; configurations and hooks need none either."""
    heavy = [name for name in HEAVY if not (name == "numpy" and "from" in statement)]
    code = f"import sys; {statement}; print([name for name in {heavy} if name in sys.modules])"

    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert result.stdout.strip() == "[]"


def test_public_names_resolve():
    """Each name in __all__ is there, and a function never hides a subpackage of its name."""
    import normswap

    assert sorted(normswap.__all__) == normswap.__all__
    assert all(getattr(normswap, name) is not None for name in ("GroupNorm", "Recipe", "patch", "plan"))
    assert not {"convert", "export", "finetune", "layers", "patchers", "sources"} & set(normswap.__all__)


@pytest.mark.torch
def test_public_names_of_finetune_resolve():
    """What fine-tunes is one level below the root, listed by dir(), each name as it is called where it is written."""
    import normswap.finetune

    assert normswap.finetune.__all__ == sorted(normswap.finetune.__all__)
    assert set(normswap.finetune.__all__) <= set(dir(normswap.finetune))
    for name in normswap.finetune.__all__:
        assert getattr(normswap.finetune, name).__name__ == name


def test_an_unknown_name_says_so():
    """A misspelt public name is an AttributeError like any module's."""
    import normswap.finetune

    with pytest.raises(AttributeError, match="^module 'normswap' has no attribute 'pacth'$"):
        _ = normswap.pacth
    with pytest.raises(AttributeError, match="^module 'normswap.finetune' has no attribute 'Frieze'$"):
        _ = normswap.finetune.Frieze
