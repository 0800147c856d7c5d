"""Layers of different width in SGLang's latent pool, and memory accounting that follows them.

An artifact with a per-layer policy gives layer l its own w_l; the pool's layer l is then ``[slots, 1, w_l + rope]``.
Where all layers have one width these hooks do nothing. Answers to ``MLATokenToKVPool`` in
``sglang/srt/mem_cache/memory_pool.py`` and ``calculate_mla_kv_cache_dim`` in ``.../kv_cache_configurator.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sglang_tpla.host.state import artifact


def varying_widths() -> tuple[int, ...] | None:
    """w_l of every layer, or None where they are all the same."""
    loaded = artifact()
    if loaded is None or len(set(loaded.meta.widths)) == 1:
        return None
    return tuple(loaded.meta.widths)


def create_buffers(original: Callable[[Any], None], self: Any) -> None:
    """Around ``MLATokenToKVPool._create_buffers``: SGLang allocates, one layer at a time with its own width."""
    widths = varying_widths()
    if widths is None:
        original(self)
        return
    layers, width = self.layer_num, self.kv_cache_dim
    buffers: list[torch.Tensor] = []
    try:
        self.layer_num = 1
        for layer in range(self.start_layer, self.start_layer + layers):
            self.kv_cache_dim = widths[layer] + self.qk_rope_head_dim
            original(self)
            buffers += self.kv_buffer
    finally:
        self.layer_num, self.kv_cache_dim = layers, width
    self.kv_buffer = buffers


def value_buffer(original: Callable[..., torch.Tensor], self: Any, layer_id: int) -> torch.Tensor:
    """Around ``MLATokenToKVPool.get_value_buffer``: the latent part ``[slots, 1, w_l]`` of a row."""
    widths = varying_widths()
    if widths is None:
        return original(self, layer_id)
    return self.get_key_buffer(layer_id)[..., : widths[layer_id]]


def mean_cache_dim(original: Callable[..., int], *, model_config: Any, **kwargs: Any) -> float:
    """Around ``calculate_mla_kv_cache_dim``: SGLang multiplies it with the number of layers."""
    widths = varying_widths()
    if widths is None:
        return original(model_config=model_config, **kwargs)
    return sum(widths) / len(widths) + model_config.qk_rope_head_dim
