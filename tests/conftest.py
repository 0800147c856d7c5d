"""What every test may use."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def nano_mla() -> str:
    """Folder of the shipped checkpoint."""
    return str(ROOT / "examples" / "nano-mla")


@pytest.fixture(scope="session")
def nano_artifact() -> str:
    """The shipped artifact for it: g 2, transform ``learned``."""
    return str(ROOT / "examples" / "artifacts" / "nano-mla-g2.safetensors")
