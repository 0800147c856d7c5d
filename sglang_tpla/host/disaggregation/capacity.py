"""Refuse at once prompts that can never fit, with the number of tokens that do, and tell the other server.

The hook is around ``_check_if_req_exceed_kv_capacity`` of ``PrefillBootstrapQueue`` and ``DecodePreallocQueue`` in
``sglang/srt/disaggregation/{prefill,decode}.py``, which check a request before its sender or receiver is made. SGLang's
decode server compares the prompt with its whole cache. A prompt that fits into the cache, but not together with the
tokens that SGLang reserves for decoding, would wait at the head of the queue for ever, and so would every request
behind it.

After ``pause_generation`` with retraction, prefill computes the prompt and the answer so far anew, as one prompt.
Beside that prompt SGLang keeps as many tokens free as the whole answer may have, so a long answer would wait for ever
as well.

``init_req_max_new_tokens`` of ``sglang/srt/managers/scheduler.py`` ends an answer that fills the decode server's cache.
That limit leaves out the slots that a speculating request must find free before each step; SGLang would abort such a
request as out of memory with status 500, which routers retry. Here such an answer ends some tokens earlier.
"""

from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from sglang.srt.disaggregation.utils import prepare_abort

from sglang_tpla.attention.interface import MAX_QUERY_LEN
from sglang_tpla.host.disaggregation.kv_manager import TplaKVManager
from sglang_tpla.transfer.room import REFUSED


def exceeds(original: Callable[..., bool], self: Any, req: Any) -> bool:
    """Return whether a request was refused; if it was not, note its length for the room that is opened next."""
    manager = self.kv_manager
    if not isinstance(manager, TplaKVManager):
        return original(self, req)
    if manager.agent.role == "decode":
        manager.forward_stream = getattr(self.scheduler, "forward_stream", None)
    anew = recomputed_tokens(req)
    tokens = len(req.origin_input_ids) + anew
    refused = original(self, req)
    if not refused and manager.agent.role == "decode" and (why := never_fits(self, tokens, anew)):
        prepare_abort(req, why, status_code=HTTPStatus.BAD_REQUEST)
        self.scheduler.output_streamer.stream_output([req], req.return_logprob)
        refused = True
    if refused:
        reason = f"the {manager.agent.role} server {REFUSED}a prompt of {tokens} tokens does not fit"
        manager.decline(req.bootstrap_room, req.bootstrap_host, req.bootstrap_port, reason)
        return True
    if manager.agent.role == "decode" and not self.scheduler.spec_algorithm.is_none():
        leave_slots_for_guesses(self, req)
    if anew:
        req.sampling_params.max_new_tokens -= anew  # until the rows have come, only the rest of the answer counts
    if req.bootstrap_room is not None:
        manager.note_prompt(req.bootstrap_room, tokens)
    return False


def recomputed_tokens(req: Any) -> int:
    """Return how many tokens of an answer prefill computes anew: all but the last after a retraction, otherwise 0."""
    return len(req.output_ids) if getattr(req, "pd_rebootstrap_in_progress", False) else 0


def leave_slots_for_guesses(queue: Any, req: Any) -> None:
    """Shorten an answer that would end only where the cache is full, since a step takes slots for two steps' tokens."""
    pages = queue.token_to_kv_pool_allocator.page_size
    most = queue.max_total_num_tokens - len(req.origin_input_ids) - 2 * MAX_QUERY_LEN - pages
    if req.sampling_params.max_new_tokens > most:
        req.sampling_params.max_new_tokens = max(1, most)


def never_fits(queue: Any, tokens: int, anew: int) -> str:
    """Return the reason why a prompt would wait for ever, or an empty text if it would not.

    Args:
        tokens: tokens of the prompt.
        anew: those of them that belong to an answer that prefill computes anew.
    """
    most = queue.max_total_num_tokens - queue.num_reserved_decode_tokens
    if tokens <= most:
        return ""
    what = f"the prompt has {tokens} tokens"
    if anew:
        what += f" with those of its answer so far, which prefill computes anew after a retraction ({anew})"
    return (
        f"{what}, and this decode server takes at most {most}: its cache has "
        f"{queue.max_total_num_tokens}, of which {queue.num_reserved_decode_tokens} are kept free for decoding "
        "(--num-reserved-decode-tokens)"
    )
