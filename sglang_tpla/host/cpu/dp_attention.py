"""Data-parallel attention on the CPU reference platform: the two things for which SGLang has kernels or graphs alone.

The groups' tokens are put side by side before the experts, and taken apart after them, by a Triton kernel; and a
batch that is shorter than the other groups' is padded with requests whose length only backends with CUDA graphs know.
Answers to ``memcpy_triton`` in ``sglang/kernels/ops/memory/memcpy_triton.py`` and to ``AttentionBackend`` in
``sglang/srt/layers/attention/base_attn_backend.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def copy_rows(
    original: Callable[..., None],
    dst: torch.Tensor,  # [rows, ...]
    src: torch.Tensor,  # [other rows, ...]
    dim: int,
    offset: Any,
    sz: Any,
    offset_src: bool,
) -> None:
    """Around ``memcpy_triton``: ``sz`` rows from or to row ``offset`` of the longer tensor, as far as both reach."""
    if dst.is_cuda:
        original(dst, src, dim, offset, sz, offset_src)
        return
    first, count = int(offset), int(sz)
    longer, shorter = (src, dst) if offset_src else (dst, src)
    count = max(0, min(count, len(shorter), len(longer) - first))
    if offset_src:
        dst[:count] = src[first : first + count]
    else:
        dst[first : first + count] = src[:count]


def padded_length(original: Callable[[Any], int], self: Any) -> int:
    """Around ``get_cuda_graph_seq_len_fill_value``: a request that fills up a batch has one token."""
    try:
        return original(self)
    except NotImplementedError:
        return 1
