"""Choose the cache write of a row format on a device: a kernel on a GPU, the PyTorch twin otherwise."""

from sglang_tpla.attention.cache_write import plain, reference, sketched
from sglang_tpla.attention.cache_write.inputs import CacheWrite


def write(new: CacheWrite) -> None:
    if not new.cache.is_cuda or (new.sketched is not None and not sketched.serves(new.sketched.rows)):
        reference.write(new)
    elif new.sketched is not None:
        sketched.launch(new)
    else:
        plain.launch(new)
