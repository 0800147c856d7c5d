"""Tell the draft model of a speculating server from its target model while SGLang builds them.

A server that speculates runs two model runners in one process. The target's attention layers and cache are sliced; the
draft's stay whole, because nobody has calibrated its one layer and its guesses depend on it. SGLang marks the runner
(``is_draft_worker``) and not the layers: a draft layer looks like any other unless it is a NextN layer. So this module
carries the mark from the runner to the layers and cache that it builds. The hooks follow ``ModelRunner.load_model`` and
``ModelRunner.alloc_memory_pool`` of ``sglang/srt/model_executor/model_runner.py``.
"""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from sglang_tpla.host import compat

_building_draft: ContextVar[bool] = ContextVar("sglang_tpla_building_draft", default=False)


def mark_runner(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """Hook around the runner's methods that build layers and the cache."""
    token = _building_draft.set(bool(self.is_draft_worker))
    try:
        return original(self, *args, **kwargs)
    finally:
        _building_draft.reset(token)


def keep_precision(result: None, self: Any) -> None:
    """Hook after ``configure_kv_cache_dtype``: give a draft's cache the model's precision beside any target's rows."""
    if self.is_draft_worker and self.kv_cache_dtype.itemsize == 1:
        self.kv_cache_dtype, self.kv_cache_dtype_str = self.dtype, "auto"


def building_draft() -> bool:
    """Return whether a draft model's layers or cache are being built in this context."""
    return _building_draft.get()


def draft_layers(model_config: Any, server_args: Any) -> int:
    """Return how many draft layers' rows share the target's slots on this server; 0 without speculation."""
    if not compat.speculates(server_args):
        return 0
    return int(getattr(model_config.hf_text_config, "num_nextn_predict_layers", None) or 1)
