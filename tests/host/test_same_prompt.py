"""A cache of another prompt fails the request in any room."""

from array import array
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest


@pytest.fixture(scope="module")
def buffers(imported: None) -> Any:
    """SGLang's own metadata rows."""
    import torch
    from sglang.srt.disaggregation.utils import MetadataBuffers

    return MetadataBuffers(4, 8, torch.float32, max_sampling_mask_tokens=64)


def computed(buffers: Any, tokens: list[int]) -> None:
    """Leave a request in the buffers as prefill does."""
    from sglang_tpla.host.disaggregation.same_prompt import leave_digest

    counts = dict.fromkeys(("cached_tokens", "cached_tokens_device", "cached_tokens_host", "cached_tokens_storage"), 7)
    req = SimpleNamespace(
        metadata_buffer_index=2, output_ids=[5], multimodal_inputs=None, return_logprob=False,
        return_sampling_mask=False, hidden_states_tensor=None, bootstrap_room=9, output_topk_p=None,
        origin_input_ids=array("q", tokens), get_mm_token_counts=lambda: (0, 0, 0), **counts,
    )  # fmt: skip
    buffers.set_buf(req)
    leave_digest(None, buffers, req)


def committed(buffers: Any, tokens: list[int], **changes: Any) -> tuple[bool, Any]:
    """Commit a request's cache, and return whether decode goes on with the cache, and the request."""
    from sglang_tpla.host.disaggregation.same_prompt import compare_digest

    req = SimpleNamespace(
        origin_input_ids=array("q", tokens), bootstrap_host="p", bootstrap_room=9, rid="a", return_logprob=False,
        finished_reason=None, output_ids=[], sampling_params=SimpleNamespace(max_new_tokens=5),
    )  # fmt: skip
    vars(req).update({k: v for k, v in changes.items() if k == "bootstrap_host"})
    decode_req = SimpleNamespace(
        req=req, metadata_buffer_index=2, kv_receiver=Mock(), is_rebootstrap=changes.get("is_rebootstrap", False)
    )
    original = Mock()
    compare_digest(original, SimpleNamespace(metadata_buffers=buffers), decode_req)
    assert original.called is (decode_req.kv_receiver is not None)
    return original.called, req


def test_the_same_prompt_goes_on(buffers: Any) -> None:
    computed(buffers, [1, 2, 3])
    assert committed(buffers, [1, 2, 3])[0]
    assert buffers.cached_tokens[2].tolist()[:4] == [7] * 4  # SGLang's own numbers beside it


@pytest.mark.parametrize("other", [[1, 2, 4], [3, 2, 1], [1, 2], [1, 2, 3 + 2**32]])
def test_another_prompt_fails_with_the_reason(buffers: Any, other: list[int]) -> None:
    computed(buffers, [1, 2, 3])
    went_on, req = committed(buffers, other)
    assert not went_on
    assert req.finished_reason.status_code == 400 and "another prompt" in req.finished_reason.message


def test_rows_that_no_prefill_server_of_ours_wrote(buffers: Any) -> None:
    """These are a server's request to itself, one whose answer was computed anew, and a row without a digest."""
    computed(buffers, [1, 2, 3])
    assert committed(buffers, [9], bootstrap_host="2.2.2.2")[0]
    assert committed(buffers, [9], is_rebootstrap=True)[0]
    buffers.cached_tokens[2] = 0
    assert committed(buffers, [9])[0]
