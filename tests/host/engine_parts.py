"""Parts of SGLang that tests use and that moved between the supported releases."""

from __future__ import annotations

import importlib
from types import ModuleType


def attention_boundary() -> ModuleType:
    """The module with ``AttentionInputs`` and ``get_attn_tp_context``."""
    try:
        return importlib.import_module("sglang.srt.layers.communicator")
    except ModuleNotFoundError:  # 0.5.22 on
        return importlib.import_module("sglang.srt.layers.layer_boundary.adapters.attention")
