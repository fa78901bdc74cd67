"""The seam between the frameworks: contracts that mypy and a reader see through, and pairs of files that keep them."""

import ast
import inspect
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from normswap.export.contract import Tracer
from normswap.finetune.calibration.contract import CalibrationLayers
from normswap.finetune.hooks.contract import Adapter
from normswap.finetune.run.contract import Readings, Trainer
from normswap.frameworks.contract import Framework
from normswap.patchers.contract import NormPatcher, Patcher
from normswap.sources.weights import Weights

ROOT = Path(__file__).parent.parent
OUTSIDE = {".venv", "build", "dist", "tests", "benchmarks", "examples"}
OF_THE_USERS_CHOICE = {"__init__.py", "sources/code.py", "sources/zoo.py", "finetune/__init__.py"}
"""Files that import what a name chosen at run time says: public names, a user's module, a zoo."""


def sources():
    """Every file of the package, with its path from the root."""
    files = (file.relative_to(ROOT) for file in ROOT.rglob("*.py"))
    return sorted(file for file in files if not OUTSIDE & set(file.parts))


def signatures(path):
    """The parameters of every public function and of the methods of every public class in a file, by name."""
    found = {}
    for node in ast.parse((ROOT / path).read_text()).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            found[node.name] = parameters(node)
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
            found[node.name] = {m.name: parameters(m) for m in methods if not m.name.startswith("_")}
    return found


def parameters(function):
    """Names, kinds and defaults of a function's parameters, without `self`."""
    arguments = function.args
    positional = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args) if argument.arg != "self"]
    keyword = [argument.arg for argument in arguments.kwonlyargs]
    defaults = [None if default is None else ast.unparse(default) for default in arguments.kw_defaults]
    return positional, keyword, [ast.unparse(default) for default in arguments.defaults], defaults


PAIRS = [
    (path, Path(*("keras" if part == "torch" else part for part in path.parts)))
    for path in sources()
    if "torch" in path.parts[:-1]
    and path.parts[0] != "layers"  # which people import by their own frameworks' names
    and path.name != "__init__.py"
    and (ROOT / Path(*("keras" if part == "torch" else part for part in path.parts))).exists()
]


@pytest.mark.parametrize(("torch", "keras"), PAIRS, ids=[str(torch) for torch, _ in PAIRS])
def test_files_of_one_name_have_the_same_functions(torch, keras):
    """What a room needs of a framework has one name and signature in both, whether a contract lists it or not.

    Of classes that are the same idea the methods that both have are alike; how one is made may differ.
    """
    one, other = signatures(torch), signatures(keras)
    assert sorted(one) == sorted(other)
    for name, signature in one.items():
        if isinstance(signature, dict):
            shared = signature.keys() & other[name].keys()
            assert {n: signature[n] for n in shared} == {n: other[name][n] for n in shared}, name
        else:
            assert signature == other[name], name


CONTRACTS = [
    (Framework, "frameworks.{}"),
    (Weights, "sources.{}.weights"),
    (Patcher, "patchers.{}.patch"),
    (NormPatcher, "patchers.{}.way_back"),
    (CalibrationLayers, "finetune.calibration.{}.layers"),
    (Adapter, "finetune.hooks.{}"),
    (Trainer, "finetune.run.{}.trainer"),
    (Readings, "finetune.run.{}.figures"),
    (Tracer, "export.{}.trace"),
]


@pytest.mark.parametrize(("contract", "module"), CONTRACTS, ids=[module.format("*") for _, module in CONTRACTS])
@pytest.mark.parametrize(
    "framework", [pytest.param("torch", marks=pytest.mark.torch), pytest.param("keras", marks=pytest.mark.keras)]
)
def test_both_frameworks_keep_the_contract(contract, module, framework):
    """Each function of a contract is there, with its parameters' names, kinds and defaults."""
    half = import_module(f"normswap.{module.format(framework)}")
    asked = {name: member for name, member in vars(contract).items() if inspect.isfunction(member) and name[0] != "_"}

    assert asked
    for name, member in asked.items():
        expected = list(inspect.signature(member).parameters.values())[1:]
        found = inspect.signature(getattr(half, name)).parameters.values()
        assert [(p.name, p.kind, p.default) for p in found] == [(p.name, p.kind, p.default) for p in expected], name


def test_no_import_is_hidden_from_mypy():
    """Which framework's half serves a model is decided by imports that are written as such."""
    hidden = []
    for path in sources():
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            named = isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", ""))
            if named in ("import_module", "__import__") and str(path) not in OF_THE_USERS_CHOICE:
                hidden.append(f"{path}:{node.lineno}")

    assert hidden == []


WRONG = {
    "frameworks.detect": "get_framework(1).snapshot(1, nosuch=2)",
    "sources.weights": "load_weights(1, 2, nosuch=2)",
    "patchers.contract": "patcher_of(1).plans(1, [], nosuch=2)",
    "finetune.calibration.contract": "layers_of(1).get_affine(1, nosuch=2)",
    "finetune.hooks.contract": "adapter_of(1).moving_layers(1, nosuch=2)",
    "finetune.run.contract": "trainer_of(1).predict(1, 2, nosuch=2)",
    "export.contract": "tracer_of(1).trace(1, nosuch=2)",
}
"""A call through each contract's module with an argument that no framework takes."""


def test_mypy_refuses_what_no_framework_takes(tmp_path):
    """A call through the seam with an argument that the contract does not have is an error, in every room."""
    modules = [f"normswap.{module}" for module in ("frameworks.contract", *WRONG)]
    for number, (module, call) in enumerate(WRONG.items()):
        function = call.partition("(")[0]
        code = f"from normswap.{module} import {function}\n{call}\n"
        (tmp_path / f"wrong_{number}.py").write_text(code)
        modules.append(f"wrong_{number}")
    # What the contracts' modules import is left out: `make lint` follows it.
    options = ["--follow-imports", "skip", "--cache-dir", tmp_path / "cache"]
    command = [sys.executable, "-m", "mypy", *options, *(part for name in modules for part in ("-m", name))]
    result = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"MYPYPATH": str(tmp_path)}, capture_output=True, text=True
    )

    refused = [line for line in result.stdout.splitlines() if 'Unexpected keyword argument "nosuch"' in line]
    found = sorted(Path(line.partition(":")[0]).stem for line in refused)
    assert found == [f"wrong_{number}" for number in range(len(WRONG))], result.stdout
