"""Model sizes stay as they are on the CPU reference platform.

SGLang pads intermediate sizes to a multiple of 32 a rank for its AMX kernels, on every device named "cpu", and fills
the padding only where those kernels are active: without them the padded weights would be uninitialised memory.
Answers to ``adjust_config_with_unaligned_cpu_tp`` in ``sglang/srt/configs/update_config.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def keep_sizes(original: Callable[..., Any], model_config: Any, load_config: Any, tp_size: int) -> Any:
    """Instead of ``adjust_config_with_unaligned_cpu_tp``."""
    return model_config
