"""Grammars on a CPU: SGLang's use of xgrammar needs pinned memory and a Triton kernel, which only a device offers.

The hooks follow ``sglang/srt/constrained/xgrammar_backend.py``. xgrammar itself masks logits on a CPU.
"""

from typing import Any

import torch
import xgrammar


def bitmask(vocab_size: int, batch_size: int) -> torch.Tensor:
    """Replace ``_allocate_token_bitmask``: allow all tokens, in ordinary memory."""
    return xgrammar.allocate_token_bitmask(batch_size, vocab_size)


def mask(self: Any, logits: torch.Tensor, vocab_mask: torch.Tensor) -> None:
    """Replace ``XGrammarGrammar.apply_vocab_mask``: mask ``logits`` [requests, vocab] in place."""
    xgrammar.apply_token_bitmask_inplace(logits, vocab_mask)


def mask_batch(logits: torch.Tensor, vocab_mask: torch.Tensor) -> None:
    """Replace ``XGrammarGrammarBackend.apply_vocab_mask``, which takes no grammar."""
    xgrammar.apply_token_bitmask_inplace(logits, vocab_mask)
