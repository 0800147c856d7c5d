"""Proof that a decode server got the cache of its own prompt.

Both servers turn a request into tokens, each for itself, and only the room joins the two. Where two clients take one
room, or where tokenizers or chat templates differ, prefill's cache can be another prompt's of the same length, and
nothing in the transfer tells. So prefill leaves a digest of the tokens in the request's metadata row, in the last of
the spare places of ``cached_tokens`` (``MetadataBuffers`` in ``sglang/srt/disaggregation/utils.py``), and decode
compares.
"""

from __future__ import annotations

import logging
import zlib
from array import array
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Any

from sglang.srt.disaggregation.utils import FAKE_BOOTSTRAP_HOST, prepare_abort

PLACE = 15  # of 16; SGLang uses 0 to 6
logger = logging.getLogger(__name__)


def digest(tokens: Sequence[int]) -> int:
    """31 bits that tell a prompt from others, never 0: that is a row without a digest."""
    return (zlib.crc32(array("q", tokens).tobytes()) & 0x7FFFFFFF) | 1


def leave_digest(result: Any, self: Any, req: Any) -> None:
    """After ``MetadataBuffers.set_buf`` on prefill."""
    self.cached_tokens[req.metadata_buffer_index][PLACE] = digest(req.origin_input_ids)


def compare_digest(original: Callable[..., None], self: Any, decode_req: Any) -> None:
    """Around ``DecodeTransferQueue._commit_transfer_to_req``: another prompt's cache fails the request."""
    req = decode_req.req
    found = int(self.metadata_buffers.cached_tokens[decode_req.metadata_buffer_index][PLACE])
    own_request = req.bootstrap_host in (None, FAKE_BOOTSTRAP_HOST)  # nothing was transferred
    replayed = getattr(decode_req, "is_rebootstrap", False)  # prefill computed the answer so far as well
    if own_request or replayed or found in (0, digest(req.origin_input_ids)):
        original(self, decode_req)
        return
    reason = (
        f"prefill computed another prompt than decode's in room {req.bootstrap_room}: let every request have a room of "
        "its own, and both servers the same tokenizer and chat template"
    )
    logger.error("%s, %s", reason, req.rid)
    prepare_abort(req, reason, status_code=HTTPStatus.BAD_REQUEST)
    decode_req.kv_receiver.clear()
    decode_req.kv_receiver = None
