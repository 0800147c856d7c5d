"""``pause_generation`` takes all requests back from a decode server, and prefill then computes their answers anew."""

import concurrent.futures
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.servers import idle, launcher, running, wait_idle
from tests.e2e.traffic import Pair

PROMPT = [7 * i % 900 + 5 for i in range(300)]
TOKENS, CACHE = 500, 1200  # the prompt and twice the answer exceed the cache


@pytest.fixture(scope="module")
def pair(nano_mla: str, logs: Path) -> Iterator[Pair]:
    prefill = launcher("prefill", nano_mla, logs / "pause-prefill.log")
    size = ("--max-total-tokens", str(CACHE), "--num-reserved-decode-tokens", "100")
    decode = launcher("decode", nano_mla, logs / "pause-decode.log", *size)
    with running(prefill, decode):
        yield Pair(prefill, decode)


def pause(pair: Pair, used_tokens: int) -> None:
    """Pause the decode server once its requests have so many tokens in its cache."""
    deadline = time.monotonic() + 60
    while idle(pair.decode)["used_tokens"] < used_tokens:
        assert time.monotonic() < deadline
    assert pair.decode.post("/pause_generation", {"mode": "retract"}).status_code == 200


def test_a_long_answer_goes_on_where_it_was(pair: Pair) -> None:
    """SGLang would wait until prompt, answer so far and the whole answer fit, and so would every request behind it."""
    right = pair.generate(PROMPT, TOKENS)[1]["output_ids"]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        long = pool.submit(pair.generate, PROMPT, TOKENS, 60)
        pause(pair, CACHE - TOKENS + 20)
        assert pair.decode.post("/continue_generation", {}).status_code == 200
        neighbour = pool.submit(pair.generate, PROMPT[:20], 5, 60)
        assert long.result()[1]["output_ids"] == right
        assert len(neighbour.result()[1]["output_ids"]) == 5
    wait_idle(pair.prefill, pair.decode)


def test_an_abort_reaches_a_request_that_was_taken_back(pair: Pair) -> None:
    right = pair.generate(PROMPT, 250)[1]["output_ids"]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        mine, others = (pool.submit(pair.generate, PROMPT, 250, 60, rid=rid) for rid in ("a", "ab"))
        pause(pair, 2 * len(PROMPT) + 20)
        assert pair.decode.post("/abort_request", {"rid": "a"}).status_code == 200
        aborted = mine.result()[1]  # before the server goes on
        assert aborted["meta_info"]["finish_reason"]["type"] == "abort"
        assert 0 < len(aborted["output_ids"]) < 250 and aborted["output_ids"] == right[: len(aborted["output_ids"])]
        assert pair.decode.post("/continue_generation", {}).status_code == 200
        assert others.result()[1]["output_ids"] == right
    wait_idle(pair.prefill, pair.decode)
