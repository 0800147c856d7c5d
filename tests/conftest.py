"""What every test may use, and which tests must run in one process when several share the work."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of one file share fixtures, and those on real servers share the servers and the memory for them."""
    for item in items:
        place = item.path.relative_to(ROOT / "tests")
        group = place.parts[0] if place.parts[0] == "e2e" else str(place)
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def nano_mla() -> str:
    """Folder of the shipped checkpoint."""
    return str(ROOT / "examples" / "nano-mla")


@pytest.fixture(scope="session")
def nano_artifact() -> str:
    """The shipped artifact for it: g 2, transform ``learned``."""
    return str(ROOT / "examples" / "artifacts" / "nano-mla-g2.safetensors")
