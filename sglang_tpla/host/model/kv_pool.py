"""Layers of different width and rows in bytes in SGLang's latent pool, and memory accounting that follows them.

An artifact with a per-layer policy gives layer l its own w_l; the pool's layer l is then ``[slots, 1, w_l + rope]``.
Sketched rows (``cache_rows/``) are bytes, ``[slots, 1, row_bytes]`` in a pool of SGLang's one-byte type; only
``host/attention/backend.py`` reads these rows. Where all layers have one width and plain rows the hooks do nothing. The
hooks follow ``MLATokenToKVPool`` of ``sglang/srt/mem_cache/memory_pool.py`` and ``calculate_mla_kv_cache_dim`` of
``.../kv_cache_configurator.py``.
"""

from collections.abc import Callable
from typing import Any

import torch

from sglang_tpla.host.model.draft_model import building_draft, draft_layers
from sglang_tpla.host.model.rows import row_format, sketched
from sglang_tpla.host.process import artifact


def layer_items(latent_dim: int, rope_dim: int, layers: int) -> list[int] | None:
    """Return the number of items of a row in every layer, or None where SGLang's own pool has the right number.

    Args:
        latent_dim: the engine's latent width. layers: the number of layers.
    """
    rows = row_format(latent_dim, rope_dim, layers)
    items = [layer.row_items for layer in rows.layers]
    return items if rows.encoded or len(set(items)) > 1 else None


def create_buffers(original: Callable[[Any], None], self: Any) -> None:
    """Hook around ``MLATokenToKVPool._create_buffers``: let SGLang allocate each layer with its own width.

    A draft model's pool is SGLang's own, with whole latents in the model's precision.
    """
    self.tpla_draft = building_draft()
    if self.tpla_draft:
        original(self)
        return
    layers, width = self.layer_num, self.kv_cache_dim
    items = layer_items(self.kv_lora_rank, self.qk_rope_head_dim, self.start_layer + layers)
    if items is None:
        original(self)
        return
    buffers: list[torch.Tensor] = []
    try:
        self.layer_num = 1
        for layer in range(self.start_layer, self.start_layer + layers):
            self.kv_cache_dim = items[layer]
            original(self)
            buffers += self.kv_buffer
    finally:
        self.layer_num, self.kv_cache_dim = layers, width
    self.kv_buffer = buffers


def value_buffer(original: Callable[..., torch.Tensor], self: Any, layer_id: int) -> torch.Tensor:
    """Hook around ``MLATokenToKVPool.get_value_buffer``: return the latent part ``[slots, 1, w_l]`` of a row.

    Raises:
        TypeError: rows in bytes, whose values mean nothing without their scales.
    """
    if self.tpla_draft:
        return original(self, layer_id)
    if sketched():
        raise TypeError("rows in bytes are read by --attention-backend tpla alone; ask for that backend")
    loaded = artifact()
    if loaded is None or len(set(loaded.meta.widths)) == 1:
        return original(self, layer_id)
    return self.get_key_buffer(layer_id)[..., : loaded.meta.widths[layer_id]]


def mean_cache_dim(
    original: Callable[..., int], *, model_config: Any, kv_cache_dtype: torch.dtype, **kwargs: Any
) -> float:
    """Hook around ``calculate_mla_kv_cache_dim``: return a row's mean items, which SGLang multiplies by the layers.

    A speculating server's draft layers count as well, because SGLang takes ``1 + draft layers / layers`` times the
    product, as if their rows were like the target's.
    """
    if getattr(model_config, "is_draft_model", False):
        return original(model_config=model_config, kv_cache_dtype=kv_cache_dtype, **kwargs)
    layers = model_config.num_hidden_layers
    items = layer_items(model_config.kv_lora_rank, model_config.qk_rope_head_dim, layers)
    drafts = draft_layers(model_config, kwargs.get("server_args"))
    if items is None and (drafts == 0 or artifact() is None):
        return original(model_config=model_config, kv_cache_dtype=kv_cache_dtype, **kwargs)
    if items is None:
        items = [original(model_config=model_config, kv_cache_dtype=kv_cache_dtype, **kwargs)] * layers
    total = float(sum(items))
    if drafts:  # latent and key in the model's precision
        text = model_config.hf_text_config
        row_bytes = (text.kv_lora_rank + text.qk_rope_head_dim) * model_config.dtype.itemsize
        total += drafts * row_bytes / kv_cache_dtype.itemsize
    return total / (len(items) + drafts)
