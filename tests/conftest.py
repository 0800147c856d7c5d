"""The fixtures of all tests, the tests that must share a process when several processes share the work, and the last
stacks of a process that crashed.
"""

import faulthandler
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests import shipped

if "PYTEST_XDIST_WORKER" in os.environ:  # before anyone imports torch: threads that spin starve the other workers
    os.environ.setdefault("OMP_NUM_THREADS", "1")

RUNNER = re.compile(r"/site-packages/(_pytest|pluggy|xdist|execnet)/")  # frames that say nothing of a test
STACKS = pytest.StashKey[Path]()  # the folder of the processes' last stacks


@pytest.hookimpl(trylast=True)  # pytest's own handler writes among the dots of the others
def pytest_configure(config: pytest.Config) -> None:
    """Have a fatal signal's stacks written to a file, from where the summary takes them."""
    if hasattr(config, "workerinput"):
        file = open(Path(config.workerinput["stacks"]) / str(os.getpid()), "w")  # noqa: SIM115 (for the whole run)
        faulthandler.enable(file)
    else:
        config.stash[STACKS] = Path(tempfile.mkdtemp())


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell a process where its stacks belong."""
    node.workerinput["stacks"] = str(node.config.stash[STACKS])


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Show the stacks of the processes that crashed."""
    for file in sorted(config.stash[STACKS].iterdir()):
        if stacks := file.read_text().partition("Extension modules")[0].strip():
            terminalreporter.section(f"last stacks of process {file.name}")
            terminalreporter.write_line("\n".join(line for line in stacks.splitlines() if not RUNNER.search(line)))


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the stacks."""
    if STACKS in config.stash:
        shutil.rmtree(config.stash[STACKS], ignore_errors=True)


@pytest.hookimpl(optionalhook=True)  # a GPU machine may lack pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Tests of one file share fixtures, and those on real servers share the servers and the memory for them; refusals
    come before there is a server.

    Not with ``--dist loadgroup``: its groups are lost under pytest 9.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByServers(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            shared = file.startswith("tests/e2e/") and file != "tests/e2e/test_refusals.py"
            return file.rpartition("/")[0] if shared else file

    return ByServers(config, log)


@pytest.fixture
def key_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keys, named by the environment."""
    from sglang_tpla.transfer import keys
    from sglang_tpla.transfer.network.security import KEYS_VARIABLE

    keys.main([str(tmp_path / "keys")])
    monkeypatch.setenv(KEYS_VARIABLE, str(tmp_path / "keys"))
    return tmp_path / "keys"


@pytest.fixture(scope="session")
def nano_mla() -> str:
    """Folder of the shipped checkpoint."""
    return str(shipped.NANO)


@pytest.fixture(scope="session")
def nano_model() -> Any:
    """The shipped checkpoint in plain PyTorch, float32."""
    from sglang_tpla.reference_model.forward import PlainModel

    return PlainModel(shipped.NANO)


@pytest.fixture(scope="session")
def sketched_artifact() -> str:
    """The shipped artifact of sketched rows: g 2."""
    return str(shipped.SKETCHED_ARTIFACT)


@pytest.fixture(scope="session")
def nano_artifact() -> str:
    """The shipped artifact for it: g 2, transform ``learned``."""
    return str(shipped.ARTIFACT)
