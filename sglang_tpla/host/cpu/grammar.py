"""Grammars on a CPU: SGLang's use of xgrammar wants pinned memory and a Triton kernel, which only a device has.

Answers to ``sglang/srt/constrained/xgrammar_backend.py``. xgrammar itself masks logits on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
import xgrammar


def bitmask(vocab_size: int, batch_size: int) -> torch.Tensor:
    """In place of ``_allocate_token_bitmask``: all tokens allowed, in ordinary memory."""
    return xgrammar.allocate_token_bitmask(batch_size, vocab_size)


def mask(self: Any, logits: torch.Tensor, vocab_mask: torch.Tensor) -> None:
    """In place of ``XGrammarGrammar.apply_vocab_mask``, in place in ``logits`` [requests, vocab]."""
    xgrammar.apply_token_bitmask_inplace(logits, vocab_mask)


def mask_batch(logits: torch.Tensor, vocab_mask: torch.Tensor) -> None:
    """In place of ``XGrammarGrammarBackend.apply_vocab_mask``, which belongs to no grammar."""
    xgrammar.apply_token_bitmask_inplace(logits, vocab_mask)
