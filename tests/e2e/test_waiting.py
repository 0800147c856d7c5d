"""Real servers: prompts that one side cannot take, and requests without their other half, end at once on both sides."""

import concurrent.futures
import contextlib
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from sglang_tpla.reference_model.forward import PlainModel
from tests.e2e.model_answers import said_and_due
from tests.e2e.servers import Pair, Server, launcher, request_body, router, running, wait_idle
from tests.ports import free_ports

CONTEXT_TOKENS, POOL_TOKENS, RESERVED_TOKENS = 1024, 1200, 512
ROOM_TIMEOUT_S = 8  # the default is 15, for machines with more to do
SOON_S = 60  # far from the deadline of a transfer, 120 s, also on a busy machine


@pytest.fixture(scope="module")
def pair(nano_mla: str, logs: Path) -> Iterator[Pair]:
    """A prefill server of two nodes with a short context, and a decode server with a small cache.

    One of the nodes cuts chunks differently and has no shared memory.
    """
    ports = free_ports(6)
    node = ("--tp", "2", "--nnodes", "2", "--dist-init-addr", f"127.0.0.1:{ports[4]}", "--context-length",
            str(CONTEXT_TOKENS), "--disaggregation-bootstrap-port", str(ports[1]), "--tpla-room-timeout-s",
            str(ROOM_TIMEOUT_S))  # fmt: skip
    servers = [
        launcher("prefill", nano_mla, ports[0], logs / "node-0.log", *node, "--node-rank", "0"),
        launcher("prefill", nano_mla, ports[3], logs / "node-1.log", *node, "--node-rank", "1",
                 "--tpla-chunk-bytes", "4096", "--tpla-staging-bytes", "65536", "--tpla-shared-memory", "0"),
        launcher("decode", nano_mla, ports[2], logs / "small-decode.log", "--max-total-tokens", str(POOL_TOKENS),
                 "--num-reserved-decode-tokens", str(RESERVED_TOKENS), "--enable-custom-logit-processor"),
    ]  # fmt: skip
    prefill, node, decode = servers
    with contextlib.ExitStack() as stack:
        stack.callback(node.stop)
        node.start()  # the second node serves no HTTP
        stack.enter_context(running(prefill, decode))
        yield Pair(prefill, ports[1], decode)


def both(pair: Pair, tokens: int, **changes: Any) -> tuple[httpx.Response, httpx.Response, float]:
    """Return the answers to a prompt of so many tokens, and the seconds until both had come."""
    start = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(half, server, pair, tokens, **changes) for server in (pair.prefill, pair.decode)]
        prefill, decode = (answer.result() for answer in asked)
    pair.next_room += 1
    return prefill, decode, time.monotonic() - start


def half(server: Server, pair: Pair, tokens: int, **changes: Any) -> httpx.Response:
    body: dict[str, Any] = request_body([7 + n % 50 for n in range(tokens)], 4)
    place = {"bootstrap_host": "127.0.0.1", "bootstrap_port": pair.bootstrap}
    return server.post("/generate", body | place | {"bootstrap_room": pair.next_room} | changes)


def test_nodes_that_cut_chunks_differently_serve(pair: Pair, nano_mla: str) -> None:
    """The answers are the plain model's, from pages that other requests have written before."""
    model = PlainModel(nano_mla)
    for first, length in ((7, 600), (100, 333), (300, 600)):
        ids = [first + n % 50 for n in range(length)]
        said, due = said_and_due(pair, model, ids, 12, None)
        assert (said - due).abs().max() < 1e-3, (length, said, due)


def test_a_prompt_above_the_context_of_prefill(pair: Pair) -> None:
    prefill, decode, seconds = both(pair, CONTEXT_TOKENS + 1)
    assert (prefill.status_code, decode.status_code) == (400, 400)
    assert f"{CONTEXT_TOKENS + 1} tokens" in decode.text, decode.text
    assert seconds < SOON_S


# A field that only decode's flags allow: a class of SGLang's own, as a pickle that names it.
NAMED = b"csglang.srt.sampling.custom_logit_processor\nDisallowedTokensLogitsProcessor\n."
PROCESSOR = {"custom_logit_processor": json.dumps({"callable": NAMED.hex()})}
WHY = "not configured to enable custom logit processor"


def test_what_prefill_alone_refuses_is_answered_with_its_reason(pair: Pair) -> None:
    prefill, decode, _ = both(pair, 20, **PROCESSOR)
    assert (prefill.status_code, decode.status_code) == (400, 400), decode.text
    assert f"the prefill server refused the request: The server is {WHY}" in decode.text, decode.text
    place = [7000 + pair.next_room, 7001 + pair.next_room]
    batch: dict[str, Any] = {"input_ids": [[5, 6], [7, 8]], "bootstrap_room": place}
    prefill, decode, _ = both(pair, 20, **PROCESSOR, **batch)
    assert (prefill.status_code, decode.status_code) == (400, 400) and WHY in decode.text, decode.text
    wait_idle(pair.prefill, pair.decode, timeout_s=ROOM_TIMEOUT_S / 2)  # decode heard of each room, not only the first
    assert [answer.status_code for answer in both(pair, 20)[:2]] == [200, 200]


def test_refusals_of_one_side_do_not_close_the_service(pair: Pair, logs: Path) -> None:
    """The router would retry a 500, and after several of them it would give up the server for everyone."""
    front = router(free_ports(1)[0], logs / "one-sided-router.log", pair.prefill.url, pair.bootstrap, pair.decode.url)
    with running(front):
        body = request_body([5, 6, 7], 4)
        long = request_body([7] * (CONTEXT_TOKENS + 1), 4)
        longer = request_body([7] * (POOL_TOKENS - RESERVED_TOKENS + 1), 4)
        for wrong in (body | PROCESSOR, long, longer):
            for _ in range(6):  # more than the router's failures before it opens a circuit
                answer = front.post("/generate", wrong)
                assert answer.status_code == 400, answer.text
        assert front.post("/generate", body).status_code == 200


def test_a_prompt_that_never_fits_beside_what_decode_reserves(pair: Pair) -> None:
    tokens = POOL_TOKENS - RESERVED_TOKENS + 1
    prefill, decode, seconds = both(pair, tokens)
    assert decode.status_code == 400, decode.text
    assert f"takes at most {POOL_TOKENS - RESERVED_TOKENS}" in decode.text
    assert prefill.status_code == 400 and f"{tokens} tokens" in prefill.text, prefill.text
    assert seconds < SOON_S
    assert [answer.status_code for answer in both(pair, 20)[:2]] == [200, 200]


def test_a_request_that_no_decode_server_got(pair: Pair) -> None:
    start = time.monotonic()
    answer = half(pair.prefill, pair, 20)
    pair.next_room += 1
    assert answer.status_code >= 400
    assert f"no decode rank has asked for this room within {ROOM_TIMEOUT_S} s" in answer.text, answer.text
    assert time.monotonic() - start < SOON_S


def test_a_request_that_prefill_never_got(pair: Pair) -> None:
    """No other request arrives at prefill that would show that this one was passed over."""
    start = time.monotonic()
    answer = half(pair.decode, pair, 20)
    pair.next_room += 1
    assert f"no prefill request opened this room within {ROOM_TIMEOUT_S} s" in answer.text, answer.text
    assert time.monotonic() - start < SOON_S


@pytest.mark.slow
def test_a_decode_server_that_is_told_to_end_behind_the_router(pair: Pair, logs: Path) -> None:
    """Requests that the router still sends there fail with a reason long before the deadline.

    This test must be the last one of the file.
    """
    front = router(free_ports(1)[0], logs / "ended-router.log", pair.prefill.url, pair.bootstrap, pair.decode.url)
    with running(front):
        body = request_body([5, 6, 7], 4)
        assert front.post("/generate", body).status_code == 200
        assert pair.decode.process is not None
        pair.decode.process.send_signal(signal.SIGTERM)
        # Requests are served until the server stops listening; afterwards the router refuses them.
        assert front.post("/generate", body).status_code in (200, 502, 503)
        pair.decode.process.wait(60)
        start = time.monotonic()
        answer = front.post("/generate", body)
        assert time.monotonic() - start < SOON_S, answer.text
        # The router finds out by itself: no server is left after its attempts, or the connection is refused.
        assert answer.status_code in (502, 503) and "decode" in answer.text, answer.text
        wait_idle(pair.prefill)
