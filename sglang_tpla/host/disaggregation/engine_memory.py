"""Tensors over the engine's memory, from the pointers that ``KVArgs`` hands to a transfer backend.

``kv_data_ptrs`` has a pointer for each layer, to ``[slots, 1, w + rope]`` (``MLATokenToKVPool`` in
``sglang/srt/mem_cache/memory_pool.py``) or to rows in bytes (``kv_pool.py``); ``aux_data_ptrs`` has one for each
metadata buffer, to ``[rows, ...]``.
"""

import ctypes
from typing import Any

import numpy as np
import torch

from sglang_tpla.cache_rows.row_format import RowFormat
from sglang_tpla.config import ConfigError
from sglang_tpla.host import compat
from sglang_tpla.transfer.memory.pool import CachePool, MetadataRows
from sglang_tpla.transfer.room import NO_LIMITS, Limits

BYTES_CACHE = "fp8_e4m3"  # SGLang's name for a pool of bytes, which sketched rows are kept in
RESERVED_INPUT_TOKENS = 5  # SGLang refuses a prompt that leaves fewer tokens
CACHE_DTYPES = {"bf16": torch.bfloat16, "bfloat16": torch.bfloat16}


class _CudaBytes:
    """Raw device memory, in the description that torch imports."""

    def __init__(self, pointer: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {"shape": (nbytes,), "typestr": "|u1", "data": (pointer, False), "version": 2}


def bytes_at(pointer: int, nbytes: int, device: torch.device) -> torch.Tensor:
    """Return a uint8 view ``[nbytes]`` of memory that another owner keeps alive."""
    if device.type == "cuda":
        return torch.as_tensor(_CudaBytes(pointer, nbytes), device=device)
    return torch.frombuffer((ctypes.c_uint8 * nbytes).from_address(pointer), dtype=torch.uint8)


def cache_dtype(kv_args: Any, server_args: Any) -> torch.dtype:
    """Return the element type of the pool."""
    name = kv_args.kv_cache_dtype_str
    if name == "auto":
        return compat.model_config(server_args).dtype
    if name not in CACHE_DTYPES:
        raise ConfigError(
            f"a cache of {name} is not transferred: expected the model's dtype; use --kv-cache-dtype "
            f"{' or '.join(CACHE_DTYPES)} (auto takes what a quantised checkpoint says), or --tpla-rows sketched on "
            "decode for an 8-bit cache"
        )
    return CACHE_DTYPES[name]


def cache_pool(kv_args: Any, server_args: Any, rows: RowFormat | None = None) -> CachePool:
    """Return the rank's latent pool, with one ``[slots, items]`` tensor for each layer.

    Args:
        rows: formats of each layer's rows; None stands for plain rows.

    Raises:
        ConfigError: a pool of other rows than latents, or with state that is not transferred.
    """
    if kv_args.state_types:
        raise ConfigError(
            f"the engine's cache also holds {[str(state) for state in kv_args.state_types]}, which sglang_tpla does "
            "not transfer; serve this model with another transfer backend"
        )
    encoded = rows is not None and rows.encoded
    dtype = torch.uint8 if encoded else cache_dtype(kv_args, server_args)
    device = (
        torch.device("cuda", kv_args.gpu_id) if compat.resolved(server_args).device == "cuda" else torch.device("cpu")
    )
    layers = [
        bytes_at(pointer, nbytes, device).view(dtype).view(-1, item // kv_args.page_size // dtype.itemsize)
        for pointer, nbytes, item in zip(kv_args.kv_data_ptrs, kv_args.kv_data_lens, kv_args.kv_item_lens, strict=True)
    ]
    text = compat.model_config(server_args).hf_text_config
    return CachePool(layers, text.kv_lora_rank, text.qk_rope_head_dim, kv_args.page_size, encoding=rows)


def prompt_limits(kv_args: Any, server_args: Any) -> Limits:
    """Return the longest prompt that the scheduler of this rank takes.

    The limit follows ``get_worker_info`` in ``managers/tp_worker.py`` and, on decode,
    ``_check_if_req_exceed_kv_capacity`` with the tokens that a request must find free beside its prompt.
    """
    args = compat.resolved(server_args)
    if args.allow_auto_truncate:
        return NO_LIMITS
    page = kv_args.page_size
    pool_tokens = (
        min(nbytes // item * page for nbytes, item in zip(kv_args.kv_data_lens, kv_args.kv_item_lens, strict=True))
        - page
    )  # the first page belongs to no request
    longest = pool_tokens - 1 - RESERVED_INPUT_TOKENS - 1
    if args.disaggregation_mode == "decode":
        longest = min(longest, pool_tokens - args.num_reserved_decode_tokens)
    context_tokens = compat.model_config(server_args).context_len - 1 - RESERVED_INPUT_TOKENS - 1
    return Limits(max(1, context_tokens), max(1, longest))


def metadata_rows(kv_args: Any) -> MetadataRows:
    """Return SGLang's metadata buffers (first token, logprobs, hidden states ...) as byte rows."""
    return MetadataRows(
        [
            np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(pointer)).reshape(-1, item)
            for pointer, nbytes, item in zip(
                kv_args.aux_data_ptrs, kv_args.aux_data_lens, kv_args.aux_item_lens, strict=True
            )
        ]
    )
