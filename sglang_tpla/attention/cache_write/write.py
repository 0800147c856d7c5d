"""The cache write that serves a row format on a device: a kernel on a GPU, the PyTorch twin elsewhere."""

from __future__ import annotations

from sglang_tpla.attention.cache_write import fp8, plain, reference
from sglang_tpla.attention.cache_write.inputs import CacheWrite


def write(new: CacheWrite) -> None:
    """Write the new tokens' rows."""
    if not new.cache.is_cuda or new.sketched is not None:
        reference.write(new)
    elif new.fp8_shared is not None:
        fp8.write(new)
    else:
        plain.write(new)
