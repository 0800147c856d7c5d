"""Servers with keys, on an address of this machine that is not loopback: as in a deployment on several machines."""

import concurrent.futures
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from sglang_tpla.transfer import keys
from tests.e2e.servers import Server, counters, launcher, router, running, wait_idle
from tests.e2e.traffic import Pair

TOKENS = 8
PROMPT = "def fibonacci(n):\n"


def own_address() -> str:
    """Return an IPv4 address of this machine other than loopback, or loopback where there is no other."""
    found = [
        address.address
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family == socket.AF_INET and not address.address.startswith("127.")
    ]
    return found[0] if found else "127.0.0.1"


@dataclass
class Deployment:
    """A prefill server without shared memory, a decode server with the same keys, and one with other keys."""

    prefill: Server
    decode: Server
    stranger: Server
    router: Server


@pytest.fixture(scope="module")
def keyed(nano_mla: str, logs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    folders = [tmp_path_factory.mktemp("keys") for _ in range(2)]
    for folder in folders:
        keys.main([str(folder)])
    log = logs / "keyed-prefill.log"
    prefill = launcher("prefill", nano_mla, log, "--tpla-keys", str(folders[0]), host=own_address())
    prefill.largest_file_bytes = 128 << 20  # less than a segment: all rows go through the data channel
    decode, stranger = (
        launcher("decode", nano_mla, logs / f"{name}.log", "--tpla-keys", str(folder))
        for name, folder in zip(("keyed-decode", "stranger"), folders, strict=True)
    )
    front = router(logs / "keyed-router.log", prefill, decode)
    with running(prefill, decode, stranger), running(front):
        yield Deployment(prefill, decode, stranger, front)


@pytest.mark.slow
def test_answers_come_through_sealed_channels(keyed: Deployment, reference: Server) -> None:
    answer = keyed.router.generate(PROMPT, TOKENS)
    assert answer["output_ids"] == reference.generate(PROMPT, TOKENS)["output_ids"]
    for server in (keyed.prefill, keyed.decode):
        agent = counters(server)
        assert agent["data_channels"] == agent["sealed_channels"] == 1
        assert agent["wire_bytes"] > 0 and agent["shared_memory_bytes"] == 0


@pytest.mark.slow
def test_a_decode_server_with_other_keys_is_refused(keyed: Deployment) -> None:
    """The stranger's request ends with a reason on both sides; the other servers go on."""
    body = Pair(keyed.prefill, keyed.stranger).body(PROMPT, TOKENS)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        prefill, decode = pool.map(lambda server: server.post("/generate", body), (keyed.prefill, keyed.stranger))
    assert decode.status_code >= 500 and "key" in decode.text, decode.text
    assert "no decode rank has asked for this room" in prefill.text, prefill.text
    agent = counters(keyed.prefill)
    assert agent["refused"] >= 1 and agent["peers"] == 1
    assert keyed.router.generate(PROMPT, TOKENS)["output_ids"]
    wait_idle(keyed.prefill, keyed.decode, keyed.stranger)
