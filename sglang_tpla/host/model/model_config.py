"""The engine's view of the model on a decode rank: latent width w instead of d, and H*g heads.

Pool, memory accounting and attention plans follow ``ModelConfig.kv_lora_rank`` and ``ModelConfig.num_attention_heads //
tp``; the model itself reads its own config, which stays unchanged. With H*g heads each rank's share is the H*g/T heads
that a rank of g groups computes. The hook follows ``sglang/srt/configs/model_config.py``.
"""

from typing import Any

from sglang_tpla.host.process import artifact, settings


def slice_shape(result: None, self: Any, *args: Any, **kwargs: Any) -> None:
    """Hook after ``ModelConfig.__init__``: set the slice's width and H*g heads."""
    loaded = artifact()
    if loaded is None or getattr(self, "is_draft_model", False):
        return
    self.kv_lora_rank = max(loaded.meta.widths)  # kv_pool.py gives layers their own widths
    self.num_attention_heads *= settings().groups
