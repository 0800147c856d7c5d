"""Bootstrap servers that are silent, or lie: requests that name them fail, and all others are served."""

import concurrent.futures
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlparse

import pytest

from tests.e2e.faulty import PROMPTS, TOKENS, Faulty
from tests.e2e.traffic import Load, Route, client

SERVER = {
    "attn_tp_size": 1, "attn_cp_size": 1, "dp_size": 1, "pp_size": 1, "page_size": 1, "kv_cache_dtype": None,
    "follow_bootstrap_room": True,
}  # fmt: skip
RANK = {"rank_ip": "127.0.0.1", "rank_port": 9}


@pytest.fixture
def liar() -> Iterator[ThreadingHTTPServer]:
    """Start a bootstrap server that says whatever ``server`` and ``rank`` hold."""

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            query = parse_qs(urlparse(self.path).query)
            said = liar.server if query.get("target_tp_rank") == ["-1"] else liar.rank  # type: ignore[attr-defined]
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(said).encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as liar:
        thread = threading.Thread(target=liar.serve_forever)
        thread.start()
        yield liar
        liar.shutdown()
        thread.join()


def ask_decode(faulty: Faulty, port: int) -> str:
    """Return why a request that names this bootstrap server fails on the decode server; prefill never hears of it."""
    body = Route(faulty.prefill, port, faulty.decode).body(PROMPTS[0], TOKENS)
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
    faulty: Faulty, liar: Any, server: Any, rank: Any, said: str
) -> None:
    """A client may choose any bootstrap server, which must not end the decode server."""
    liar.server, liar.rank = server, rank
    assert said in ask_decode(faulty, liar.server_address[1])
    answer = faulty.route.ask(PROMPTS[0], TOKENS)
    assert answer.same_text(faulty.expected["decode"][0]), answer


def test_a_silent_bootstrap_server_delays_no_other_request(faulty: Faulty) -> None:
    """The bootstrap server takes connections and says nothing: other requests go on, and the one that waits fails."""
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
