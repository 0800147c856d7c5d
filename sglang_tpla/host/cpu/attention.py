"""Prefill attention of the CPU reference platform: queries of this chunk only.

SGLang's ``torch_native`` backend pads a chunk's queries to the whole sequence, so each chunk of a long prompt costs
the square of the sequence. Here a chunk of q tokens over n cached ones costs q * n, and the heads, which share one
latent, are rows of one matrix product. The hook follows ``TorchNativeAttnBackend._run_sdpa_forward_extend`` of
``sglang/srt/layers/attention/torch_native_backend.py``.
"""

from collections.abc import Callable
from typing import Any

import torch

ROWS = 4096  # query rows (tokens x heads) of one block: bounds the score matrix


def extend(
    original: Callable[..., torch.Tensor],
    self: Any,
    query: torch.Tensor,  # [tokens, heads, w + rope]
    output: torch.Tensor,  # [tokens, heads, w]
    k_cache: torch.Tensor,  # [slots, kv_heads, w + rope]
    v_cache: torch.Tensor,  # [slots, kv_heads, w]
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    extend_prefix_lens: torch.Tensor,
    extend_seq_lens: torch.Tensor,
    encoder_lens: torch.Tensor | None = None,
    scaling: float = 1.0,
    causal: bool = False,
    sliding_window_size: int | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    """Hook around ``_run_sdpa_forward_extend``, only for causal attention over one shared latent head."""
    # Without a prefix SGLang's own step pads nothing, and equals stock SGLang to the last bit.
    unpadded = not bool(extend_prefix_lens.any())
    plain = causal and encoder_lens is None and sliding_window_size is None
    if unpadded or k_cache.shape[1] != 1 or not plain:
        return original(
            self, query, output, k_cache, v_cache, req_to_token, req_pool_indices, seq_lens, extend_prefix_lens,
            extend_seq_lens, encoder_lens, scaling=scaling, causal=causal, sliding_window_size=sliding_window_size,
            **kwargs,
        )  # fmt: skip
    heads, step = query.shape[1], max(1, ROWS // query.shape[1])
    start = 0
    for row, length, prefix, count in zip(
        req_pool_indices.tolist(), seq_lens.tolist(), extend_prefix_lens.tolist(), extend_seq_lens.tolist(), strict=True
    ):
        slots = req_to_token[row, :length]
        keys, values = k_cache[slots, 0].to(query.dtype), v_cache[slots, 0].to(query.dtype)  # [length, ...]
        for first in range(0, count, step):
            block = query[start + first : start + min(first + step, count)]  # [q, heads, w + rope]
            seen = prefix + first + block.shape[0]
            scores = (block.flatten(0, 1) @ keys[:seen].T).float().view(-1, heads, seen) * scaling
            positions = torch.arange(prefix + first, seen)
            scores.masked_fill_((torch.arange(seen) > positions[:, None])[:, None], float("-inf"))
            weights = scores.softmax(-1).to(query.dtype)
            output[start + first : start + first + len(block)] = (weights.flatten(0, 1) @ values[:seen]).view(
                len(block), heads, -1
            )
        start += count
    return output
