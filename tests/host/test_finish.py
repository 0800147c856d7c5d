"""Ends of answers inside of a step, against SGLang's own search for them where a step says one token."""

import random
from array import array
from types import SimpleNamespace
from typing import Any

import pytest

EOS, LETTERS = 7, "abcdefgh"

pytestmark = pytest.mark.usefixtures("engine")


class Spelling:
    """A tokenizer whose tokens are letters."""

    eos_token_id, additional_stop_token_ids = EOS, None

    def decode(self, ids: Any) -> str:
        return "".join(LETTERS[i] for i in ids)

    def encode(self, text: str, **kwargs: Any) -> list[int]:
        return [LETTERS.index(letter) for letter in text]


def request(**params: Any) -> Any:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.sampling.sampling_params import SamplingParams

    asked = SamplingParams(**params)
    asked.normalize(Spelling())
    req = Req("a", "", array("q", [1]), asked, eos_token_ids={EOS}, vocab_size=len(LETTERS))
    req.tokenizer = Spelling()
    return req


def answer(said: list[int], steps: list[int], **params: Any) -> tuple[Any, list[int]]:
    """The reason and the tokens of an answer of which each step keeps so many."""
    from sglang.srt.managers.schedule_batch import Req

    from sglang_tpla.host.requests.finish import after_each_token

    req, place = request(**params), 0
    for count in steps:
        req.output_ids.extend(said[place : place + count])
        place += count
        after_each_token(Req.update_finish_state, req, count)
        assert list(req.output_ids) == said[:place]  # what comes behind the end is in the cache
        if req.finished():
            return req.finished_reason.to_json(), list(req.output_ids_through_stop)
    return None, list(req.output_ids)


@pytest.mark.parametrize(
    ("said", "params", "text"),
    [
        ("abhcd", {"max_new_tokens": 4}, "abh"),
        ("abhcd", {"max_new_tokens": 9, "stop": ["d"]}, "abh"),
        ("abhcd", {"max_new_tokens": 4, "stop": ["b"]}, "ab"),
        ("abcde", {"max_new_tokens": 9, "stop": ["d", "c"]}, "abc"),
        ("abcde", {"max_new_tokens": 9, "stop_regex": ["c$"]}, "abc"),
        ("abcde", {"max_new_tokens": 3, "stop_token_ids": [3]}, "abc"),
    ],
)
def test_the_first_end_counts(said: str, params: dict[str, Any], text: str) -> None:
    tokens = Spelling().encode(said)
    alone = answer(tokens, [1] * len(tokens), **params)
    assert Spelling().decode(alone[1]) == text
    assert answer(tokens, [1, 4], **params) == alone


@pytest.mark.parametrize("seed", range(10))
def test_steps_of_any_length_end_alike(seed: int) -> None:
    drawn = random.Random(seed)
    for _ in range(30):
        said = [drawn.randrange(len(LETTERS)) for _ in range(24)]
        params: dict[str, Any] = {"max_new_tokens": drawn.randint(1, 14)}
        if drawn.random() < 0.6:
            params["stop"] = [Spelling().decode(drawn.choices(range(7), k=k)) for k in (1, 2)]
        if drawn.random() < 0.4:
            params["stop_token_ids"] = [drawn.randrange(7)]
        if drawn.random() < 0.3:
            params["stop_regex"] = ["[ab]c$"]
        steps = [drawn.randint(1, 4) for _ in range(6)]
        steps.append(24 - sum(steps))
        assert answer(said, steps, **params) == answer(said, [1] * 24, **params)


def test_a_grammar_ends_with_the_last_token_that_it_took() -> None:
    """SGLang tells it of all tokens of a step, and drops those behind its end, before it looks for an end."""
    from sglang.srt.managers.schedule_batch import Req

    from sglang_tpla.host.requests.finish import after_each_token

    req = request(max_new_tokens=20)
    req.grammar = SimpleNamespace(is_terminated=lambda: True)
    grammar, said = req.grammar, [0, 1, 2, 3]
    req.output_ids.extend(said)
    after_each_token(Req.update_finish_state, req, 4)
    assert list(req.output_ids_through_stop) == said and req.grammar is grammar
    assert req.finished_reason.to_json() == {"type": "stop", "matched": 3}


def test_an_aborted_request_ends_at_once() -> None:
    from sglang.srt.managers.schedule_batch import FINISH_ABORT, Req

    from sglang_tpla.host.requests.finish import after_each_token

    for kept in (0, 3):
        req = request(max_new_tokens=20)
        req.output_ids.extend([0] * kept)
        req.to_finish = FINISH_ABORT("gone")
        after_each_token(Req.update_finish_state, req, kept)
        assert req.finished_reason.to_json()["message"] == "gone" and list(req.output_ids) == [0] * kept
