"""Undo SGLang's changes to a model whose device is named "cpu", on the CPU reference platform.

- Rotary embedding: SGLang's CPU path knows only ``deepseek_yarn``; its general factory has the plain embedding, in
  PyTorch. The hook follows ``get_rope_cpu`` of ``sglang/srt/layers/rotary_embedding/factory.py``.
- Sizes: SGLang pads intermediate sizes to a multiple of 32 a rank for its AMX kernels and fills the padding only where
  those kernels are active; elsewhere the padded weights would be uninitialised memory. The hook follows
  ``adjust_config_with_unaligned_cpu_tp`` of ``sglang/srt/configs/update_config.py``.
"""

from collections.abc import Callable
from typing import Any


def rope(
    original: Callable[..., Any],
    head_size: int,
    rotary_dim: int,
    max_position: int,
    base: int,
    is_neox_style: bool = True,
    rope_scaling: dict[str, Any] | None = None,
    dtype: Any = None,
    partial_rotary_factor: float = 1.0,
    device: str | None = None,
) -> Any:
    """Hook around ``get_rope_cpu``: make the plain embedding where there is no scaling."""
    common = (head_size, rotary_dim, max_position, base, is_neox_style, rope_scaling, dtype, partial_rotary_factor)
    if rope_scaling is not None:
        return original(*common, device)
    from sglang.srt.layers.rotary_embedding.factory import get_rope

    return get_rope(*common)


def keep_sizes(original: Callable[..., Any], model_config: Any, load_config: Any, tp_size: int) -> Any:
    """Replace ``adjust_config_with_unaligned_cpu_tp``, and leave the config unchanged."""
    return model_config
