"""Rows of logits in which every token is forbidden: one that sampling can take, and the grammar has the last word."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_tpla.host.requests.masks import leave_one

NEVER = float("-inf")


def allowing(*rows: list[int]) -> Any:
    """A grammar's mask: the tokens that each row allows, of four."""
    forbidden = torch.tensor([[token not in row for token in range(4)] for row in rows])
    return SimpleNamespace(apply=lambda logits: logits.masked_fill_(forbidden, NEVER))


def info(grammar: Any = None, bias: Any = None, penalties: Any = None) -> Any:
    return SimpleNamespace(
        grammar_mask=grammar, logit_bias=bias, acc_additive_penalties=penalties, penalizer_orchestrator=None
    )


@pytest.mark.parametrize("where", ["grammar", "bias", "penalties"])
def test_rows_without_a_token(where: str) -> None:
    logits = torch.tensor([[1.0, 2, 3, NEVER], [NEVER] * 4])
    mask = allowing([0, 1, 2], []) if where == "grammar" else torch.zeros(2, 4)
    leave_one(None, info(**{where: mask}), logits)
    assert torch.equal(logits[0], torch.tensor([1.0, 2, 3, NEVER])), "others are as they were"
    assert torch.isfinite(torch.softmax(logits, -1)).all()
    torch.multinomial(torch.softmax(logits, -1), 1)  # which ends the server over a row of no numbers


def test_a_grammar_that_demands_the_end_goes_before_a_shortest_length() -> None:
    logits = torch.tensor([[NEVER] * 4])  # the grammar left token 3, and that one was to come later
    leave_one(None, info(grammar=allowing([3]), penalties=torch.zeros(1, 4)), logits)
    assert logits.softmax(-1).tolist() == [[0, 0, 0, 1]]


def test_requests_that_mask_nothing_are_left_alone() -> None:
    logits = torch.tensor([[NEVER] * 4])
    leave_one(None, info(), logits)
    assert torch.isneginf(logits).all()
