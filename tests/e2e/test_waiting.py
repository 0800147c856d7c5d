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
from tests.e2e.servers import launcher, request_body, router, running, wait_idle
from tests.e2e.traffic import Pair
from tests.ports import free_ports

CONTEXT_TOKENS, POOL_TOKENS, RESERVED_TOKENS = 1024, 1200, 512
ROOM_TIMEOUT_S = 8  # the default is 15, for machines with more to do
SOON_S = 60  # far from the deadline of a transfer, 120 s, also on a busy machine


@pytest.fixture(scope="module")
def pair(nano_mla: str, logs: Path) -> Iterator[Pair]:
    """A prefill server of two nodes with a short context, and a decode server with a small cache.

    One of the nodes cuts chunks differently and has no shared memory.
    """
    both = ("--tp", "2", "--nnodes", "2", "--dist-init-addr", f"127.0.0.1:{free_ports(1)[0]}", "--context-length",
            str(CONTEXT_TOKENS), "--tpla-room-timeout-s", str(ROOM_TIMEOUT_S))  # fmt: skip
    prefill = launcher("prefill", nano_mla, logs / "node-0.log", *both, "--node-rank", "0")
    other = ("--disaggregation-bootstrap-port", str(prefill.bootstrap), "--tpla-chunk-bytes", "4096",
             "--tpla-staging-bytes", "65536", "--tpla-shared-memory", "0")  # fmt: skip
    node = launcher("prefill", nano_mla, logs / "node-1.log", *both, "--node-rank", "1", *other)
    size = ("--max-total-tokens", str(POOL_TOKENS), "--num-reserved-decode-tokens", str(RESERVED_TOKENS))
    decode = launcher("decode", nano_mla, logs / "small-decode.log", *size, "--enable-custom-logit-processor")
    with contextlib.ExitStack() as stack:
        stack.callback(node.stop)
        node.start()  # the second node serves no HTTP
        stack.enter_context(running(prefill, decode))
        yield Pair(prefill, decode)


def prompt(tokens: int) -> list[int]:
    return [7 + n % 50 for n in range(tokens)]


def both(pair: Pair, asked: Any, **changes: Any) -> tuple[httpx.Response, httpx.Response, float]:
    """Return the answers to a prompt, or to a batch of prompts, and the seconds until both had come."""
    start, body = time.monotonic(), pair.body(asked, 4, **changes)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        prefill, decode = pool.map(lambda server: server.post("/generate", body), (pair.prefill, pair.decode))
    return prefill, decode, time.monotonic() - start


def test_nodes_that_cut_chunks_differently_serve(pair: Pair, nano_mla: str) -> None:
    """The answers are the plain model's, from pages that other requests have written before."""
    model = PlainModel(nano_mla)
    for first, length in ((7, 600), (100, 333), (300, 600)):
        ids = [first + n % 50 for n in range(length)]
        said, due = said_and_due(pair, model, ids, 12, None)
        assert (said - due).abs().max() < 1e-3, (length, said, due)


def test_a_prompt_above_the_context_of_prefill(pair: Pair) -> None:
    prefill, decode, seconds = both(pair, prompt(CONTEXT_TOKENS + 1))
    assert (prefill.status_code, decode.status_code) == (400, 400)
    assert f"{CONTEXT_TOKENS + 1} tokens" in decode.text, decode.text
    assert seconds < SOON_S


# A field that only decode's flags allow: a class of SGLang's own, as a pickle that names it.
NAMED = b"csglang.srt.sampling.custom_logit_processor\nDisallowedTokensLogitsProcessor\n."
PROCESSOR = {"custom_logit_processor": json.dumps({"callable": NAMED.hex()})}
WHY = "not configured to enable custom logit processor"


def test_what_prefill_alone_refuses_is_answered_with_its_reason(pair: Pair) -> None:
    prefill, decode, _ = both(pair, prompt(20), **PROCESSOR)
    assert (prefill.status_code, decode.status_code) == (400, 400), decode.text
    assert f"the prefill server refused the request: The server is {WHY}" in decode.text, decode.text
    prefill, decode, _ = both(pair, [[5, 6], [7, 8]], **PROCESSOR)
    assert (prefill.status_code, decode.status_code) == (400, 400) and WHY in decode.text, decode.text
    wait_idle(pair.prefill, pair.decode, timeout_s=ROOM_TIMEOUT_S / 2)  # decode heard of each room, not only the first
    assert [answer.status_code for answer in both(pair, prompt(20))[:2]] == [200, 200]


def test_refusals_of_one_side_do_not_close_the_service(pair: Pair, logs: Path) -> None:
    """The router would retry a 500, and after several of them it would give up the server for everyone."""
    front = router(logs / "one-sided-router.log", pair.prefill, pair.decode)
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
    prefill, decode, seconds = both(pair, prompt(tokens))
    assert decode.status_code == 400, decode.text
    assert f"takes at most {POOL_TOKENS - RESERVED_TOKENS}" in decode.text
    assert prefill.status_code == 400 and f"{tokens} tokens" in prefill.text, prefill.text
    assert seconds < SOON_S
    assert [answer.status_code for answer in both(pair, prompt(20))[:2]] == [200, 200]


def test_a_request_that_no_decode_server_got(pair: Pair) -> None:
    start = time.monotonic()
    answer = pair.prefill.post("/generate", pair.body(prompt(20), 4))
    assert answer.status_code >= 400
    assert f"no decode rank has asked for this room within {ROOM_TIMEOUT_S} s" in answer.text, answer.text
    assert time.monotonic() - start < SOON_S


def test_a_request_that_prefill_never_got(pair: Pair) -> None:
    """No other request arrives at prefill that would show that this one was passed over."""
    start = time.monotonic()
    answer = pair.decode.post("/generate", pair.body(prompt(20), 4))
    assert f"no prefill request opened this room within {ROOM_TIMEOUT_S} s" in answer.text, answer.text
    assert time.monotonic() - start < SOON_S


@pytest.mark.slow
def test_a_decode_server_that_is_told_to_end_behind_the_router(pair: Pair, logs: Path) -> None:
    """Requests that the router still sends there fail with a reason long before the deadline.

    This test must be the last one of the file.
    """
    front = router(logs / "ended-router.log", pair.prefill, pair.decode)
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
