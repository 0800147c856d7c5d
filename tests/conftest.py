"""The fixtures of all tests, and the tests that must share a process when several processes share the work."""

import os
from pathlib import Path
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # before anyone imports torch: threads that spin starve the other workers
    os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent


@pytest.hookimpl(optionalhook=True)  # a GPU machine may lack pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Tests of one file share fixtures, and those on real servers share the servers and the memory for them.

    Not with ``--dist loadgroup``: its groups are lost under pytest 9.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByServers(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file.rpartition("/")[0] if file.startswith("tests/e2e/") else file

    return ByServers(config, log)


@pytest.fixture(scope="session")
def nano_mla() -> str:
    """Folder of the shipped checkpoint."""
    return str(ROOT / "examples" / "nano-mla")


@pytest.fixture(scope="session")
def sketched_artifact() -> str:
    """The shipped artifact of sketched rows: g 2."""
    return str(ROOT / "examples" / "artifacts" / "nano-mla-g2-sketched.safetensors")


@pytest.fixture(scope="session")
def nano_artifact() -> str:
    """The shipped artifact for it: g 2, transform ``learned``."""
    return str(ROOT / "examples" / "artifacts" / "nano-mla-g2.safetensors")
