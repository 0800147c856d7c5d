"""Parts of SGLang that moved between the supported releases, and stand-ins for others."""

import importlib
from types import ModuleType, SimpleNamespace
from typing import Any

import torch


def attention_boundary() -> ModuleType:
    """The module with ``AttentionInputs`` and ``get_attn_tp_context``."""
    try:
        return importlib.import_module("sglang.srt.layers.communicator")
    except ModuleNotFoundError:  # 0.5.22 on
        return importlib.import_module("sglang.srt.layers.layer_boundary.adapters.attention")


def cpu_pool(slots: int, latent: int, rope: int, layers: int, dtype: torch.dtype) -> Any:
    """The latent pool of a server on a CPU."""
    from sglang_tpla.host.cpu.pool import CpuLatentPool

    return CpuLatentPool(
        slots, page_size=1, dtype=dtype, kv_lora_rank=latent, qk_rope_head_dim=rope, layer_num=layers, device="cpu",
        enable_memory_saver=False,
    )  # fmt: skip


def batch_of(mode: str, requests: list[int], lengths: list[int], **more: Any) -> Any:
    """A batch of a forward as an attention backend reads it."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    return SimpleNamespace(
        forward_mode=ForwardMode[mode],
        batch_size=len(requests),
        req_pool_indices=torch.tensor(requests),
        seq_lens=torch.tensor(lengths),
        **more,
    )


def stub_runner(requests: Any, pool: Any, cache_dtype: torch.dtype, verified: int = 1, **config: Any) -> Any:
    """A target's model runner as an attention backend reads it; ``config`` is the model's.

    Args:
        verified: tokens that are verified at once; 1 without speculation.
    """
    args = SimpleNamespace(
        speculative_algorithm="EAGLE" if verified > 1 else None, speculative_num_draft_tokens=verified,
        get_model_config=None,
    )  # fmt: skip
    return SimpleNamespace(
        device="cpu", gpu_id=0, req_to_token_pool=requests, token_to_kv_pool=pool, kv_cache_dtype=cache_dtype,
        is_draft_worker=False, server_args=args, model_config=SimpleNamespace(dtype=torch.float32, **config),
    )  # fmt: skip
