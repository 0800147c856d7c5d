"""What ``/server_info`` says of TPLA: layout and cache at the top, the agent's counters in the internal state.

Answers to ``Scheduler.get_init_info`` and ``Scheduler.get_internal_state`` in ``sglang/srt/managers/scheduler.py``.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from sglang_tpla.config import Layout
from sglang_tpla.host.state import artifact, describe, settings


def startup_info(result: dict[str, Any], self: Any) -> dict[str, Any]:
    """After ``get_init_info``: SGLang merges this dictionary into ``/server_info``."""
    pool = self.token_to_kv_pool_allocator.get_kvcache()
    text = self.model_config.hf_text_config
    layout = Layout(self.ps.attn_tp_size, settings().groups, text.num_attention_heads)
    loaded = artifact()
    widths = tuple(loaded.meta.widths) if loaded else (text.kv_lora_rank,) * pool.layer_num
    result["tpla"] = describe(layout, text.kv_lora_rank, text.qk_rope_head_dim, widths, pool.dtype.itemsize)
    return result


def live_info(result: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """After ``get_internal_state``: counters of this rank's transfer agent."""
    from sglang_tpla.host.transfer_backend import agents

    result.internal_state["tpla_transfer"] = [asdict(agent.stats()) for agent in agents()]
    return result
