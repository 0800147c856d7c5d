"""Compare two live servers, stock and TPLA, through SGLang's native ``/generate`` API.

Both servers continue each prompt greedily and return the top log-probabilities of every token. As long as the answers
are the same, the distributions at one position have the same context and are compared; the first different token ends
the comparison of that prompt. KL is estimated over the stock server's top tokens that both servers list, with the
remaining probability as one more outcome, so the estimate is a lower bound that more `TOP_TOKENS` would tighten.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from sglang_tpla.errors import SglangTplaError

TIMEOUT_S = 300.0  # for one answer
TOP_TOKENS = 20


class EndpointError(SglangTplaError, RuntimeError):
    """A server did not answer as expected; the message says which server, what came, and what to do."""


@dataclass(frozen=True)
class PromptComparison:
    """One prompt: the tokens compared before the answers part (or end), and the errors over them.

    ``departed`` says whether the answers parted. The token at which they part still had the same context, so the errors
    include it.
    """

    agreement_tokens: int
    departed: bool
    kl: tuple[float, ...]
    largest_logprob_difference: float


@dataclass(frozen=True)
class Step:
    """One generated token with its alternatives' log-probabilities by token id."""

    token: int
    top: dict[int, float]


def compare_endpoints(
    stock_url: str,
    tpla_url: str,
    prompts: Sequence[str],
    *,
    new_tokens: int = 128,
    progress: Callable[[int], object] = lambda done: None,
) -> list[PromptComparison]:
    """Continue every prompt on both servers and compare.

    Raises:
        EndpointError: a server is not there, refuses, or answers without log-probabilities.
    """
    results = []
    with httpx.Client(timeout=TIMEOUT_S) as client:
        for prompt in prompts:
            stock, tpla = (_steps(client, url, prompt, new_tokens) for url in (stock_url, tpla_url))
            results.append(compare_steps(stock, tpla))
            progress(1)
    return results


def compare_steps(stock: Sequence[Step], tpla: Sequence[Step]) -> PromptComparison:
    kl: list[float] = []
    largest = 0.0
    agreement, departed = 0, False
    for ours, theirs in zip(stock, tpla, strict=False):
        kl.append(partial_kl(ours.top, theirs.top))
        for token in ours.top.keys() & theirs.top.keys():
            largest = max(largest, abs(ours.top[token] - theirs.top[token]))
        if ours.token != theirs.token:
            departed = True
            break
        agreement += 1
    return PromptComparison(agreement, departed, tuple(kl), largest)


def partial_kl(reference: dict[int, float], found: dict[int, float]) -> float:
    """Return the KL, at least 0, over the tokens that both list and one outcome for everything else."""
    common = reference.keys() & found.keys()
    total = sum(math.exp(reference[token]) * (reference[token] - found[token]) for token in common)
    rest_p = max(1.0 - sum(math.exp(reference[token]) for token in common), 1e-12)
    rest_q = max(1.0 - sum(math.exp(found[token]) for token in common), 1e-12)
    return max(total + rest_p * math.log(rest_p / rest_q), 0.0)


def ask(client: httpx.Client, url: str, body: dict[str, Any], new_tokens: int, **sampling: object) -> dict[str, Any]:
    """Have a server answer greedily, with log-probabilities, and return the answer's ``meta_info``.

    Raises:
        EndpointError: the server is not there, refuses, or answers something else.
    """
    params = {"temperature": 0.0, "max_new_tokens": new_tokens, **sampling}
    try:
        answer = client.post(
            f"{url.rstrip('/')}/generate", json={**body, "sampling_params": params, "return_logprob": True}
        )
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:  # the last of a name that no host can have
        raise EndpointError(f"{url} did not answer: {error!r}; is the server up?") from error
    if answer.status_code != 200:
        raise EndpointError(f"{url} answered {answer.status_code}: {answer.text[:300]}")
    try:
        return dict(answer.json()["meta_info"])
    except (KeyError, ValueError, TypeError) as error:
        raise unusable(url, error) from error


def unusable(url: str, error: Exception) -> EndpointError:
    """Return the error for an answer without usable log-probabilities."""
    return EndpointError(f"{url} answered without usable log-probabilities ({error!r}); expected SGLang's /generate")


def _logprob(value: Any) -> float:
    found = float(value)
    if not -math.inf < found < 1:  # rounding may leave one above 0
        raise ValueError(f"expected a log-probability, got {found}")
    return found


def _steps(client: httpx.Client, url: str, prompt: str, new_tokens: int) -> list[Step]:
    meta = ask(client, url, {"text": prompt, "top_logprobs_num": TOP_TOKENS}, new_tokens)
    try:
        chosen, tops = meta["output_token_logprobs"], meta["output_top_logprobs"]
        # every entry is [log-probability, token id, text or null]
        return [
            Step(int(entry[1]), {int(alternative[1]): _logprob(alternative[0]) for alternative in top})
            for entry, top in zip(chosen, tops, strict=True)
        ]
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise unusable(url, error) from error
