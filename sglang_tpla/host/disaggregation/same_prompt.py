"""Proof that a decode server got the cache of its own prompt.

Each server turns a request into tokens by itself, and only the room connects the two. If two clients take one room, or
if tokenizers or chat templates differ, prefill's cache may belong to another prompt of the same length, and the
transfer cannot tell. So prefill leaves a digest of the tokens in the request's metadata row, in the last spare place of
``cached_tokens`` (``MetadataBuffers`` in ``sglang/srt/disaggregation/utils.py``), and decode compares the digest.
"""

import logging
import zlib
from array import array
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Any

from sglang.srt.disaggregation.utils import FAKE_BOOTSTRAP_HOST, prepare_abort

from sglang_tpla.host.requests.logprobs import keep_first_place

PLACE = 15  # the last of 16 places; SGLang uses places 0 to 6
logger = logging.getLogger(__name__)


def digest(tokens: Sequence[int]) -> int:
    """Return a digest of a prompt in 31 bits, never 0, because 0 marks a row without a digest."""
    return (zlib.crc32(array("q", tokens).tobytes()) & 0x7FFFFFFF) | 1


def leave_digest(result: Any, self: Any, req: Any) -> None:
    """Hook after ``MetadataBuffers.set_buf`` on prefill: leave the digest."""
    self.cached_tokens[req.metadata_buffer_index][PLACE] = digest(req.origin_input_ids)


def compare_digest(original: Callable[..., None], self: Any, decode_req: Any) -> None:
    """Hook around ``DecodeTransferQueue._commit_transfer_to_req``: fail the request over another prompt's cache."""
    req = decode_req.req
    found = int(self.metadata_buffers.cached_tokens[decode_req.metadata_buffer_index][PLACE])
    own_request = req.bootstrap_host in (None, FAKE_BOOTSTRAP_HOST)  # such a request has no transfer
    replayed = getattr(decode_req, "is_rebootstrap", False)  # prefill computed the answer so far as well
    if replayed:
        req.sampling_params.max_new_tokens += len(req.output_ids)  # the whole answer's limit again (`capacity.py`)
    if own_request or replayed or found in (0, digest(req.origin_input_ids)):
        original(self, decode_req)
        keep_first_place(req)
        return
    reason = (
        f"prefill computed another prompt than decode's in room {req.bootstrap_room}: let every request have a room of "
        "its own, and both servers the same tokenizer and chat template"
    )
    logger.error("%s, %s", reason, req.rid)
    prepare_abort(req, reason, status_code=HTTPStatus.BAD_REQUEST)
    decode_req.kv_receiver.clear()
    decode_req.kv_receiver = None
