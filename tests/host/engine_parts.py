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


def stub_runner(requests: Any, pool: Any, cache_dtype: torch.dtype, **config: Any) -> Any:
    """A model runner of a server without speculation, as an attention backend reads it; ``config`` is the model's."""
    return SimpleNamespace(
        device="cpu", gpu_id=0, req_to_token_pool=requests, token_to_kv_pool=pool, kv_cache_dtype=cache_dtype,
        is_draft_worker=False, server_args=SimpleNamespace(speculative_algorithm=None, get_model_config=None),
        model_config=SimpleNamespace(dtype=torch.float32, **config),
    )  # fmt: skip
