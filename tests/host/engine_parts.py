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
