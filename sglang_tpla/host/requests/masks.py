"""Leave a token to requests that forbid every token.

A grammar masks tokens, ``min_new_tokens`` masks the end of the answer, and ``logit_bias`` masks any token. Together, or
at a dead end of a grammar, they may leave no token; probabilities are then NaN, and sampling ends the server.
"""

import math
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import torch

from sglang_tpla.transfer.room import REFUSED


def apply_grammar(original: Callable[..., None], self: Any, logits: torch.Tensor) -> None:
    """Hook around ``GrammarMask.apply`` for ``logits`` [requests, vocab], those of verified guesses included.

    A grammar takes precedence over earlier masks: an answer ends where the grammar demands the end. At a dead end of
    the grammar, sampling gives a token that the grammar does not accept, and SGLang then ends the request.
    """
    original(self, logits)
    open_closed_rows(logits)
    original(self, logits)
    open_closed_rows(logits)


def leave_one(result: None, self: Any, logits: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    """Hook after ``SamplingBatchInfo.apply_logits_bias``: leave no row that forbids every token."""
    orchestrator = self.penalizer_orchestrator
    if self.acc_additive_penalties is not None or (orchestrator is not None and orchestrator.is_required):
        open_closed_rows(logits)


def blame_request(
    result: None, self: Any, message: str | None = None, status_code: Any = None, *args: Any, **kwargs: Any
) -> None:
    """Hook after ``FINISH_ABORT.__init__``: answer 400 where the fault is the request's, not the server's.

    The request is at fault where its grammar has a dead end, and where the other server refused it. Routers retry a
    request that ends with 500, until they close the service to everyone.
    """
    text = message or ""
    if status_code is not None and (text.startswith("Grammar accept_token failed") or REFUSED in text):
        self.status_code = HTTPStatus.BAD_REQUEST


def open_closed_rows(logits: torch.Tensor) -> None:
    """Make all tokens equal in rows that forbid every one, without waiting for a device."""
    logits.masked_fill_(logits.amax(dim=-1, keepdim=True) == -math.inf, 0.0)
