"""Prefill, TPLA decode (TP 2, g 2) and router together: every way in, concurrency, aborts, and idle afterwards."""

import concurrent.futures
import contextlib
import json
import subprocess
import sys
import time
from typing import Any

import httpx
import pytest

from tests.e2e.faulty import growth, resources
from tests.e2e.prompts import source
from tests.e2e.servers import ROOT, request_body, transfer_lines, wait_idle


def test_server_info_tells_the_layout(trio: Any, nano_artifact: str) -> None:
    from sglang_tpla.artifact.artifact import Artifact

    tpla = trio.decode.get("/server_info")["tpla"]
    assert (tpla["groups"], tpla["head_shards"], tpla["widths"]) == (2, 1, [80] * 4)
    assert tpla["artifact_sha256"] == Artifact.load(nano_artifact).content_hash
    assert tpla["cache_bytes_per_token_and_rank"] == 4 * 4 * (80 + 32)
    assert tpla["mla_cache_bytes_per_token_and_rank"] == 4 * 4 * (128 + 32)
    assert "sglang.srt.models.deepseek_v2.DeepseekV2AttentionMLA.__init__" in tpla["hooks"]
    assert trio.prefill.get("/server_info")["tpla"]["groups"] == 1


@pytest.mark.parametrize("path", ["/health", "/health_generate"])
def test_health(trio: Any, path: str) -> None:
    for server in (trio.prefill, trio.decode, trio.router):
        assert httpx.get(server.url + path, timeout=60).status_code == 200, server.name


def test_router_serves_server_info(trio: Any) -> None:
    assert httpx.get(trio.router.url + "/get_server_info", timeout=60).status_code == 200


def test_generate_streams_what_it_answers(trio: Any) -> None:
    prompt = "def merge_sort(items):\n"
    whole = trio.router.generate(prompt, 24)
    body = request_body(prompt, 24, stream=True)
    with httpx.stream("POST", trio.router.url + "/generate", json=body, timeout=120) as response:
        events = [line[6:] for line in response.iter_lines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    pieces = [json.loads(event) for event in events[:-1]]
    assert len(pieces) > 3 and pieces[-1]["text"] == whole["text"]
    assert whole["meta_info"]["completion_tokens"] == 24


def test_logprobs_through_the_router(trio: Any) -> None:
    answer = trio.router.generate("import os\nimport sys\n", 8, return_logprob=True, top_logprobs_num=3)
    meta = answer["meta_info"]
    assert len(meta["output_token_logprobs"]) == 8
    for (value, token, _), top in zip(meta["output_token_logprobs"], meta["output_top_logprobs"], strict=True):
        assert len(top) == 3 and top[0][1] == token and top[0][0] == pytest.approx(value)


def test_openai_completions(trio: Any) -> None:
    body = {"model": "nano", "prompt": "class Stack:\n", "max_tokens": 12, "temperature": 0, "logprobs": 2}
    answer = trio.router.post("/v1/completions", body).json()
    assert answer["usage"]["completion_tokens"] == 12
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == 12


def test_openai_chat(trio: Any) -> None:
    body = {"model": "nano", "messages": [{"role": "user", "content": "def add(a, b):"}], "max_tokens": 8}
    answer = trio.router.post("/v1/chat/completions", body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] >= 1


@pytest.mark.parametrize("example", ["frontend_language.py", "openai_client.py"])
def test_examples_run_against_the_router(trio: Any, example: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / example), "--url", trio.router.url],
        capture_output=True, text=True, timeout=300, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_24_concurrent_requests_and_aborts(trio: Any) -> None:
    """Requests of one token to several chunks run at once, two with one long prefix, some aborted half way."""
    prefix = source(seed=5, characters=6000)
    prompts: list[Any] = [prefix + "\n# one\n", prefix + "\n# two\n", [17], [5, 6]]
    prompts += [source(seed=100 + n, characters=c) for n, c in enumerate((20, 60, 150, 300, 700, 1500, 3000, 5000) * 2)]
    aborted = [source(seed=300 + n, characters=c) for n, c in enumerate((200, 2500, 900, 4000))]
    singles = [trio.router.generate(prompt, 20)["text"] for prompt in prompts]
    wait_idle(trio.prefill, trio.decode)
    servers = trio.prefill, trio.decode
    before = [resources(server) for server in servers]

    def stream(prompt: Any) -> str:
        body = request_body(prompt, 20, stream=True)
        last = "{}"
        with httpx.stream("POST", trio.router.url + "/generate", json=body, timeout=300) as response:
            assert response.status_code == 200
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    last = line[6:]
        return json.loads(last)["text"]

    def give_up(prompt: Any) -> None:
        body = request_body(prompt, 2000, stream=True)
        with httpx.stream("POST", trio.router.url + "/generate", json=body, timeout=300) as response:
            for _ in zip(range(4), response.iter_lines(), strict=False):
                pass

    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        answers = [pool.submit(stream, prompt) for prompt in prompts]
        leavers = [pool.submit(give_up, prompt) for prompt in aborted]
        texts = [answer.result() for answer in answers]
        for leaver in leavers:
            leaver.result()
    assert texts == singles

    again = trio.router.generate(prefix + "\n# three\n", 4)
    assert again["meta_info"]["cached_tokens"] > 1000
    wait_idle(trio.prefill, trio.decode)
    deadline = time.monotonic() + 20
    while any(grown := [growth(old, resources(server)) for old, server in zip(before, servers, strict=True)]):
        # A request to the bootstrap server takes a socket for a moment.
        assert time.monotonic() < deadline, grown


def test_one_line_a_transfer(trio: Any) -> None:
    trio.router.generate("x = 1\n", 2)
    line = transfer_lines(trio.decode)[-1]
    assert line["role"] == "decode" and line["result"] == "success" and line["tokens"] > 0 and line["bytes"] > 0


def test_a_room_in_use_fails_one_request_only(trio: Any) -> None:
    """Two requests with one room number: the second ends with a clear error, the server goes on."""
    body = trio.pair.body("def f():\n", 4)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(s.post, "/generate", body, 120) for s in (trio.prefill, trio.decode) * 2]
        with contextlib.suppress(httpx.HTTPError):
            [call.result() for call in calls]
    wait_idle(trio.prefill, trio.decode, timeout_s=200)
    assert trio.router.generate("def f():\n", 4)["text"]
