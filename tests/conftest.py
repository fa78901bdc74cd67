"""What every test gets: fixed seeds, and small models in `tests.torch` and `tests.keras`."""

import pytest


def pytest_collection_modifyitems(items):
    """Mark the tests of each framework's folder."""
    for item in items:
        parts = item.path.parts
        for framework in ("torch", "keras"):
            if parts[-2] == framework:
                item.add_marker(getattr(pytest.mark, framework))
