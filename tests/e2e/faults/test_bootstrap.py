"""Bootstrap servers that are silent, or lie: requests that name them fail, and all others are served."""

import concurrent.futures
import json
import socket
from typing import Any
from urllib.parse import parse_qs, urlparse

import pytest

from tests.e2e.faulty import PROMPTS, TOKENS, Faulty
from tests.e2e.traffic import Load, Pair, client
from tests.stub_server import answering

SERVER = {
    "attn_tp_size": 1, "attn_cp_size": 1, "dp_size": 1, "pp_size": 1, "page_size": 1, "kv_cache_dtype": None,
    "follow_bootstrap_room": True,
}  # fmt: skip
RANK = {"rank_ip": "127.0.0.1", "rank_port": 9}


def ask_decode(faulty: Faulty, port: int) -> str:
    """Return why a request that names this bootstrap server fails on the decode server; prefill never hears of it."""
    body = Pair(faulty.prefill, faulty.decode, port).body(PROMPTS[0], TOKENS)
    response = client.post(faulty.decode.url + "/generate", json=body)
    assert response.status_code != 200 or response.json()["meta_info"]["finish_reason"]["type"] == "abort"
    return response.text


@pytest.mark.parametrize(
    ("server", "rank", "said"),
    [
        (SERVER, RANK | {"rank_ip": "192.0.2.1"}, "without keys"),
        (SERVER, [], "must name rank_ip"),
        (SERVER, RANK | {"rank_port": 70000}, "must name rank_ip"),
        (SERVER | {"attn_tp_size": 0}, RANK, "cannot serve this decode server"),
        (SERVER | {"dp_size": 10**9}, RANK, "more than 4096"),
        (SERVER | {"page_size": 64}, RANK, "Page size mismatch"),
    ],
    ids=["far address", "no address", "no port", "no ranks", "too many ranks", "page size"],
)
def test_what_a_bootstrap_server_says_wrong_fails_one_request(
    faulty: Faulty, server: Any, rank: Any, said: str
) -> None:
    """A client may choose any bootstrap server, which must not end the decode server."""

    def lie(path: str, body: bytes) -> tuple[int, bytes]:
        whole = parse_qs(urlparse(path).query).get("target_tp_rank") == ["-1"]
        return 200, json.dumps(server if whole else rank).encode()

    before = faulty.decode.log.stat().st_size
    with answering(lie) as liar:
        reason = ask_decode(faulty, int(liar.rpartition(":")[2]))
    if "another tensor-parallel rank" in reason:  # it failed first, and its reason is in the log
        reason = faulty.decode.log.read_text()[before:]
    assert said in reason
    answer = faulty.route.ask(PROMPTS[0], TOKENS)
    assert answer.same_text(faulty.expected["decode"][0]), answer


def test_a_silent_bootstrap_server_delays_no_other_request(faulty: Faulty) -> None:
    """The bootstrap server accepts connections and says nothing: other requests go on, and the one that waits fails."""
    with (
        socket.create_server(("127.0.0.1", 0), backlog=128) as silent,
        concurrent.futures.ThreadPoolExecutor(1) as pool,
        Load([faulty.route], PROMPTS, faulty.expected, TOKENS) as load,
    ):
        reason = pool.submit(ask_decode, faulty, silent.getsockname()[1]).result()
        assert "rank" in reason or "bort" in reason, reason
        assert load.right["decode"]
    assert not load.failures["decode"], load.failures
    faulty.at_rest()
