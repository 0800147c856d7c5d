"""g = 1 is plain MLA: prefill + decode servers of ours against stock SGLang on the same prompts, float32, greedy."""

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.prompts import short_prompts, source
from tests.e2e.servers import Server, launcher, running
from tests.e2e.traffic import Pair

PROMPTS, TOKENS = 32, 64
LOGPROBS = {"return_logprob": True, "top_logprobs_num": 4, "logprob_start_len": -1}


def tokens_of(answer: dict[str, Any]) -> list[int]:
    return [token for _, token, *_ in answer["meta_info"]["output_token_logprobs"]]


def top_logprobs(answer: dict[str, Any]) -> list[dict[int, float]]:
    return [{token: value for value, token, *_ in step} for step in answer["meta_info"]["output_top_logprobs"]]


@pytest.fixture(scope="session")
def expected(reference: Server) -> list[dict[str, Any]]:
    """The answers of stock SGLang, with all prompts in one batch."""
    return reference.generate(short_prompts(PROMPTS), TOKENS, **LOGPROBS)  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize("ranks", [*(pytest.param(ranks, marks=pytest.mark.slow) for ranks in (1, 2)), 4])
def test_one_group_gives_stock_tokens_and_logprobs(
    trio: Any, expected: list[dict[str, Any]], nano_mla: str, logs: Path, ranks: int
) -> None:
    log = logs / f"decode-g1-t{ranks}.log"
    decode = launcher("decode", nano_mla, log, "--tp", str(ranks), "--tpla-groups", "1")
    with running(decode):
        _, answers = Pair(trio.prefill, decode).generate(short_prompts(PROMPTS), TOKENS, **LOGPROBS)
        tpla = decode.get("/server_info")["tpla"]

    assert tpla["groups"] == 1 and tpla["head_shards"] == ranks and set(tpla["widths"]) == {128}
    for number, (stock, ours) in enumerate(zip(expected, answers, strict=True)):
        assert len(tokens_of(ours)) == TOKENS
        assert tokens_of(ours) == tokens_of(stock), f"prompt {number}"
        for step, (left, right) in enumerate(zip(top_logprobs(stock), top_logprobs(ours), strict=True)):
            for token in left.keys() & right.keys():
                assert left[token] == pytest.approx(right[token], abs=1e-4), f"prompt {number}, step {step}"
            # The last of the top tokens may be tied with one outside.
            assert len(left.keys() & right.keys()) >= len(left) - 1, f"prompt {number}, step {step}"


@pytest.mark.parametrize("characters", [30, 500, 5000])
def test_prefill_is_stock_to_the_last_bit(trio: Any, reference: Server, characters: int) -> None:
    prompt = source(seed=77 + characters, characters=characters)
    for server in (reference, trio.prefill):  # a cached prefix would change the shapes of the matrix products
        assert server.post("/flush_cache", {}).status_code == 200
    stock = reference.generate(prompt, 1, **LOGPROBS)
    first, decoded = trio.pair.generate(prompt, 1, **LOGPROBS)
    if stock["meta_info"]["prompt_tokens"] <= 512:  # one chunk: the CPU platform's prefill is stock's own
        assert first["meta_info"]["output_top_logprobs"][0] == stock["meta_info"]["output_top_logprobs"][0]
        assert first["meta_info"]["output_token_logprobs"] == stock["meta_info"]["output_token_logprobs"]
    else:  # later chunks attend without stock's padding, which changes the order of sums
        ours, theirs = top_logprobs(first)[0], top_logprobs(stock)[0]
        assert ours.keys() == theirs.keys()
        assert all(ours[token] == pytest.approx(theirs[token], abs=2e-5) for token in ours)
    # The values in the metadata row are the same again.
    assert decoded["meta_info"]["output_token_logprobs"][0][:2] == first["meta_info"]["output_token_logprobs"][0][:2]
