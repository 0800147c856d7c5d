"""Grammars across the hand-over: prefill samples the first token, decode the others, each with its copy of the grammar.

The reference is the plain PyTorch model in float32 under the same grammar: except for rounding, a server must choose
the likeliest of the tokens that the grammar allows.
"""

import concurrent.futures
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from sglang_tpla.reference_model.forward import PlainModel
from tests.e2e.prompts import encoded, short_prompts
from tests.e2e.servers import request_body
from tests.e2e.traffic import Pair
from tests.gpu.engine import ANY_WIDTH, DEVICE, Engines

pytestmark = pytest.mark.gpu
RESULTS = "SGLANG_TPLA_TEST_RESULTS"  # folder for the servers' logs
XGRAMMAR = ("--grammar-backend", "xgrammar")
TOKENS = 64
DEADLINE_S = 60.0
# The nats by which the reference may prefer another allowed token: bfloat16 sometimes routes to another expert.
MEAN_GAP = 0.1 if DEVICE == "cuda" else 1e-4
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6}, "size": {"enum": [1, 20, 300]}, "ok": {"type": "boolean"},
    },
    "required": ["name", "size", "ok"],
    "additionalProperties": False,
}  # fmt: skip
GRAMMARS: dict[str, dict[str, str]] = {
    "regex": {"regex": "[0-9]{3}-[ab]{2}"},
    "ebnf": {"ebnf": 'root ::= ("yes" | "no") (" " [a-f]) (" " [a-f])'},
    "json_schema": {"json_schema": json.dumps(SCHEMA)},
    "json_object": {"json_schema": '{"type": "object"}'},
    "none": {},
}
BROKEN = ({"regex": "[0-9"}, {"ebnf": "root ::="}, {"json_schema": "{"}, {"ebnf": "root ::= root"})


@dataclass(frozen=True)
class Served:
    """Prefill, a decode server of one rank, and their model."""

    model: str
    pair: Pair
    plain: PlainModel

    def ask(self, path: str, body: dict[str, Any]) -> list[httpx.Response]:
        """Return both servers' answers to a body, in a new room."""
        body = body | self.pair.place()
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            servers = (self.pair.prefill, self.pair.decode)
            return list(pool.map(lambda server: server.post(path, body, DEADLINE_S), servers))

    def generate(self, prompt: list[int], grammar: dict[str, str]) -> dict[str, Any]:
        """Return decode's greedy answer under a grammar."""
        body = request_body(prompt, TOKENS if grammar else 16)
        body["sampling_params"] |= grammar | {"ignore_eos": not grammar}
        answers = self.ask("/generate", body)
        assert [a.status_code for a in answers] == [200, 200], [a.text[:300] for a in answers]
        said: dict[str, Any] = answers[1].json()
        return said

    @torch.no_grad()
    def gaps(self, prompt: list[int], tokens: list[int], grammar: dict[str, str]) -> list[float]:
        """Return how much the reference prefers the best allowed token to each answered token, in nats.

        Raises:
            AssertionError: the grammar forbids a token.
        """
        ids = torch.tensor([prompt + tokens], device=DEVICE)
        scores = self.plain.forward(ids[:, :-1])[0, len(prompt) - 1 :].float().cpu()  # [tokens, vocab]
        matcher = self.matcher(grammar)
        found = []
        for row, token in zip(scores, tokens, strict=True):
            if matcher is not None:
                mask = torch.full((1, (len(row) + 31) // 32), -1, dtype=torch.int32)
                matcher.fill_next_token_bitmask(mask)
                allowed = (mask[0, torch.arange(len(row)) // 32] >> (torch.arange(len(row)) % 32)) & 1
                assert allowed[token], f"{grammar} forbids {token} after {tokens[: len(found)]}"
                row = row.masked_fill(allowed == 0, -torch.inf)
                matcher.accept_token(token)
            found.append(float(row.max() - row[token]))
        return found

    def matcher(self, grammar: dict[str, str]) -> Any:
        """Return xgrammar's own matcher of a grammar, or None if there is no grammar."""
        if not grammar:
            return None
        import xgrammar
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.model)
        info = xgrammar.TokenizerInfo.from_huggingface(
            tokenizer, vocab_size=len(self.plain.lm_head), stop_token_ids=[tokenizer.eos_token_id]
        )
        compiler = xgrammar.GrammarCompiler(info)
        compile_one = {
            "regex": compiler.compile_regex,
            "ebnf": compiler.compile_grammar,
            "json_schema": compiler.compile_json_schema,
        }
        ((kind, text),) = grammar.items()
        return xgrammar.GrammarMatcher(compile_one[kind](text))


@pytest.fixture(scope="module")
def served(nano_mla: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    log = Path(os.environ.get(RESULTS) or tmp_path_factory.mktemp("grammars")) / "grammars"
    log.mkdir(parents=True, exist_ok=True)
    engines = Engines(nano_mla, log)
    try:
        engines.start_prefill(*XGRAMMAR)
        engines.decode("decode", 1, "--tpla-groups", "1", *XGRAMMAR, *ANY_WIDTH)
        yield Served(nano_mla, engines.pair("decode"), PlainModel(nano_mla, device=DEVICE))
    finally:
        engines.stop()


@pytest.fixture(scope="module")
def prompts(nano_mla: str) -> list[list[int]]:
    return encoded(nano_mla, short_prompts(3, seed=9))


def is_valid(kind: str, text: str) -> bool:
    """Return whether a whole answer is in the grammar's language, judged without a grammar engine."""
    if kind == "regex":
        return re.fullmatch("[0-9]{3}-[ab]{2}", text) is not None
    if kind == "ebnf":
        return re.fullmatch("(yes|no) [a-f] [a-f]", text) is not None
    said = json.loads(text)
    if kind == "json_object":
        return isinstance(said, dict)
    name, size, ok = said["name"], said["size"], said["ok"]
    return len(said) == 3 and len(name) <= 6 and size in (1, 20, 300) and isinstance(ok, bool)


def test_answers_are_the_constrained_models(served: Served, prompts: list[list[int]]) -> None:
    """Requests with all grammars and without one run at the same time, so that they share decode's batches."""
    asked = [(kind, prompt) for kind in GRAMMARS for prompt in prompts]
    with concurrent.futures.ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda one: served.generate(one[1], GRAMMARS[one[0]]), asked))
    whole: dict[str, int] = dict.fromkeys(GRAMMARS, 0)
    gaps: list[float] = []
    for (kind, prompt), said in zip(asked, answers, strict=True):
        gaps += served.gaps(prompt, said["output_ids"], GRAMMARS[kind])
        if kind != "none" and said["meta_info"]["finish_reason"]["type"] == "stop":
            assert is_valid(kind, said["text"]), (kind, said["text"])
            whole[kind] += 1
    print("whole answers", whole, "mean gap", sum(gaps) / len(gaps), "largest", max(gaps))
    # JSON may have any amount of white space between its parts, so its answers may not end; the others do.
    assert all(whole[kind] == len(prompts) for kind in ("regex", "ebnf")) and whole["json_schema"], whole
    assert sum(gaps) / len(gaps) <= MEAN_GAP, gaps


def test_a_chat_that_wants_json_is_answered_in_json(served: Served) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": TOKENS, "temperature": 0}
    for wanted in ({"type": "json_object"},
                   {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}):  # fmt: skip
        answer = served.ask("/v1/chat/completions", body | {"response_format": wanted})[1]
        assert answer.status_code == 200, answer.text[:300]
        (choice,) = answer.json()["choices"]
        if choice["finish_reason"] == "stop":
            assert is_valid(str(wanted["type"]), choice["message"]["content"]), choice
        else:
            assert choice["message"]["content"].lstrip().startswith("{"), choice


def test_a_broken_grammar_fails_alone(served: Served, prompts: list[list[int]]) -> None:
    """A broken grammar gets a 4xx from each server, while other requests are answered as before."""
    expected = [served.generate(prompt, GRAMMARS["regex"])["text"] for prompt in prompts]
    with concurrent.futures.ThreadPoolExecutor(len(prompts)) as pool:
        for wrong in BROKEN:
            others = [pool.submit(served.generate, prompt, GRAMMARS["regex"]) for prompt in prompts]
            body = request_body(prompts[0], 8)
            body["sampling_params"] |= wrong
            answers = served.ask("/generate", body)
            assert [a.status_code for a in answers] == [400, 400], (wrong, [a.text[:300] for a in answers])
            assert [other.result()["text"] for other in others] == expected
