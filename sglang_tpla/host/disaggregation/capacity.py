"""Refuse prompts that never fit at once, with the number, and tell the other side.

The hook is around ``_check_if_req_exceed_kv_capacity`` of ``PrefillBootstrapQueue`` and ``DecodePreallocQueue`` in
``sglang/srt/disaggregation/{prefill,decode}.py``, which check a request before its sender or receiver is made. SGLang's
decode compares the prompt with its whole cache. A prompt that fits there, but not with the tokens that SGLang reserves
for decoding, would wait at the head of the queue for ever, and so would every request behind it.
"""

from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from sglang.srt.disaggregation.utils import prepare_abort

from sglang_tpla.host.disaggregation.kv_manager import TplaKVManager
from sglang_tpla.transfer.room import REFUSED


def exceeds(original: Callable[..., bool], self: Any, req: Any) -> bool:
    """Return whether a request was refused; otherwise note its length for the room that is opened next."""
    manager = self.kv_manager
    if not isinstance(manager, TplaKVManager):
        return original(self, req)
    tokens = len(req.origin_input_ids)
    refused = original(self, req)
    if not refused and manager.agent.role == "decode" and (why := never_fits(self, tokens)):
        prepare_abort(req, why, status_code=HTTPStatus.BAD_REQUEST)
        self.scheduler.output_streamer.stream_output([req], req.return_logprob)
        refused = True
    if refused:
        reason = f"the {manager.agent.role} server {REFUSED}a prompt of {tokens} tokens does not fit"
        manager.decline(req.bootstrap_room, req.bootstrap_host, req.bootstrap_port, reason)
    elif req.bootstrap_room is not None:
        manager.note_prompt(req.bootstrap_room, tokens)
    return refused


def never_fits(queue: Any, tokens: int) -> str:
    """Return the reason for which a prompt would wait for ever; empty if it would not."""
    most = queue.max_total_num_tokens - queue.num_reserved_decode_tokens
    if tokens <= most:
        return ""
    return (
        f"the prompt has {tokens} tokens, and this decode server takes at most {most}: its cache has "
        f"{queue.max_total_num_tokens}, of which {queue.num_reserved_decode_tokens} are kept free for decoding "
        "(--num-reserved-decode-tokens)"
    )
