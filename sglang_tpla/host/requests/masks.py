"""Requests that forbid every token.

A grammar masks tokens, ``min_new_tokens`` the end of the answer, ``logit_bias`` what it likes; together, or where a
grammar has no way on, they may leave nothing. Probabilities are then no numbers; to sample from them ends the server.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch


def apply_grammar(original: Callable[..., None], self: Any, logits: torch.Tensor) -> None:
    """Around ``GrammarMask.apply``, for ``logits`` [requests, vocab], also those of guesses that are verified.

    A grammar goes before what was masked earlier: where it demands the end of an answer, that is the end. Where it has
    no way on, a token comes that it does not take, at which SGLang ends the request.
    """
    original(self, logits)
    open_closed_rows(logits)
    original(self, logits)
    open_closed_rows(logits)


def leave_one(result: None, self: Any, logits: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    """After ``SamplingBatchInfo.apply_logits_bias``: no row forbids everything."""
    orchestrator = self.penalizer_orchestrator
    if self.acc_additive_penalties is not None or (orchestrator is not None and orchestrator.is_required):
        open_closed_rows(logits)


def open_closed_rows(logits: torch.Tensor) -> None:
    """Every token becomes as good as any other in rows that forbid all; nothing here waits for a device."""
    logits.masked_fill_(logits.amax(dim=-1, keepdim=True) == -math.inf, 0.0)
