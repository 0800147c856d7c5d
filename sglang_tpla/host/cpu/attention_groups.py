"""Data-parallel attention on a CPU, where SGLang copies and pads as on a device unless its own CPU engine runs.

From 0.5.19 on SGLang has a code path for CPUs, but the switch for that path also asks for AMX kernels. These hooks take
the path without the switch. They follow ``sglang/srt/layers/dp_attention.py`` and
``sglang/srt/model_executor/forward_batch_info.py``.
"""

from collections.abc import Callable
from typing import Any

import torch


def copy_rows(target: torch.Tensor, source: torch.Tensor, dim: int, offset: Any, rows: Any, from_offset: bool) -> None:
    """Replace ``memcpy``: copy ``rows`` rows from ``offset`` of the source, or to ``offset`` of the target."""
    from sglang.srt.layers import dp_attention

    dp_attention.memcpy_cpu(target, source, dim, offset, rows, from_offset)


def padding_mode(cls: Any, is_extend_in_batch: bool, global_num_tokens: list[int]) -> Any:
    """Replace ``DpPaddingMode.get_dp_padding_mode``: gather tokens by a sum, because gloo has no reduce-scatter."""
    return cls.SUM_LEN


def prepare(original: Callable[..., None], batch: Any, model_runner: Any) -> None:
    """Hook around ``ForwardBatch.prepare_mlp_sync_batch``: use unpinned memory and the CPU's padding.

    ``TorchNativeAttnBackend`` names no length for a request that only pads; here such a request has one token.
    """
    from sglang.srt.model_executor import forward_batch_info

    backend, before = model_runner.attn_backend, forward_batch_info._is_cpu
    if not hasattr(backend, "get_cpu_graph_seq_len_fill_value"):
        backend.get_cpu_graph_seq_len_fill_value = lambda: 1
    forward_batch_info._is_cpu = True
    try:
        original(batch, model_runner)
    finally:
        forward_batch_info._is_cpu = before
