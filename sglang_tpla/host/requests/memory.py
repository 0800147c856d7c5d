"""Refuse releases of memory that was released, and resumes of memory that was not.

SGLang (``scheduler_components/weight_updater.py``) finds out in the middle: it would save the buffers of released
weights, or forget which tags are released before it fails.
"""

from collections.abc import Callable
from typing import Any

from sglang.srt.constants import GPU_MEMORY_ALL_TYPES
from sglang.srt.managers.io_struct import ReleaseMemoryOccupationReqInput, ResumeMemoryOccupationReqInput

from sglang_tpla.host.requests.fields import RequestRefused


def check_release(updater: Any, request: Any) -> None:
    if wrong := sorted(updater.offload_tags & memory_tags(request)):
        raise RequestRefused(f"already released: {', '.join(wrong)}; /resume_memory_occupation comes first")


def check_resume(updater: Any, request: Any) -> None:
    if wrong := sorted(memory_tags(request) - updater.offload_tags):
        raise RequestRefused(f"not released: {', '.join(wrong)}; /release_memory_occupation comes first")


def memory_tags(request: Any) -> set[str]:
    """Return the tags of a request, which stand for all tags if there are none."""
    tags = request.tags or list(GPU_MEMORY_ALL_TYPES)
    if len(set(tags)) < len(tags) or not set(tags) <= set(GPU_MEMORY_ALL_TYPES):
        raise RequestRefused(f"tags must differ and be among {', '.join(GPU_MEMORY_ALL_TYPES)}; got {tags!r:.80}")
    return set(tags)


CHECKS: dict[type, Callable[[Any, Any], None]] = {
    ReleaseMemoryOccupationReqInput: check_release,
    ResumeMemoryOccupationReqInput: check_resume,
}
