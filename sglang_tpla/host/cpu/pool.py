"""Latent pool and allocator of the CPU reference platform: plain indexing where SGLang has Triton kernels.

The pool follows ``MLATokenToKVPool`` of ``sglang/srt/mem_cache/memory_pool.py``.
"""

from typing import Any

import torch
from sglang.srt.mem_cache.allocator.token import TokenToKVPoolAllocator
from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool

from sglang_tpla.config import ConfigError


class CpuLatentPool(MLATokenToKVPool):
    """SGLang's latent pool, written and read by plain indexing instead of Triton kernels."""

    def __init__(self, *args: Any, index_head_dim: int | None = None, **kwargs: Any) -> None:
        if index_head_dim is not None:
            raise ConfigError("the CPU reference platform serves no sparse-attention (DSA) model; use a GPU")
        super().__init__(*args, **kwargs)

    def _write_mla_kv_buffer(
        self,
        dst_buffer: torch.Tensor,  # [slots, 1, w + rope]
        loc: torch.Tensor,  # [tokens]
        cache_k_nope: torch.Tensor,  # [tokens, 1, w]
        cache_k_rope: torch.Tensor,  # [tokens, 1, rope]
    ) -> None:
        dst_buffer[loc] = torch.cat((cache_k_nope, cache_k_rope), dim=-1).to(dst_buffer.dtype)

    def get_mla_kv_buffer(
        self, layer: Any, loc: torch.Tensor, dst_dtype: torch.dtype | None = None
    ) -> tuple[torch.Tensor, ...]:
        rows = self.get_key_buffer(layer.layer_id)[loc].to(dst_dtype or self.dtype)
        return rows.split((self.kv_lora_rank, self.qk_rope_head_dim), dim=-1)


def single_token_allocator(size: int, *, page_size: int, **kwargs: Any) -> TokenToKVPoolAllocator:
    if page_size != 1:
        raise ConfigError(
            f"the CPU reference platform pages its cache by single tokens; got --page-size {page_size}, "
            "use --page-size 1"
        )
    return TokenToKVPoolAllocator(size, **kwargs)
