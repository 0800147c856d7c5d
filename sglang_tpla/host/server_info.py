"""TPLA's part of ``/server_info``: layout and cache at the top, the agent's counters in the internal state.

The hooks follow ``Scheduler.get_init_info`` and ``Scheduler.get_internal_state`` of
``sglang/srt/managers/scheduler.py``.
"""

from dataclasses import asdict
from typing import Any

from sglang.srt.runtime_context import get_parallel

from sglang_tpla.config import Layout
from sglang_tpla.host.model.rows import row_format
from sglang_tpla.host.process import HOOKED, artifact, settings


def startup_info(result: dict[str, Any], self: Any) -> dict[str, Any]:
    """Hook after ``get_init_info``, whose dictionary SGLang merges into ``/server_info``."""
    pool = self.token_to_kv_pool_allocator.get_kvcache()
    text = self.model_config.hf_text_config
    layout = Layout(get_parallel().attn_tp_size, settings().groups, text.num_attention_heads)
    rows = row_format(text.kv_lora_rank, text.qk_rope_head_dim, pool.layer_num)
    plain_bytes = self.model_config.dtype.itemsize * (text.kv_lora_rank + text.qk_rope_head_dim)  # of a layer's row
    loaded = artifact()
    result["tpla"] = {
        "role": settings().role,
        "groups": layout.groups,
        "head_shards": layout.head_shards,
        "o_proj": settings().o_proj,
        "latent_dim": text.kv_lora_rank,
        "rope_dim": text.qk_rope_head_dim,
        "rows": rows.kind,
        "widths": list(rows.widths),
        "sketch_bits": rows.sketch_bits,
        "artifact": settings().artifact,
        "artifact_sha256": loaded.content_hash if loaded else None,
        "transform": loaded.meta.transform if loaded else "none",
        "cache_bytes_per_token_and_rank": sum(buffer[0].nbytes for buffer in pool.kv_buffer),
        "mla_cache_bytes_per_token_and_rank": len(rows.layers) * plain_bytes,
        "hooks": list(HOOKED),
    }
    return result


def live_info(result: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Hook after ``get_internal_state``: add counters of this rank's transfer agent and its scheduler's load.

    The layout is added here too, because on a server with attention groups SGLang drops the entry of `startup_info`.
    """
    from sglang_tpla.host.disaggregation.kv_manager import agents

    startup_info(result.internal_state, self)
    result.internal_state["tpla_transfer"] = [asdict(agent.stats()) for agent in agents()]
    result.internal_state["tpla_scheduler"] = scheduler_load(self)
    return result


def scheduler_load(scheduler: Any) -> dict[str, int]:
    """Count requests in each of the disaggregation's queues, and cache slots and metadata rows in use.

    On an idle server all counts are zero except ``cached_tokens``, which the prefix cache holds and may evict.
    """
    bootstrap = scheduler.disagg_prefill_bootstrap_queue
    preallocation = scheduler.disagg_decode_prealloc_queue
    transfer = scheduler.disagg_decode_transfer_queue
    rows = scheduler.req_to_metadata_buffer_idx_allocator
    cached = scheduler.tree_cache.evictable_size()
    return {
        "bootstrap_queue": len(bootstrap.queue) if bootstrap else 0,
        "inflight_queue": len(scheduler.disagg_prefill_inflight_queue or ()),
        "preallocation_queue": len(preallocation.queue) if preallocation else 0,
        "transfer_queue": len(transfer.queue) if transfer else 0,
        "waiting_queue": len(scheduler.waiting_queue),
        "running_batch": len(scheduler.running_batch.reqs),
        "used_tokens": scheduler.max_total_num_tokens - scheduler.token_to_kv_pool_allocator.available_size() - cached,
        "cached_tokens": cached,
        "used_metadata_rows": rows.size - rows.available_size(),
    }
