"""What `dir` and `help` tell of the package: every public name, with its arguments and an example that runs."""

import doctest
import inspect
import pydoc
import re
import subprocess
import sys

import pytest

import normswap

NEEDS_NOTHING = {"BatchNorm", "BatchRenorm", "GroupNorm", "Inputs", "Rule", "SwitchNorm", "open_data"}
NAMES = [
    pytest.param(name, marks=[] if name in NEEDS_NOTHING else pytest.mark.torch)
    for name in normswap.__all__
    if name != "__version__"
]
NAMES += [pytest.param(f"models.torch.{name}", marks=pytest.mark.torch) for name in ("resnet_v1", "resnet_v2")]
NAMES += [pytest.param("models.torch.wide_resnet", marks=pytest.mark.torch)]
NAMES += [
    pytest.param(name, marks=pytest.mark.keras)
    for name in (
        "layers.keras.group_normalization",
        "models.keras.cifar10_net",
        "models.keras.fashion_mnist_net",
        "models.keras.wide_resnet",
    )
]


def test_dir():
    """All public names are listed before any of them is loaded, and are in `help`."""
    code = "import sys, normswap; print(dir(normswap) == sorted(normswap.__all__), 'numpy' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert result.stdout.split() == ["True", "False"]
    assert {"Recipe", "load", "load_model", "open_data", "patch", "plan", "to_onnx", "verify"} < set(dir(normswap))


@pytest.mark.torch
def test_every_name_is_there():
    """Each has a home, which `help` finds."""
    assert [name for name in dir(normswap) if not hasattr(normswap, name)] == []
    assert "exclude: Leave layers alone" in pydoc.plain(pydoc.render_doc(normswap.patch))


@pytest.mark.parametrize("name", NAMES)
def test_every_argument_is_told(name):
    """Each parameter has a line that says what it is, and of a function what it raises has a section."""
    public = pydoc.locate(f"normswap.{name}")
    doc = inspect.getdoc(public)
    parameters = inspect.signature(public).parameters

    assert [p for p in parameters if not re.search(rf"^    {p}: [A-Z`]", doc, re.MULTILINE)] == []
    assert inspect.isclass(public) or re.search(r"^Raises:\n    \w+Error: ", doc, re.MULTILINE)


@pytest.mark.parametrize("name", NAMES)
def test_every_example_runs(name, tmp_path, monkeypatch):
    """The example in `help` is true as it stands."""
    monkeypatch.chdir(tmp_path)
    doc = inspect.getdoc(pydoc.locate(f"normswap.{name}"))
    test = doctest.DocTestParser().get_doctest(doc.partition("\nExample:\n")[2], {}, name, None, 0)
    said = []

    assert test.examples
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=said.append)
    assert "".join(said) == ""
