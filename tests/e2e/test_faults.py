"""kill -9 of one side: the survivor stays healthy, fails what was in flight, and serves again when the peer is back."""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from tests.e2e.prompts import source
from tests.e2e.servers import Pair, Server, free_ports, idle, launcher, request_body, wait_idle

LONG = {  # some 6,000 tokens each: many chunks of 128, and no common prefix
    "decode": source(seed=9, characters=20000),
    "prefill": source(seed=10, characters=20000),
}
FAIL_WITHIN_S = 60.0


@pytest.fixture(scope="module")
def servers(nano_mla: str, nano_artifact: str, logs: Path) -> Iterator[tuple[Server, Server, int]]:
    """A prefill and a decode server of two ranks each that may be killed; a short peer timeout."""
    ports = free_ports(3)
    timeout = ("--tpla-peer-timeout-s", "6")
    statistics = (
        "--tpla-statistics-folder",
        str(logs / "statistics"),
        "--tpla-statistics-every-tokens",
        "1000",
    )
    prefill = launcher("prefill", nano_mla, ports[0], logs / "killed-prefill.log", "--disaggregation-bootstrap-port",
                       str(ports[1]), "--chunked-prefill-size", "128", "--tp", "2", *timeout, *statistics)  # fmt: skip
    decode = launcher("decode", nano_mla, ports[2], logs / "killed-decode.log", "--tp", "2", "--tpla-groups", "2",
                      "--tpla-artifact", nano_artifact, *timeout)  # fmt: skip
    try:
        prefill.start(), decode.start()
        prefill.wait(), decode.wait()
        yield prefill, decode, ports[1]
    finally:
        prefill.stop()
        decode.stop()


def until_in_flight(server: Server) -> None:
    """Until the server has a room open and chunks of it have moved."""
    start = server.get("/server_info")["internal_states"][0]["tpla_transfer"][0]["chunks"]
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        (agent,) = server.get("/server_info")["internal_states"][0]["tpla_transfer"]
        if agent["rooms"] and agent["chunks"] > start:
            return
    raise AssertionError(f"nothing moved on {server.name}: {idle(server)}")


def send_both(
    prefill: Server, decode: Server, bootstrap: int, room: int, prompt: str
) -> list[concurrent.futures.Future[Any]]:
    body = request_body(prompt, 8) | {
        "bootstrap_host": "127.0.0.1", "bootstrap_port": bootstrap, "bootstrap_room": room,
    }  # fmt: skip
    pool = concurrent.futures.ThreadPoolExecutor(2)
    calls = [pool.submit(server.post, "/generate", body, 200) for server in (prefill, decode)]
    pool.shutdown(wait=False)
    return calls


@pytest.mark.parametrize("victim", ["decode", "prefill"])
def test_survivor_of_a_kill(servers: tuple[Server, Server, int], victim: str) -> None:
    prefill, decode, bootstrap = servers
    pair = Pair(prefill, bootstrap, decode, next_room=50_000 if victim == "decode" else 60_000)
    _, before = pair.generate("def f(x):\n", 12)
    killed, survivor = (decode, prefill) if victim == "decode" else (prefill, decode)
    survivor_pid = survivor.process.pid  # type: ignore[union-attr]

    calls = send_both(prefill, decode, bootstrap, pair.next_room + 500, LONG[victim])
    until_in_flight(survivor)
    killed.kill()
    call = calls[0] if survivor is prefill else calls[1]
    answer = call.result(FAIL_WITHIN_S)
    assert answer.status_code >= 400 or answer.json()["meta_info"]["finish_reason"]["type"] == "abort", (
        answer.text
    )
    assert "rank" in answer.text, answer.text  # who was lost, or which of this server's ranks lost it
    assert httpx.get(survivor.url + "/health", timeout=30).status_code == 200
    wait_idle(survivor)

    killed.start().wait()
    assert survivor.process.pid == survivor_pid and survivor.process.poll() is None  # type: ignore[union-attr]
    _, after = pair.generate("def f(x):\n", 12)
    assert after["text"] == before["text"]
    wait_idle(prefill, decode)


def test_fewer_decode_than_prefill_ranks(
    servers: tuple[Server, Server, int], nano_mla: str, logs: Path
) -> None:
    """One plain MLA decode rank fetches from one of two prefill ranks; the other, which sends nothing, ends as well."""
    prefill, decode, bootstrap = servers
    prompt = source(seed=11, characters=3000)
    _, expected = Pair(prefill, bootstrap, decode, next_room=80_000).generate(prompt, 1, return_logprob=True)
    single = launcher("decode", nano_mla, free_ports(1)[0], logs / "one-rank.log", "--tpla-groups", "1")
    try:
        pair = Pair(prefill, bootstrap, single.start().wait(), next_room=90_000)
        for number in range(3):
            _, answer = pair.generate(prompt + "\n" * number, 6, return_logprob=True)
            if number == 0:
                first = answer["meta_info"]["output_token_logprobs"][0]
                assert first[1] == expected["meta_info"]["output_token_logprobs"][0][1]
        wait_idle(prefill, single)
    finally:
        single.stop()


def test_statistics_of_live_traffic(servers: tuple[Server, Server, int], nano_mla: str, logs: Path) -> None:
    """What the prefill ranks summed up while they served is what the plain model says of such text."""
    from tokenizers import Tokenizer

    from sglang_tpla.calibrate.statistics import Statistics, collect, combine
    from sglang_tpla.models.plain import PlainModel

    files = sorted((logs / "statistics").glob("*.safetensors"))
    assert len(files) >= 2 and len(files) % 2 == 0  # one a rank, of each life of the server that wrote any
    whole = combine([Statistics.load(path) for path in files])
    assert whole.tokens >= 3000 and whole.layers[0].query_outer.shape == (8, 32, 32)
    # most of what was prefilled is this prompt, in one piece
    text = torch.tensor([Tokenizer.from_file(f"{nano_mla}/tokenizer.json").encode(LONG["decode"]).ids])
    for live, plain in zip(whole.layers, collect(PlainModel(nano_mla), [text]), strict=True):
        for ours, theirs in ((live.covariance, plain.covariance), (live.query_outer, plain.query_outer)):
            assert torch.nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.97
