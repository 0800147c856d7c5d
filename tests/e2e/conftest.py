"""Servers shared by the end-to-end tests; each is started once, when the first test asks for it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.servers import Server, launcher, router, running, stock
from tests.e2e.traffic import Pair


@dataclass
class Trio:
    """Prefill, TPLA decode with two ranks, router."""

    prefill: Server
    decode: Server
    router: Server

    @property
    def pair(self) -> Pair:
        return Pair(self.prefill, self.decode)


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="session")
def trio(nano_mla: str, nano_artifact: str, logs: Path) -> Iterator[Trio]:
    prefill = launcher("prefill", nano_mla, logs / "prefill.log", "--chunked-prefill-size", "512")
    layout = ("--tp", "2", "--tpla-groups", "2", "--tpla-artifact", nano_artifact)
    decode = launcher("decode", nano_mla, logs / "decode.log", *layout)
    front = router(logs / "router.log", prefill, decode)
    with running(prefill, decode), running(front):
        yield Trio(prefill, decode, front)


@pytest.fixture(scope="session")
def reference(nano_mla: str, logs: Path) -> Iterator[Server]:
    """Start stock SGLang: plain MLA, one process."""
    server = stock(nano_mla, logs / "stock.log", "--chunked-prefill-size", "512")
    with running(server):
        yield server
