"""The requests of `speculation_gpu.py` to a decode server besides greedy ones: samples, and requests of every kind."""

import concurrent.futures
import json
import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.e2e.servers import until_running, wait_idle
from tests.e2e.traffic import Answer, Pair

RANKS = 4  # number of likeliest tokens that are counted separately
FEW = 20  # a cell of a chi-squared test with fewer draws is pooled with others
PATTERN = "[0-9]{3}-[ab]{2}"
AT_ONCE, TOKENS = 8, 40


def chances(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """Compare how often sampled tokens were the target's likeliest, its second and so on, with the expected counts.

    The answers come with the target's own log-probabilities of the ``RANKS`` likeliest tokens at every place. The first
    token of an answer is prefill's and is not counted. ``deviations`` are in standard deviations of a right sampler.
    """
    seen, expected, variance = (torch.zeros(RANKS + 1, dtype=torch.float64) for _ in range(3))
    for answer in answers:
        meta = answer["meta_info"]
        places = zip(meta["output_token_logprobs"], meta["output_top_logprobs"], strict=True)
        for (_, token, *_), best in list(places)[1:]:
            chance = torch.tensor([value for value, *_ in best[:RANKS]], dtype=torch.float64).exp()
            chance = torch.cat((chance, (1 - chance.sum()).clamp(min=0)[None]))
            named = [one for _, one, *_ in best[:RANKS]]
            seen[named.index(token) if token in named else RANKS] += 1
            expected += chance
            variance += chance * (1 - chance)
    return {
        "tokens": int(seen.sum()),
        "seen": seen.tolist(),
        "expected": expected.tolist(),
        "deviations": ((seen - expected) / variance.sqrt().clamp(min=1e-9)).tolist(),
    }


def draw(ask: Callable[..., Any], prompt: list[int], tokens: int, draws: int, limit_s: float) -> list[tuple[int, ...]]:
    """Return the first ``tokens`` tokens of ``draws`` samples, or of as many as there is time for.

    Args:
        ask: as `Decoder.ask`, called by several threads.
    """
    each, end = 25, time.monotonic() + limit_s
    params = {"max_new_tokens": tokens, "temperature": 1.0, "ignore_eos": True, "n": each}

    def some(_: int) -> list[tuple[int, ...]]:
        if time.monotonic() > end:
            return []
        answers = ask(prompt, tokens, sampling_params=params)
        return [tuple(answer["output_ids"]) for answer in answers]

    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as pool:
        return [row for rows in pool.map(some, range(-(-draws // each))) for row in rows]


class Draws:
    """Draws at several prompts by servers of every kind; if they are kept in a file, a later run adds to them."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        found = json.loads(path.read_text()) if path is not None and path.is_file() else {}
        self.runs: int = found.get("runs", 0)
        self._rows: dict[str, dict[str, list[tuple[Any, ...]]]] = {
            prompt: {kind: [tuple(row) for row in rows] for kind, rows in kinds.items()}
            for prompt, kinds in found.get("draws", {}).items()
        }

    def at(self, prompt: list[int], kind: str) -> list[tuple[Any, ...]]:
        """Return the list of draws at a prompt by servers of a kind; callers add to it."""
        return self._rows.setdefault(" ".join(map(str, prompt)), {}).setdefault(kind, [])

    def keep(self) -> None:
        """Write the file, with this run counted."""
        if self._path is not None:
            self._path.write_text(json.dumps({"runs": self.runs + 1, "draws": self._rows}))


def same_source(one: Counter[Any], other: Counter[Any]) -> dict[str, Any]:
    """Run a chi-squared test of two samples of a categorical distribution; cells of few draws are pooled."""
    cells: list[list[float]] = [[0.0, 0.0]]
    for key in one | other:
        pair = [float(one[key]), float(other[key])]
        if sum(pair) < 2 * FEW:
            cells[0] = [a + b for a, b in zip(cells[0], pair, strict=True)]
        else:
            cells.append(pair)
    counts = torch.tensor([cell for cell in cells if sum(cell)], dtype=torch.float64)  # [cells, 2]
    totals = counts.sum(0)
    expected = counts.sum(1, keepdim=True) * totals / totals.sum()
    chi = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor(len(counts) - 1.0, dtype=torch.float64)
    chance = float(torch.special.gammaincc(freedom / 2, chi / 2)) if len(counts) > 1 else 1.0
    return {"draws": totals.tolist(), "cells": len(counts), "chi_squared": float(chi), "p": chance}


def compare_draws(plain: list[tuple[int, ...]], drafted: list[tuple[int, ...]]) -> dict[str, Any]:
    """Compare draws with and without speculation: single tokens from prefill's on, and pairs of neighbours."""
    spans = [(first, first + width) for width in (1, 2) for first in range(len(plain[0]) + 1 - width)]
    return {
        f"tokens {first} to {end - 1}": same_source(
            *(Counter(row[first:end] for row in rows) for rows in (plain, drafted))
        )
        for first, end in spans
    }


def every_kind(pair: Pair, prompt: list[int]) -> dict[str, Any]:
    """Return whether requests that stop early, obey a grammar, stream, share a prefix or are dropped do so properly.

    Each is compared with the same server's whole answer, whose prompt is in prefill's cache by then.
    """
    found: dict[str, Any] = {}

    def answer(**params: Any) -> Any:
        sampling = {"max_new_tokens": TOKENS, "temperature": 0, "ignore_eos": True} | params
        return pair.generate(prompt, TOKENS, sampling_params=sampling)

    answer()
    first, whole = answer()
    text, ids = whole["text"], whole["output_ids"]

    def stop_token() -> bool:
        said = answer(stop_token_ids=[ids[6]], ignore_eos=False)[1]
        return said["output_ids"][: ids.index(ids[6])] == ids[: ids.index(ids[6])] and stopped(said)

    def stop_string() -> bool:
        end = text[12:15]
        said = answer(stop=end, ignore_eos=False)[1]
        return said["text"] == text[: text.index(end)] and stopped(said)

    def stopped(said: Any) -> bool:
        return said["meta_info"]["finish_reason"]["type"] == "stop"

    def grammar() -> bool:
        hot = [answer(regex=PATTERN, temperature=1.5, ignore_eos=False)[1]["text"] for _ in range(4)]
        said = [answer(regex=PATTERN, ignore_eos=False)[1]["text"], *hot]
        return all(re.fullmatch(PATTERN, one) for one in said) or said  # type: ignore[return-value]

    def streamed() -> bool:
        return list(pair.ask(prompt, TOKENS, stream=True).tokens) == ids

    def prefix() -> bool:
        return first["meta_info"]["cached_tokens"] >= len(prompt) - 2

    def samples() -> bool:
        said = [one["output_ids"] for one in answer(n=3)[1]]
        return len(said) == 3 and all(one[:8] == ids[:8] for one in said)

    def given_up() -> bool:
        pair.leave(prompt, 500, after_s=20)
        wait_idle(pair.prefill, pair.decode)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            call: concurrent.futures.Future[Answer] = pool.submit(pair.ask, prompt, 2000, rid="given up")
            until_running(pair.decode, call)
            pair.abort("given up", pair.decode)
            dropped = '"type": "abort"' in call.result().failure
        wait_idle(pair.prefill, pair.decode)
        return dropped and answer()[1]["output_ids"] == ids

    for check in (streamed, stop_token, stop_string, prefix, samples, given_up, grammar):
        try:
            found[check.__name__] = check()
        except Exception as error:
            found[check.__name__] = f"{type(error).__name__}: {error}"[:600]
    return found
