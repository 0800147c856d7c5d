"""Servers shared by the end-to-end tests; each is started once, when the first test asks for it."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

from tests.e2e.servers import Pair, Server, launcher, router, running, stock
from tests.ports import free_ports


@dataclass
class Trio:
    """Prefill, TPLA decode with two ranks, router."""

    prefill: Server
    decode: Server
    router: Server
    bootstrap: int

    @cached_property
    def pair(self) -> Pair:
        return Pair(self.prefill, self.bootstrap, self.decode)


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="session")
def trio(nano_mla: str, nano_artifact: str, logs: Path) -> Iterator[Trio]:
    ports = free_ports(4)
    prefill = launcher("prefill", nano_mla, ports[0], logs / "prefill.log", "--disaggregation-bootstrap-port",
                       str(ports[1]), "--chunked-prefill-size", "512")  # fmt: skip
    decode = launcher("decode", nano_mla, ports[2], logs / "decode.log", "--tp", "2", "--tpla-groups", "2",
                      "--tpla-artifact", nano_artifact)  # fmt: skip
    front = router(ports[3], logs / "router.log", prefill.url, ports[1], decode.url)
    with running(prefill, decode), running(front):
        yield Trio(prefill, decode, front, ports[1])


@pytest.fixture(scope="session")
def reference(nano_mla: str, logs: Path) -> Iterator[Server]:
    """Start stock SGLang: plain MLA, one process."""
    server = stock(nano_mla, free_ports(1)[0], logs / "stock.log", "--chunked-prefill-size", "512")
    with running(server):
        yield server
