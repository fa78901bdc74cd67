"""What every test gets: fixed seeds, and small models in `tests.torch` and `tests.keras`."""

import gc
import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # as many processes as cores are enough
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True, scope="session")
def _own_state(tmp_path_factory):
    """Have bundles remembered in a folder of this session's, by the commands that tests start too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture
def folder(tmp_path):
    """A folder for models, beside which a secret lies that no model may read."""
    from .onnx_models import WEIGHT

    (tmp_path / "secret.bin").write_bytes(WEIGHT.tobytes())
    (tmp_path / "model").mkdir()
    return tmp_path / "model"


def pytest_collection_modifyitems(items):
    """Mark the tests of each framework's folder, and begin with the files that take long, so that none is left last."""
    for item in items:
        parts = item.path.parts
        for framework in ("torch", "keras"):
            if parts[-2] == framework:
                item.add_marker(getattr(pytest.mark, framework))
    long = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in long)


def pytest_collection_finish(session):
    """Spare the garbage collector the frameworks, which stay: it took a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)
