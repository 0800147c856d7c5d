"""Log-probabilities of greedy answers, from servers and from the plain PyTorch model."""

from collections.abc import Sequence
from typing import Any

import torch

from sglang_tpla.reference_model.forward import LayerMaps, PlainModel
from tests.e2e.traffic import Pair


def said_and_due(
    pair: Pair, model: PlainModel, ids: list[int], new_tokens: int, *candidates: Sequence[LayerMaps] | None
) -> tuple[torch.Tensor, ...]:
    """Return the server's values [new tokens], then the model's with each candidate's maps (None: plain MLA)."""
    _, answer = pair.generate(ids, new_tokens, return_logprob=True)
    said = answer["meta_info"]["output_token_logprobs"]
    tokens = torch.tensor([ids + [token for _, token, _ in said]])
    at = torch.arange(len(ids) - 1, tokens.shape[1] - 1)
    with torch.no_grad():
        outputs = [
            model.forward(tokens[:, :-1], maps=maps, prompt_tokens=len(ids)).log_softmax(-1) for maps in candidates
        ]
    due = (values[0, at, tokens[0, at + 1]] for values in outputs)
    return torch.tensor([value for value, *_ in said]), *due


def said(answer: dict[str, Any]) -> list[tuple[int, float]]:
    """Return the tokens of an answer with their log-probabilities."""
    return [(token, value) for value, token, *_ in answer["meta_info"]["output_token_logprobs"]]


def agree(answer: dict[str, Any], right: dict[str, Any], far: float) -> list[float]:
    """Check that tokens are the same up to a tie, and return how far their log-probabilities differ, below ``far``."""
    apart = []
    for (token, value), best in zip(said(answer), right["meta_info"]["output_top_logprobs"], strict=True):
        (first, expected, _), (second, other, _) = best
        if token != expected:
            assert token == other and first - second < far, (token, value, best)
            break
        apart.append(abs(value - first))
    assert max(apart) < far, apart
    return apart
