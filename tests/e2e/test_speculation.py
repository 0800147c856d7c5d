"""Speculative decoding through real servers: every greedy token is the same as without speculation in that layout.

The draft is a copy of the target's last layer: right now and then, and wrong often enough that guesses are dropped.
"""

import concurrent.futures
import contextlib
import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.model_answers import agree, said
from tests.e2e.prompts import encoded, short_prompts
from tests.e2e.servers import Server, launcher, transfer_lines, until_running, wait_idle
from tests.e2e.traffic import Pair
from tests.speculating_model import artifact_for, copied_layer, with_nextn

TOKENS, LAYERS, LATENT, ROPE = 40, 4, 128, 32
SPECULATION = ("--speculative-algorithm", "EAGLE", "--speculative-num-steps", "3")
FLAGS: dict[str, tuple[str, ...]] = {"speculating": SPECULATION, "plain": ()}
# Fewer requests than by default: each holds slots for its guesses.
COMMON = ("--skip-server-warmup", "--max-running-requests", "8")


@dataclass(frozen=True)
class Model:
    """A checkpoint with a NextN layer, and its prefill servers."""

    path: Path
    folder: Path
    prefill: dict[str, Server]


@dataclass(frozen=True)
class Servers:
    """A prefill server and a decode server of two groups, with speculation and without."""

    rows: str
    speculating: Pair
    plain: Pair


@pytest.fixture(scope="module")
def model(nano_mla: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    folder = tmp_path_factory.mktemp("speculation")
    path = with_nextn(Path(nano_mla), copied_layer(Path(nano_mla), folder / "layer"), folder / "nano-nextn")
    with contextlib.ExitStack() as stack:
        prefill = {}
        for name, flags in FLAGS.items():
            server = launcher("prefill", path, folder / f"{name}-prefill.log", *COMMON, *flags)
            stack.callback(server.stop)
            prefill[name] = server.start()
        yield Model(path, folder, prefill)


@pytest.fixture(scope="module", params=["plain", "sketched"])
def servers(
    request: pytest.FixtureRequest, model: Model, nano_artifact: str, sketched_artifact: str
) -> Iterator[Servers]:
    rows = request.param
    maps = {"plain": nano_artifact, "sketched": sketched_artifact}[rows]
    artifact = artifact_for(model.path, maps, model.folder / f"{rows}-g2.safetensors")
    # Each kind of rows is tested with one way of holding the output projection.
    heads = {"plain": "replicate", "sketched": "scatter"}[rows]
    layout = ("--tp", "2", "--tpla-groups", "2", "--tpla-artifact", str(artifact), "--tpla-o-proj", heads)
    with contextlib.ExitStack() as stack:
        pairs = {}
        for name, flags in FLAGS.items():
            log = model.folder / f"{rows}-{name}-decode.log"
            other = {"EAGLE": "NEXTN"} if rows == "sketched" else {}  # two names of one algorithm
            named = (other.get(flag, flag) for flag in flags)
            decode = launcher("decode", model.path, log, *layout, *COMMON, *named)
            stack.callback(decode.stop)
            pairs[name] = Pair(model.prefill[name], decode.start())
        for pair in pairs.values():
            pair.prefill.wait()
            pair.decode.wait()
        yield Servers(rows, **pairs)


plain_rows = pytest.mark.parametrize("servers", ["plain"], indirect=True)


@pytest.fixture(scope="module")
def prompts(nano_mla: str) -> list[list[int]]:
    *prompts, line = encoded(nano_mla, [*short_prompts(4, seed=5), "    pass\n"])
    return [*prompts, line * 30]  # the draft guesses right where one token repeats over and over


def test_greedy_answers_are_those_without_speculation(servers: Servers, prompts: list[list[int]]) -> None:
    """Tokens and their log-probabilities agree, one request at a time and all at once.

    A step over several tokens sums in another order. In sketched rows an 8-bit code, or a value of the rotary key in
    bfloat16, is then rounded the other way now and then: in the reference model, rows that differ by a millionth before
    rounding give a mean difference of 3e-4 and single differences up to 9e-3. Rows that were not rounded at all would
    give a mean of 9e-3.
    """
    far, mean = {"plain": (1e-4, 1e-5), "sketched": (2e-2, 1e-3)}[servers.rows]
    told = {"return_logprob": True, "top_logprobs_num": 2}
    expected = [servers.plain.generate(prompt, TOKENS, **told)[1] for prompt in prompts]
    alone = [servers.speculating.generate(prompt, TOKENS, **told)[1] for prompt in prompts]
    together = servers.speculating.generate(prompts, TOKENS, **told)[1]
    for answers in (alone, together):
        pairs = zip(answers, expected, strict=True)
        assert statistics.fmean(one for pair in pairs for one in agree(*pair, far)) < mean
    steps = sum(answer["meta_info"]["spec_verify_ct"] for answer in alone)
    kept = sum(answer["meta_info"]["completion_tokens"] for answer in alone)
    assert steps < kept  # some guesses were right
    assert kept < 4 * steps  # and some were not


def test_the_drafts_cache_is_whole_and_counted(servers: Servers, prompts: list[list[int]]) -> None:
    """Each rank's transfers have one layer of 128 + 32 float32 values behind the target's four slices."""
    info = servers.speculating.decode.get("/server_info")
    assert info["speculative_algorithm"] == "EAGLE"
    assert info["speculative_attention_mode"] == "decode"
    assert info["speculative_num_draft_tokens"] == 4
    assert (len(info["tpla"]["widths"]), info["tpla"]["rows"]) == (LAYERS, servers.rows)
    moved = []
    for pair in (servers.plain, servers.speculating):
        before = len(transfer_lines(pair.prefill))
        pair.generate(prompts[0], 1)
        (line,) = transfer_lines(pair.prefill)[before:]
        moved.append(line["bytes"] / line["tokens"])
    assert moved[1] - moved[0] == (LATENT + ROPE) * 4


@plain_rows
def test_sampling_streaming_and_aborts(servers: Servers, prompts: list[list[int]]) -> None:
    """Requests that sample, stop early or are dropped in the middle leave nothing behind."""
    pair = servers.speculating
    sampling = {"max_new_tokens": TOKENS, "temperature": 1.0, "top_p": 0.9, "ignore_eos": True}
    sampled = pair.generate(prompts[0], TOKENS, sampling_params=sampling)[1]
    assert sampled["meta_info"]["completion_tokens"] == TOKENS
    named = {"return_logprob": True, "token_ids_logprob": [5, 6]}
    right = servers.plain.generate(prompts[0], TOKENS, **named)[1]
    mixed = [sampling | {"temperature": value} for value in (0, 1.0, 0, 1.0)]
    answers = pair.generate([prompts[0]] * 4, TOKENS, sampling_params=mixed, **named)[1]
    for answer in answers[::2]:  # the greedy requests, beside sampled ones
        assert answer["output_ids"] == right["output_ids"]
        values = (one["meta_info"]["output_token_ids_logprobs"][1:] for one in (answer, right))
        apart = [abs(a[0] - b[0]) for places in zip(*values, strict=True) for a, b in zip(*places, strict=True)]
        assert len(apart) == 2 * (TOKENS - 1) and max(apart) < 1e-3, apart
    streamed = servers.speculating.ask(prompts[0], TOKENS, stream=True)
    assert list(streamed.tokens) == [token for token, _ in said(right)]
    servers.speculating.leave(prompts[1], 500, after_s=20)  # hangs up after a few tokens
    wait_idle(pair.prefill, pair.decode)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        call = pool.submit(servers.speculating.ask, prompts[1], 2000, rid="given up")
        until_running(pair.decode, call)
        servers.speculating.abort("given up", pair.decode)
        assert '"type": "abort"' in call.result().failure
    wait_idle(pair.prefill, pair.decode)
    assert pair.generate(prompts[0], TOKENS)[1]["output_ids"] == right["output_ids"]


@plain_rows
def test_stops_grammars_prefixes_and_samples(servers: Servers, prompts: list[list[int]]) -> None:
    """An answer may end in the middle of a step's verified tokens; a grammar holds for every guess that is kept."""
    pair = servers.speculating
    for prompt in (prompts[0], prompts[-1]):
        whole = servers.plain.generate(prompt, TOKENS)[1]
        for ends in (
            {"stop_token_ids": [whole["output_ids"][6]]},
            {"stop": whole["text"][12:15]},
            {"stop_token_ids": [whole["output_ids"][6]], "max_new_tokens": 8},  # the full length is often in one step
            {"regex": "[0-9]{3}-[ab]{2}"},
            {"n": 3},
        ):
            params = {"max_new_tokens": TOKENS, "temperature": 0} | ends
            answers = [one.generate(prompt, TOKENS, sampling_params=params)[1] for one in (servers.plain, pair)]
            if "n" in ends:
                answers = [[sample["output_ids"] for sample in answer] for answer in answers]
                assert answers[0] == answers[1] == answers[1][:1] * 3
                continue
            right, answer = answers
            for known in ("text", "output_ids"):
                assert answer[known] == right[known]
            assert answer["meta_info"]["finish_reason"] == right["meta_info"]["finish_reason"]
            assert "regex" not in ends or re.fullmatch(ends["regex"], answer["text"]), answer
    ignored = pair.body(prompts[0], 4)
    ignored["sampling_params"] |= {"temperature": 1.0, "min_p": 0.1}
    for server in (pair.prefill, pair.decode):  # SGLang would silently ignore min_p
        answer = server.post("/generate", ignored, 60)
        assert answer.status_code == 400 and "min_p is not applied" in answer.text, answer.text
    hot = {"max_new_tokens": TOKENS, "temperature": 1.5, "regex": "[0-9]{3}-[ab]{2}"}
    for _ in range(4):
        assert re.fullmatch(hot["regex"], pair.generate(prompts[0], TOKENS, sampling_params=hot)[1]["text"])
    cached = pair.generate(prompts[0], TOKENS)[0]["meta_info"]["cached_tokens"]
    assert cached >= len(prompts[0]) - 2  # a draft's cache is looked up by pairs of tokens
    wait_idle(pair.prefill, pair.decode)


@plain_rows
def test_penalties_and_least_lengths_hold_for_every_token(servers: Servers, prompts: list[list[int]]) -> None:
    """SGLang would count one token a step, and hold back the answer's end for up to four times the minimum length."""
    told = {"return_logprob": True, "top_logprobs_num": 2}
    whole = servers.plain.generate(prompts[-1], TOKENS)[1]["output_ids"]
    for asked in (
        {"min_new_tokens": 15, "stop_token_ids": [whole[0]], "ignore_eos": False},
        {"frequency_penalty": 1.5},
        {"presence_penalty": 1.2},
        {"repetition_penalty": 1.6},
        {"frequency_penalty": 1.5, "temperature": 1.3, "top_k": 1},  # greedy, but through the sampling code
    ):
        params = {"max_new_tokens": TOKENS, "temperature": 0, "ignore_eos": True} | asked
        right, answer = (
            pair.generate(prompts[-1], TOKENS, sampling_params=params, **told)[1]
            for pair in (servers.plain, servers.speculating)
        )
        agree(answer, right, 1e-3)
        assert answer["meta_info"]["finish_reason"] == right["meta_info"]["finish_reason"]


@plain_rows
def test_half_a_pair_that_speculates_is_refused(servers: Servers, prompts: list[list[int]]) -> None:
    """If only one server has the draft, the request fails with the reason, whichever server that is."""
    pairs = servers.speculating, servers.plain
    for first, second in (pairs, pairs[::-1]):
        seen = len(log_of(second.decode))
        body = Pair(first.prefill, second.decode).body(prompts[0], 4)
        answer = second.decode.post("/generate", body, 60)
        assert answer.status_code != 200
        # The rank that answers may have heard of it from the other one.
        assert "give --speculative-algorithm to both or to neither" in answer.text + log_of(second.decode)[seen:]
        wait_idle(second.decode)


@plain_rows
@pytest.mark.slow
def test_a_decode_server_that_was_killed(servers: Servers, prompts: list[list[int]]) -> None:
    """The killed server's requests fail, prefill holds nothing of them, and a new server at that address is served."""
    pair = servers.speculating
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        call = pool.submit(servers.speculating.ask, prompts[1], 2000)
        until_running(pair.decode, call)
        pair.decode.kill()
        assert call.result().failure
    wait_idle(pair.prefill)
    pair.decode.start().wait()
    right = servers.plain.generate(prompts[0], TOKENS)[1]
    assert pair.generate(prompts[0], TOKENS)[1]["output_ids"] == right["output_ids"]


@plain_rows
@pytest.mark.slow
def test_requests_that_are_retracted(servers: Servers, model: Model, prompts: list[list[int]]) -> None:
    """A server that takes requests out of its batch again and again gives the same answers in the end.

    SGLang keeps the rows of a retracted request on the host, but not the draft's rows, so later guesses are worse.
    """
    same = servers.speculating
    decode = launcher("decode", model.path, model.folder / "retracting-decode.log")
    own = str(decode.port)
    decode.command = tuple(own if part == str(same.decode.port) else part for part in same.decode.command)
    decode.env |= {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "5"}
    told = {"return_logprob": True, "top_logprobs_num": 2}
    expected = [servers.plain.generate(prompt, TOKENS, **told)[1] for prompt in prompts]
    try:
        pair = Pair(same.prefill, decode.start().wait())
        answers = pair.generate(prompts, TOKENS, **told)[1]
        for answer, right in zip(answers, expected, strict=True):
            agree(answer, right, 1e-4)
        assert "Testing retraction" in log_of(decode)
        wait_idle(pair.prefill, pair.decode)
    finally:
        decode.stop()


def log_of(server: Server) -> str:
    return server.log.read_text(errors="replace")
