"""If a row of logits forbids every token, sampling still gets a valid row, and the grammar has the last word."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_tpla.host.requests.masks import apply_grammar, blame_request, leave_one

NEVER = float("-inf")


def allow(*rows: list[int]) -> Any:
    """Return a grammar's mask over four tokens; ``rows`` are the tokens that each row allows."""
    forbidden = torch.tensor([[token not in row for token in range(4)] for row in rows])
    return lambda self, logits: logits.masked_fill_(forbidden, NEVER)


def test_a_grammar_without_a_way_on() -> None:
    logits = torch.tensor([[1.0, 2, 3, 4], [1.0, 2, 3, 4]])
    apply_grammar(allow([0, 1, 2], []), None, logits)
    assert logits[0].tolist() == [1, 2, 3, NEVER], "others are as they would be"
    torch.multinomial(logits.softmax(-1), 1)  # a row of NaN would end the server here


def test_a_grammar_that_demands_the_end_goes_before_a_shortest_length() -> None:
    logits = torch.tensor([[1.0, 2, 3, NEVER]])  # min_new_tokens holds back token 3
    apply_grammar(allow([3]), None, logits)
    assert logits.softmax(-1).tolist() == [[0, 0, 0, 1]]


@pytest.mark.parametrize("penalized", [True, False])
def test_a_shortest_length_that_holds_back_every_token(penalized: bool) -> None:
    info = SimpleNamespace(acc_additive_penalties=None, penalizer_orchestrator=SimpleNamespace(is_required=penalized))
    logits = torch.tensor([[1.0, NEVER, NEVER, 2], [NEVER] * 4])
    leave_one(None, info, logits)
    assert logits[0].tolist() == [1, NEVER, NEVER, 2]
    assert torch.isneginf(logits[1]).all() != penalized


@pytest.mark.parametrize(
    ("message", "given", "kept"),
    [
        ("Grammar accept_token failed: Tokens not accepted", 500, 400),
        ("Grammar accept_token failed", None, None),
        ("room 5: aborted: the prefill server refused the request: no such LoRA", 500, 400),
        ("another reason", 500, 500),
        (None, None, None),
    ],
)
def test_what_is_the_requests_fault_is_answered_so(message: str | None, given: int | None, kept: int | None) -> None:
    reason = SimpleNamespace(status_code=given)
    blame_request(None, reason, message, given)
    assert reason.status_code == kept
