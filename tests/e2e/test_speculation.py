"""Speculative decoding through real servers: every greedy token is the one that the same layout says without it.

The draft is a copy of the target's last layer: right now and then, and wrong often enough that guesses are dropped.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer

from tests.e2e.prompts import short_prompts
from tests.e2e.servers import Pair, Server, launcher, request_body, wait_idle
from tests.ports import free_ports
from tests.speculating_model import artifact_for, copied_layer, with_nextn

TOKENS = 40
SPECULATION = ("--speculative-algorithm", "EAGLE", "--speculative-num-steps", "3")
# Fewer requests than by default: each holds slots for its guesses.
COMMON = ("--skip-server-warmup", "--max-running-requests", "8")


@dataclass(frozen=True)
class Servers:
    """A prefill server and a decode server of two groups, with speculation and without."""

    speculating: Pair
    plain: Pair


@pytest.fixture(scope="module")
def servers(nano_mla: str, nano_artifact: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    folder = tmp_path_factory.mktemp("speculation")
    model = with_nextn(Path(nano_mla), copied_layer(Path(nano_mla), folder / "layer"), folder / "nano-nextn")
    artifact = artifact_for(model, nano_artifact, folder / "nano-nextn-g2.safetensors")
    layout = ("--tp", "2", "--tpla-groups", "2", "--tpla-artifact", str(artifact))
    with contextlib.ExitStack() as stack:
        pairs = []
        for name, flags in (("speculating", SPECULATION), ("plain", ())):
            prefill_port, decode_port, bootstrap = free_ports(3)
            started = [
                launcher("prefill", str(model), prefill_port, folder / f"{name}-prefill.log",
                         "--disaggregation-bootstrap-port", str(bootstrap), *COMMON, *flags),
                launcher("decode", str(model), decode_port, folder / f"{name}-decode.log", *layout, *COMMON, *flags),
            ]  # fmt: skip
            for server in started:
                stack.callback(server.stop)
                server.start()
            pairs.append(Pair(started[0], bootstrap, started[1]))
        for pair in pairs:
            pair.prefill.wait()
            pair.decode.wait()
        yield Servers(*pairs)


@pytest.fixture(scope="module")
def prompts(nano_mla: str) -> list[list[int]]:
    tokenizer = Tokenizer.from_file(f"{nano_mla}/tokenizer.json")
    texts = short_prompts(4, seed=5)
    # One token over and over is what the draft guesses right.
    return [*(tokenizer.encode(text).ids for text in texts), tokenizer.encode("    pass\n").ids * 30]


def said(answer: dict[str, Any]) -> list[tuple[int, float]]:
    return [(token, value) for value, token, *_ in answer["meta_info"]["output_token_logprobs"]]


def test_greedy_answers_are_those_without_speculation(servers: Servers, prompts: list[list[int]]) -> None:
    """Token by token, with their log-probabilities, one request at a time and all at once."""
    expected = [said(servers.plain.generate(prompt, TOKENS, return_logprob=True)[1]) for prompt in prompts]
    alone = [servers.speculating.generate(prompt, TOKENS, return_logprob=True)[1] for prompt in prompts]
    together = servers.speculating.generate(prompts, TOKENS, return_logprob=True)[1]
    for answers in (alone, together):
        for answer, right in zip(answers, expected, strict=True):
            tokens = said(answer)
            assert [token for token, _ in tokens] == [token for token, _ in right]
            assert max(abs(a[1] - b[1]) for a, b in zip(tokens, right, strict=True)) < 1e-4
    steps = sum(answer["meta_info"]["spec_verify_ct"] for answer in alone)
    kept = sum(answer["meta_info"]["completion_tokens"] for answer in alone)
    assert steps < kept  # some guesses were right
    assert kept < 4 * steps  # and some were not


def test_the_drafts_cache_is_whole_and_counted(servers: Servers) -> None:
    """One layer of 128 + 32 float32 values behind the target's four slices, in each rank's transfers."""
    info = servers.speculating.decode.get("/server_info")
    assert info["speculative_algorithm"] == "EAGLE"
    assert info["speculative_attention_mode"] == "decode"
    assert info["speculative_num_draft_tokens"] == 4
    assert len(info["tpla"]["widths"]) == 4


def test_sampling_streaming_and_aborts(servers: Servers, prompts: list[list[int]]) -> None:
    """Requests that sample, stop early or are dropped in the middle leave nothing behind."""
    pair = servers.speculating
    sampling = {"max_new_tokens": TOKENS, "temperature": 1.0, "top_p": 0.9, "ignore_eos": True}
    sampled = pair.generate(prompts[0], TOKENS, sampling_params=sampling)[1]
    assert sampled["meta_info"]["completion_tokens"] == TOKENS
    pair.next_room += 100
    body = request_body(prompts[1], 500, stream=True) | {
        "bootstrap_host": "127.0.0.1", "bootstrap_port": pair.bootstrap, "bootstrap_room": pair.next_room,
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        for server in (pair.prefill, pair.decode):
            answer = stack.enter_context(
                httpx.stream("POST", server.url + "/generate", json=body, timeout=120)
            )
            for _ in zip(range(3), answer.iter_lines(), strict=False):
                pass
    wait_idle(pair.prefill, pair.decode)
    again = pair.generate(prompts[0], TOKENS)[1]
    assert again["output_ids"] == servers.plain.generate(prompts[0], TOKENS)[1]["output_ids"]


def test_half_a_pair_that_speculates_is_refused(servers: Servers, prompts: list[list[int]]) -> None:
    """A prefill server with the draft and a decode server without it: the request fails with the reason."""
    mixed = Pair(
        servers.speculating.prefill, servers.speculating.bootstrap, servers.plain.decode, next_room=9000
    )
    body = request_body(prompts[0], 4) | {
        "bootstrap_host": "127.0.0.1", "bootstrap_port": mixed.bootstrap, "bootstrap_room": 9001,
    }  # fmt: skip
    answer = mixed.decode.post("/generate", body, 60)
    assert answer.status_code != 200
    assert "give --speculative-algorithm to both or to neither" in answer.text + log_of(mixed.decode)
    wait_idle(mixed.decode)


def log_of(server: Server) -> str:
    return server.log.read_text(errors="replace")
